"""The names of classes: classes.txt, which names those that the data number, and labels into other names."""

import pytest

from gspn.data.images import DataError, Split, read_class_names


def test_names_of_classes_in_a_file_that_begins_with_a_mark(tmp_path):
    (tmp_path / "classes.txt").write_text("cat\ndog\n", encoding="utf-8-sig")
    assert read_class_names(tmp_path) == ["cat", "dog"]


@pytest.mark.parametrize("text", ["cat\ndog\n\n \n", "cat\r\ndog", " cat \ndog\t\n"])
def test_blank_lines_at_the_end_do_not_count(tmp_path, text):
    (tmp_path / "classes.txt").write_bytes(text.encode())
    assert read_class_names(tmp_path) == ["cat", "dog"]


@pytest.mark.parametrize(("text", "line"), [("cat\n\ndog\n", 2), ("\ncat\n", 1), ("cat\ndog\n \t\n\nowl", 3)])
def test_a_blank_line_before_a_name_is_an_error(tmp_path, text, line):
    """It would shift all names after it."""
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(DataError, match=rf"line {line} of .*classes\.txt is blank: expected .*Remove the line"):
        read_class_names(tmp_path)


def test_no_file_no_names(tmp_path):
    assert read_class_names(tmp_path) is None


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_file_that_is_not_utf_8_is_an_error(tmp_path, encoding):
    (tmp_path / "classes.txt").write_text("café\nthé\n", encoding=encoding)
    with pytest.raises(DataError, match=r"classes\.txt cannot be read as a text in UTF-8"):
        read_class_names(tmp_path)


class Name(str):
    """A text that counts how often it is compared."""

    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other):
        Name.compared += 1
        return str.__eq__(self, other)


def test_each_class_is_looked_up_once():
    split = Split(range(500), [Name(i) for i in range(500)])
    names = [Name(i) for i in reversed(range(500))]
    assert split.relabelled(names).labels.tolist() == [*reversed(range(500))]
    assert Name.compared < 5_000


@pytest.mark.parametrize("names", [None, ["a", "b", "c"]])
def test_labels_below_0_are_unknown(names):
    with pytest.raises(DataError, match=r"2 classes: -3, -1 that the model does not know"):
        Split([-1, 0, -3], names).relabelled(["a", "b", "c"])
