"""Which split an image is of, by the names of files and folders: one rule for masks, captions, shards and classes."""

import io
import tarfile

import pytest
from helpers.masks import pair, save_pair
from PIL import Image

from gspn.data.captions import open_captions
from gspn.data.folders import by_split
from gspn.data.images import DataError
from gspn.data.labelled import open_data
from gspn.data.masks import open_masked


def masks(at, part, count):
    for i in range(count):
        save_pair(at / part, f"{i}", *pair(i))


def captions(at, part, count):
    (at / part).mkdir(parents=True)
    for i in range(count):
        Image.new("L", (8, 8), i).save(at / part / f"{i}.png")
        (at / part / f"{i}.txt").write_text("grey")


def classes(at, part, count):
    for name in ("cat", "dog"):
        (at / part / name).mkdir(parents=True)
        for i in range(count // 2):
            Image.new("L", (8, 8), i).save(at / part / name / f"{i}.png")


def shards(at, part, count):
    at.mkdir(exist_ok=True)
    with tarfile.open(at / f"{part}.tar", "w") as tar:
        for i in range(count):
            image = io.BytesIO()
            Image.new("L", (8, 8), i).save(image, "PNG")
            for end, content in {"png": image.getvalue(), "cls": b"%d" % (i % 2)}.items():
                member = tarfile.TarInfo(f"{i}.{end}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


KINDS = [(masks, open_masked), (captions, open_captions), (shards, open_data), (classes, open_data)]
IDS = ["masks", "captions", "shards", "classes"]


@pytest.mark.parametrize(("write", "open_"), KINDS, ids=IDS)
@pytest.mark.parametrize(("train", "other"), [("Train", "Val"), ("TRAIN", "TEST"), ("train", "Validation")])
def test_splits_in_upper_and_lower_case(tmp_path, write, open_, train, other):
    write(tmp_path / "data", train, 6)
    write(tmp_path / "data", other, 4)
    found = {name: len(split) for name, split in open_(tmp_path / "data").splits.items()}
    assert found == {"train": 6, other.lower().removesuffix("idation"): 4}


@pytest.mark.parametrize(("write", "open_"), KINDS, ids=IDS)
@pytest.mark.parametrize(
    ("train", "other"), [("train2017", "val2017"), ("training", "testing"), ("Trainset", "devset")]
)
def test_names_that_only_sound_like_splits_are_refused(tmp_path, write, open_, train, other):
    """Otherwise images for evaluation would be trained on."""
    write(tmp_path / "data", train, 6)
    write(tmp_path / "data", other, 4)
    with pytest.raises(
        DataError, match=rf"(?i)({train}|{other}).* sounds like .*train, val, valid, validation, test.*rename"
    ):
        open_(tmp_path / "data")


def test_a_class_called_train_in_capitals_beside_others(tmp_path):
    classes(tmp_path, "", 6)
    (tmp_path / "dog").rename(tmp_path / "Train")
    assert open_data(tmp_path).splits["all"].class_names == ["Train", "cat"]


def test_files_of_two_splits_are_refused(tmp_path):
    files = [tmp_path / "test" / "train-0.tar", tmp_path / "val-0.tar"]
    with pytest.raises(DataError, match=r"test/train-0\.tar has the names of two splits: test, train; .*rename"):
        by_split(tmp_path, files, "file", "files")


@pytest.mark.parametrize(
    "names, expected",
    [
        (["training-0", "training-1"], {"train": 2}),  # one part, whatever it is called
        (["eval-clean-0"], {"train": 1}),
        (["my-test-photos-train-0"], {"train": 1}),
        (["my-test-photos-train-0", "my-test-photos-val-0"], {"train": 1, "val": 1}),
        (["a-val-split-train-0", "a-val-split-val-0"], {"train": 1, "val": 1}),
        (["test-0", "test-1"], {"test": 2}),
        (["a-0", "b-0"], {"train": 2}),
    ],
)
def test_words_that_all_files_share_do_not_tell_them_apart(tmp_path, names, expected):
    found = by_split(tmp_path, [tmp_path / f"{name}.tar" for name in names], "file", "files")
    assert {split: len(files) for split, files in found.items()} == expected


def test_with_folders_the_names_of_files_do_not_count(tmp_path):
    images = [tmp_path / "Val" / "a" / "train2017.png", tmp_path / "val-old" / "TRAIN" / "test.png"]
    assert by_split(tmp_path, images[:1], "image", "images", folders=True) == {"val": images[:1]}
    images[1] = tmp_path / "my-test" / "b.png"  # whole names alone
    with pytest.raises(DataError, match=r"1 image: my-test/b\.png of no split, beside others of val.*a folder around"):
        by_split(tmp_path, images, "image", "images", folders=True)


def test_images_beside_masks_are_no_classes(tmp_path):
    for folder in ("images", "Masks"):
        (tmp_path / folder).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / folder / "a.png")
    with pytest.raises(DataError, match="as `gspn train-segmentation` takes them"):
        open_data(tmp_path)


def test_what_is_neither_here_nor_on_the_hub(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: (_ for _ in ()).throw(OSError("not reachable")))
    with pytest.raises(
        DataError, match=r"^there is no file or folder nosuch, and Hugging Face datasets cannot load it"
    ):
        open_data("nosuch")
