"""Which files are data: the rule, and that every reader keeps to it; which folders are classes."""

import gzip
import io
import json
import os
import tarfile

import pytest
from helpers.training import tiny_options
from PIL import Image
from rich.console import Console

from gspn import plots
from gspn.data.captions import open_captions
from gspn.data.folders import by_split, counts, is_image, scan, walk
from gspn.data.idx import read_idx
from gspn.data.labelled import DataError, open_data
from gspn.files import SaveError
from gspn.metrics.classification import evaluate
from gspn.places import alike
from gspn.tasks.classify import train_classifier


def picture(grey):
    file = io.BytesIO()
    Image.new("L", (8, 8), grey).save(file, "PNG")
    return file.getvalue()


def write(root, *names):
    """Images by their paths below `root`, each of another brightness."""
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(i))
    return root


def link(path, target):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


# -- the rule --


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a/b.png", True),
        ("a.b/c", True),
        ("./a.png", True),
        ("../a.png", True),
        ("__init__/a.png", True),
        (".a.png", False),
        ("a/.ipynb_checkpoints/a.png", False),
        ("__MACOSX/a/b.png", False),
        ("a/Thumbs.db", False),
        ("a/desktop.INI", False),
        ("a/@eaDir/b.png", False),
    ],
)
def test_what_counts_by_its_name(path, expected):
    assert counts(path) is expected


def test_hidden_and_system_files_are_no_data_at_any_depth(tmp_path):
    write(tmp_path, "a/1.png", "a/deep/2.png", "a/deep/._2.png", "a/.hidden/3.png", ".git/4.png", "__MACOSX/a/._1.png")
    write(tmp_path, "a/deep/Thumbs.db", ".DS_Store")
    found = walk(tmp_path)
    assert found.names(found.files) == ["a/1.png", "a/deep/2.png"]
    assert found.names(found.folders) == ["a", "a/deep"]
    assert found.names(found.left_out) == [
        ".DS_Store",
        ".git",
        "__MACOSX",
        "a/.hidden",
        "a/deep/._2.png",
        "a/deep/Thumbs.db",
    ]
    assert found.notes()[0].startswith("left out 6 hidden or system files or folders: .DS_Store, .git, __MACOSX")


def test_links_are_followed_and_none_leads_in_a_circle(tmp_path):
    root = write(tmp_path / "root", "own/1.png")
    write(tmp_path / "elsewhere", "2.png", "deep/3.png")
    link(root / "own" / "file.png", tmp_path / "elsewhere" / "2.png")
    link(root / "own" / "linked", tmp_path / "elsewhere")
    link(root / "zdeep", tmp_path / "elsewhere" / "deep")
    link(root / "again", root / "own")
    link(root / "own" / "circle", root)
    link(root / "above", tmp_path)
    link(tmp_path / "elsewhere" / "deep" / "back", tmp_path / "elsewhere")
    link(root / "gone.png", tmp_path / "nothing")
    link(root / "itself", root / "itself")
    found = walk(root)
    # each once: under its own name where it has one, else under that of the first link
    assert sorted(file.read_bytes() for file in found.files) == sorted([picture(0)] + [picture(0)] * 2 + [picture(1)])
    assert found.names(found.files) == ["own/1.png", "own/file.png", "own/linked/2.png", "zdeep/3.png"]
    assert found.names(found.dangling) == ["gone.png", "itself"]
    assert set(found.names(found.again)) == {"again", "above", "own/circle", "own/linked/deep", "zdeep/back"}
    assert any(note == "left out 2 links that lead nowhere: gone.png, itself" for note in found.notes())
    assert any(note.startswith("left out 5 links to folders that are read already") for note in found.notes())


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"absent .*No such file"):
        scan(tmp_path / "absent")


def test_splits_by_name(tmp_path):
    files = [tmp_path / name for name in ("train-01.tar", "val/1.tar", "imagenet-test.tar", "valid_2.tar")]
    assert by_split(tmp_path, files, "file", "files") == {
        "train": files[:1],
        "val": [files[1], files[3]],
        "test": files[2:3],
    }
    assert by_split(tmp_path, [tmp_path / "a.tar"], "file", "files") == {"train": [tmp_path / "a.tar"]}


def test_names_alike(tmp_path):
    write(tmp_path, "photos/1.png", ".phots/1.png")
    assert alike(tmp_path / "phtos") == f" (did you mean {tmp_path / 'photos'}?)"
    assert alike(tmp_path / "entirely else") == alike(tmp_path / "no" / "folder") == ""


# -- every reader keeps to it --


def litter(folder):
    """What a Mac, Windows and a notebook leave in a folder, and links."""
    write(folder, "._0.png", ".ipynb_checkpoints/0-checkpoint.png", "Thumbs.db", ".DS_Store")
    link(folder / "gone.png", folder / "nothing.png")


def told(notes):
    assert any("hidden or system" in note and ".ipynb_checkpoints" in note for note in notes), notes
    assert any("1 link that leads nowhere" in note and "gone.png" in note for note in notes), notes


def test_class_folders_without_litter_and_with_links(tmp_path):
    root = write(tmp_path / "root", "cat/0.png", "cat/more/1.png", "dog/2.png")
    write(root, "__MACOSX/cat/._0.png", ".Trash-1000/x/1.png")
    litter(root / "cat")
    write(tmp_path / "pool", "emus/3.png", "dogs/4.png", "5.png")
    link(root / "emu", tmp_path / "pool" / "emus")
    link(root / "dog" / "more", tmp_path / "pool" / "dogs")
    link(root / "dog" / "one.png", tmp_path / "pool" / "5.png")
    write(root, "beside.png")
    (root / "readme.md").write_text("x")
    data = open_data(root)
    split = data.splits["all"]
    assert split.class_names == ["cat", "dog", "emu"] and split.labels.tolist() == [0, 0, 1, 1, 1, 2]
    assert [os.path.relpath(split.names(i), root) for i in range(6)] == [
        "cat/0.png", "cat/more/1.png", "dog/2.png", "dog/more/4.png", "dog/one.png", "emu/3.png",
    ]  # fmt: skip
    told(data.notes)
    assert "ignored 1 image outside of the class folders: beside.png" in data.notes
    assert "ignored 1 file that is no image by its name: readme.md" in data.notes


def test_captions_without_litter_and_with_links(tmp_path):
    root = write(tmp_path / "root", "0.png", "a/1.png", "__MACOSX/._0.png")
    litter(root)
    write(tmp_path / "pool", "2.png")
    link(root / "linked", tmp_path / "pool")
    for image in (root / "0.png", root / "a/1.png", tmp_path / "pool" / "2.png"):
        image.with_suffix(".txt").write_text("text")
    data = open_captions(root)
    assert len(data.splits["all"]) == 3
    told(data.notes)


def test_comparisons_without_litter(tmp_path):
    pytest.importorskip("diffusers")
    from gspn.metrics.image_sets import open_images

    root = write(tmp_path / "root", "0.png", "1.png", "__MACOSX/._0.png", ".thumbnails/0.png")
    litter(root)
    link(root / "2.png", root / "0.png")
    images = open_images(root)
    assert len(images.split) == 3
    told(images.notes)
    write(tmp_path / "pool", "3.png")
    link(root / "linked", tmp_path / "pool")
    with pytest.raises(DataError, match=r"images and folders.*\(linked\)"):
        open_images(root)


@pytest.fixture
def parquet(monkeypatch, tmp_path_factory):
    """Writes a table of images with these labels."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))

    def write_table(path, labels, feature=None):
        path.parent.mkdir(parents=True, exist_ok=True)
        features = {"image": datasets.Image(), "label": feature or datasets.ClassLabel(names=["a", "b"])}
        rows = {"image": [{"bytes": picture(i), "path": None} for i in range(len(labels))], "label": labels}
        datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(path)

    return write_table


def test_tables_without_litter_and_with_links(tmp_path, parquet):
    root = tmp_path / "root"
    parquet(root / "train-0.parquet", [0, 1, 0])
    parquet(root / ".old" / "train-1.parquet", [0])
    parquet(root / "__MACOSX" / "train-1.parquet", [0])
    (root / "._train-0.parquet").write_bytes(b"\0\5\26\7")
    data = open_data(root)
    assert len(data.splits["all"]) == 3 and any("3 hidden or system" in note for note in data.notes)
    parquet(tmp_path / "elsewhere" / "train-1.parquet", [1, 1])
    parquet(tmp_path / "elsewhere" / "val.parquet", [1])
    link(root / "linked", tmp_path / "elsewhere")
    data = open_data(root)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 5, "val": 1}
    (tmp_path / "elsewhere" / "train-2.csv").write_text("a\n1\n")
    with pytest.raises(DataError, match="csv and parquet"):
        open_data(root)


def test_tables_and_splits_that_are_not_read_are_told(tmp_path, parquet):
    import datasets

    parquet(tmp_path / "root" / "train.parquet", [0, 1])
    parquet(tmp_path / "root" / "extra.parquet", [0, 1])
    assert "datasets leaves out 1 table: extra.parquet" in open_data(tmp_path / "root").notes
    table = datasets.load_dataset("parquet", data_files=str(tmp_path / "root" / "train.parquet"), split="train")
    datasets.DatasetDict({"train": table, "bonus": table}).save_to_disk(tmp_path / "saved")
    assert any(note.startswith("left out 1 split: bonus") for note in open_data(tmp_path / "saved").notes)
    datasets.DatasetDict({"train": table, "val": table, "validation": table}).save_to_disk(tmp_path / "twice")
    with pytest.raises(DataError, match="one purpose: val, validation"):
        open_data(tmp_path / "twice")


# -- which folders are classes --


def test_one_folder_as_two_classes_or_splits(tmp_path):
    write(tmp_path, "a/cat/0.png", "a/cat/1.png", "a/dog/2.png", "b/train/cat/0.png", "b/train/dog/1.png")
    link(tmp_path / "a" / "felines", tmp_path / "a" / "cat")
    with pytest.raises(DataError, match=r"a/felines .*link to .*a/cat"):
        open_data(tmp_path / "a")
    link(tmp_path / "b" / "val", tmp_path / "b" / "train")
    with pytest.raises(DataError, match=r"b/val .*link to .*b/train"):
        open_data(tmp_path / "b")


WRONG_LEVEL = {
    "a single folder around the splits": (
        ["photos/train/cat/0.png", "photos/train/dog/1.png", "photos/val/cat/2.png"],
        r"1 folder: photos.*: train, val\..*/photos$",
    ),
    "a single folder around the classes": (
        ["photos/cat/0.png", "photos/dog/1.png"],
        r"in photos .*: cat, dog\..*/photos; if photos ",
    ),
    "a folder of data sets with splits": (
        ["pets/train/cat/0.png", "flowers/train/rose/0.png"],
        r"2 folders: flowers, pets.* in flowers .*: train\..*/flowers$",
    ),
    "a folder of data sets with classes": (
        ["pets/cat/0.png", "pets/dog/1.png", "flowers/rose/0.png"],
        r"folders: flowers, pets.* in pets .*: cat, dog\..*/pets; if flowers, pets ",
    ),
    "a folder around the classes of a split": (
        ["train/photos/cat/0.png", "train/photos/dog/0.png", "val/photos/cat/0.png"],
        r"train .*too high.*1 folder: photos.* in photos .*: cat, dog\.",
    ),
    "splits below the classes": (
        ["cat/train/0.png", "dog/train/1.png"],
        r"in cat .*: train\.",
    ),
    "splits by other names": (
        ["Training/cat/0.png", "test_images/cat/1.png"],
        r"2 folders: Training, test_images.*: expected .* train, val",
    ),
    "one of them": (["TRAINING/cat/0.png", "TRAINING/dog/0.png"], "1 folder: TRAINING, .*parts"),
}


@pytest.mark.parametrize("case", WRONG_LEVEL)
def test_folders_that_are_no_classes(tmp_path, case):
    files, message = WRONG_LEVEL[case]
    with pytest.raises(DataError, match=message):
        open_data(write(tmp_path, *files))


@pytest.mark.parametrize(
    "files",
    [
        ["cat/images/0.png", "dog/images/1.png"],  # as in Tiny ImageNet
        ["cat/0.png", "cat/2021/1.png", "cat/2022/1.png", "dog/2021/2.png", "dog/2022/3.png"],
        ["train/cat/a/b/0.png", "train/dog/1.png", "val/cat/2.png"],
        ["cat/0.png", "dog/1.png", "test/2.png"],
    ],
)
def test_images_below_the_class_folders_are_of_the_class(tmp_path, files):
    write(tmp_path, *files)
    data = open_data(tmp_path)
    names = data.splits["train"].class_names
    assert {"cat", "dog"} <= set(names) <= {"cat", "dog", "test"}
    everything = data.splits.get("all", data.splits["train"])
    assert all(f"/{names[label]}/" in everything.names(i) for i, label in enumerate(everything.labels.tolist()))


def test_images_without_class_folders(tmp_path):
    write(tmp_path, "cat/0.png", "cat/1.png")
    with pytest.raises(DataError, match=r"2 images: 0\.png, 1\.png, but no class folders"):
        open_data(tmp_path / "cat")


@pytest.mark.parametrize("kind", ["folder", "shards", "datasets", "idx"])
def test_a_classifier_of_one_class_is_refused(tmp_path, kind, parquet):
    import numpy as np

    data = tmp_path / "data"
    data.mkdir()
    if kind == "folder":
        write(data, *(f"photos/{i}.png" for i in range(6)))
    elif kind == "shards":
        write_tar(
            data / "a.tar",
            [(f"{i}.{end}", b"7" if end == "cls" else picture(i)) for i in range(6) for end in ("png", "cls")],
        )
    elif kind == "datasets":
        parquet(data / "train.parquet", [1] * 6)
    else:
        from test_data import write_idx

        write_idx(data / "train-images-idx3-ubyte", np.zeros((6, 8, 8), np.uint8))
        write_idx(data / "train-labels-idx1-ubyte", np.full(6, 3, np.uint8))
    assert open_data(data).kind == kind  # to evaluate on, or to generate: one class is enough
    name = {"folder": "'photos'", "shards": "7", "datasets": "'b'", "idx": "3"}[kind]
    with pytest.raises(DataError, match=f"one class, {name}.*expected (several|two)"):
        train_classifier(data, tmp_path / "run", tiny_options())
    assert not (tmp_path / "run").exists()


# -- shards --


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def samples(*names):
    return [(name, b"0" if name.lower().endswith("cls") else picture(i)) for i, name in enumerate(names)]


def test_shards_are_keyed_as_webdataset_keys_them(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    members = samples(
        "a.b/0.png", "a.b/0.cls", "./1.PNG", "./1.CLS", "2.seg.png", "2.png", "2.cls", "x/3.cls", "x/3.jpg"
    )
    write_tar(tmp_path / "a.tar", members)
    split = open_data(tmp_path).splits["all"]
    theirs = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False))
    assert [split.names(i).split(", ")[1] for i in range(len(split))] == [sample["__key__"] for sample in theirs]
    assert [split.image(i).getpixel((0, 0)) for i in range(4)] == [0, 2, 5, 8]
    assert "ignored members of tar files: 1 .seg.png (such as 2.seg.png)" in open_data(tmp_path).notes


def test_what_is_dropped_of_shards_is_counted_and_named(tmp_path):
    members = samples(
        "0.png", "0.cls", "0.json", "._0.cls", "__MACOSX/._0.png", "__meta__/x.json", "000.v2.png", "000.v2.cls"
    )
    members += samples("1.cls", "README", "2.png", "2.cls", "2.json")
    data = open_data(write_tar(tmp_path / "a.tar", members))
    assert len(data.splits["all"]) == 2
    assert "left out 3 hidden or system members: ._0.cls, __MACOSX/._0.png, __meta__/x.json" in data.notes
    assert "left out 1 sample without an image: 1" in data.notes
    assert (
        "ignored members of tar files: 2 .json (such as 0.json), 1 .v2.png (such as 000.v2.png), 1 .v2.cls (such as "
        "000.v2.cls), 1 without a dot (such as README)" in data.notes
    )
    write_tar(tmp_path / "b.tar", samples("000.v2.png", "000.v2.cls"))
    with pytest.raises(DataError, match=r"b\.tar .*no images with a class: .*000\.v2\.png"):
        open_data(tmp_path / "b.tar")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["0.png", "0.jpg", "0.cls"], r"0\.png and 0\.jpg, .*one sample"),
        (["0.png", "0.PNG", "0.cls"], r"0\.png and 0\.PNG, .*one sample"),
        (["0.png", "0.cls", "0.cls"], r"0\.cls twice"),
        (["0.png", "0.cls", "1.png", "1.cls", "0.png", "0.cls"], r"0\.png .*not follow"),
        (["0.png", "1.cls"], r"image 0 .*0\.cls"),
    ],
)
def test_samples_that_are_not_clear(tmp_path, names, message):
    with pytest.raises(DataError, match=message):
        open_data(write_tar(tmp_path / "a.tar", samples(*names)))


def test_classes_of_shards(tmp_path):
    def tar(*classes):
        members = [
            (f"{i}.{end}", text if end == "cls" else picture(i))
            for i, text in enumerate(classes)
            for end in ("cls", "png")
        ]
        return write_tar(tmp_path / "train.tar", members)

    with pytest.raises(DataError, match=r"train\.tar: 1\.cls is empty"):
        open_data(tar(b"0", b" \n", b"1"))
    with pytest.raises(DataError, match=r"1\.cls .*UTF-8"):
        open_data(tar(b"0", b"\xff"))
    with pytest.raises(DataError, match=r"1 of 3 images .*train.*below 0"):
        open_data(tar(b"0", b"-1", b"1"))
    with pytest.raises(DataError, match="all are -1"):
        open_data(tar(b"-1", b"-1"))
    assert open_data(tar(b"\xef\xbb\xbf0", b"1\r\n")).splits["all"].labels.tolist() == [0, 1]
    write_tar(tmp_path / "test.tar", [("0.png", picture(0)), ("0.cls", b"-1")])
    data = open_data(tmp_path)
    assert "test" not in data.splits and "left out the test split, whose 1 images have no labels" in data.notes


# -- labels of tables --


def test_labels_of_tables(tmp_path, parquet):
    import datasets

    integer = datasets.Value("int64")
    parquet(tmp_path / "a.parquet", [3, -1, 7], integer)
    with pytest.raises(DataError, match=r"1 of 3 images .*train.*below 0"):
        open_data(tmp_path / "a.parquet", label_column="label")
    for name, labels in (("train", [10, 9, 9]), ("test", [-1, -1])):
        parquet(tmp_path / "b" / f"{name}.parquet", labels, integer)
    data = open_data(tmp_path / "b", label_column="label")
    assert data.splits["all"].class_names == ["9", "10"] and data.splits["all"].labels.tolist() == [1, 0, 0]
    assert "left out the test split, whose 2 images have no labels" in data.notes
    parquet(tmp_path / "c.parquet", [[1, 2], [3], []], datasets.List(integer))
    with pytest.raises(DataError, match=r"column 'label' .*List\(.*class"):
        open_data(tmp_path / "c.parquet", label_column="label")
    with pytest.raises(DataError, match=r"column 'image' .*Image\(.*class"):
        open_data(tmp_path / "a.parquet", label_column="image")
    parquet(tmp_path / "d.parquet", [1.0, float("nan"), 2.0], datasets.Value("float64"))
    with pytest.raises(DataError, match=r"1 rows .*'label'"):
        open_data(tmp_path / "d.parquet", label_column="label")


# -- names that are not UTF-8 --


def test_names_that_are_not_utf8_train_and_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "context", lambda *args: None)
    data = tmp_path / "data\udce9"
    try:
        write(data, *(f"{name}/{i}\udcff.png" for name in ("caf\udce9", "dog") for i in range(8)))
    except OSError:
        pytest.skip("the file system takes only names that are UTF-8")
    (data / "dog" / "0\udcff.png").write_bytes(b"damaged")
    link(data / "dog" / "gone\udcff.png", "nothing")
    printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # what cannot be encoded is an error
    run, metrics, warnings = train_classifier(
        data, tmp_path / "run", tiny_options(), console=Console(file=printed, width=500)
    )
    printed.flush()
    text = printed.buffer.getvalue().decode()
    assert "dog/gone\\xff.png" in text
    assert "data\\xe9/dog/0\\xff.png: cannot identify" in warnings[0]
    config = json.loads((run.path / "config.json").read_text())
    assert config["class_names"] == ["caf\\xe9", "dog"] and config["data"]["where"] == str(data)
    again, _ = evaluate(run.path, data, workers=0, out=tmp_path / "out")
    assert again["loss"] == pytest.approx(metrics["loss"], rel=1e-5)
    assert len(os.listdir(tmp_path / "out")) == 2
    with pytest.raises(SaveError, match=r"run\\xe9.*UTF-8"):
        train_classifier(data, tmp_path / "run\udce9", tiny_options())
    tar = write_tar(tmp_path / "s\udcff.tar", samples("0\udcff.png", "0\udcff.cls", "1.png", "1.cls"))
    assert open_data(tar).splits["all"].names(0) == f"{tmp_path}/s\\xff.tar, 0\\xff"
    assert len(open_data(tar).fingerprint()) == len("2:") + 64


def test_formats_that_pillow_cannot_read_are_no_images():
    assert all(is_image(f"a.{end}") for end in ("png", "JPG", "jpeg", "webp", "tif", "bmp", "gif"))
    assert not any(is_image(f"a.{end}") for end in ("pdf", "h5", "hdf", "grib", "bufr", "mpg", "txt", ""))


def test_a_compressed_file_whose_content_is_damaged(tmp_path):
    """Not its end or its header: zlib complains of the middle."""
    content = bytearray(gzip.compress(os.urandom(5_000)))
    content[10] = 0b00000111  # a type of block that does not exist
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte\.gz cannot be read"):
        read_idx(tmp_path / "train-labels-idx1-ubyte.gz", 1)
