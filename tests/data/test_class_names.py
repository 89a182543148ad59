"""classes.txt: the names of classes that the data number."""

import pytest

from gspn.data.images import DataError, read_class_names


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
