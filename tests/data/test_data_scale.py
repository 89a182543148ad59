"""Data too many for memory: shards and streams; what is read in which order; fingerprints; workers that die."""

import errno
import io
import os
import signal
import tarfile

import numpy as np
import pytest
import torch
from helpers.training import TINY
from PIL import Image

from gspn import plots
from gspn.data import images, tables
from gspn.data.augment import Augmentation
from gspn.data.images import UNREADABLE, Preprocessing, generator
from gspn.data.labelled import DataError, open_data
from gspn.data.loader import ImageDataset, batches, make_loader
from gspn.metrics.classification import evaluate
from gspn.options import Options
from gspn.tasks.base import labelled_splits
from gspn.tasks.classify import train_classifier
from gspn.train.loop import make_accelerator

GREY8 = Preprocessing(1, (8, 8), (0.5,), (0.25,))


def picture(i, format="PNG"):
    """An image that says by its brightness which one it is."""
    file = io.BytesIO()
    Image.new("L", (8, 8), i).save(file, format)
    return file.getvalue()


def add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_shards(folder, split="train", shards=5, images_each=20, start=0, label=lambda i: str(i % 4)):
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        with tarfile.open(folder / f"{split}-{shard:04}.tar", "w") as tar:
            for i in range(images_each):
                number = start + shard * images_each + i
                add(tar, f"{number:06}.cls", label(number).encode())
                add(tar, f"{number:06}.png", picture(number))
    return folder


def read_epoch(split, *, epoch=0, seed=1, workers=0, batch_size=10, batches_done=0, augmentation=None):
    """(index, brightness, label) of an epoch's images, in the order of training."""
    loader = make_loader(split, GREY8, batch_size, train=True, augmentation=augmentation, seed=seed, workers=workers)
    loader.begin(epoch, batches_done)
    rows = []
    for batch in loader:
        rows += zip(
            batch["index"].tolist(), batch["image"].flatten(1)[:, 0].tolist(), batch["label"].tolist(), strict=True
        )
    return rows


# -- shards --


def test_shards_are_read_as_they_were_written(tmp_path):
    write_shards(tmp_path, "train")
    write_shards(tmp_path, "val", shards=2, start=100)
    (tmp_path / "classes.txt").write_text("a\nb\nc\nd\n")
    data = open_data(tmp_path)
    train, val, name = data.for_training()
    assert (data.kind, name, len(train), len(val), train.class_names) == ("shards", "val", 100, 40, list("abcd"))
    for i in (0, 19, 20, 99):
        assert train.image(i).getpixel((0, 0)) == i and int(train.labels[i]) == i % 4
    assert val.image(39).getpixel((0, 0)) == 139 and "val-0001.tar, 000139" in val.names(39)
    rows = read_epoch(train)
    assert sorted(i for i, _, _ in rows) == list(range(100))
    assert all(brightness == i and label == i % 4 for i, brightness, label in rows)


def test_order_of_shards_belongs_to_seed_and_epoch_whoever_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "TOGETHER", 2)
    split = open_data(write_shards(tmp_path)).splits["all"]
    rows = read_epoch(split)
    assert rows == read_epoch(split) == read_epoch(split, workers=2)
    assert rows != read_epoch(split, epoch=1) != read_epoch(split, seed=2)
    assert rows[30:] == read_epoch(split, batches_done=3)
    first = {i // 20 for i, _, _ in rows[:40]}
    assert len(first) == 2 and {i // 20 for i, _, _ in rows[40:80]}.isdisjoint(first)  # two shards at a time


def test_one_tar_file_folders_of_splits_and_class_names(tmp_path):
    write_shards(tmp_path / "train", "part", label=lambda i: "dog" if i % 2 else "cat")
    write_shards(tmp_path / "validation", "part", shards=1, label=lambda i: "cat")
    train, val, _ = open_data(tmp_path).for_training()
    assert train.class_names == val.class_names == ["cat", "dog"] and val.labels.sum() == 0
    alone = open_data(tmp_path / "train" / "part-0000.tar")
    assert len(alone.splits["all"]) == 20 and "held out" in alone.notes[0]


def test_shards_that_webdataset_writes(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.ShardWriter(str(tmp_path / "train-%02d.tar"), maxcount=15, verbose=0) as writer:
        for i in range(40):
            writer.write(
                {"__key__": f"some.folder/{i:03}", "jpg": picture(i * 5, "JPEG"), "cls": i % 3, "json": {"a": i}}
            )
    split = open_data(tmp_path).splits["all"]
    assert len(split) == 40 and split.labels.tolist() == [i % 3 for i in range(40)] and len(split.shard.unique()) == 3
    assert abs(split.image(33).getpixel((0, 0)) - 165) <= 1


def test_faults_of_shards(tmp_path):
    write_shards(tmp_path / "mixed", "train", shards=1)
    write_shards(tmp_path / "mixed", "part", shards=1)
    with pytest.raises(DataError, match=r"1 tar file: part-0000\.tar .*train"):
        open_data(tmp_path / "mixed")
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
        add(tar, "1.png", picture(1))
    with pytest.raises(DataError, match="uncompressed tar"):
        open_data(tmp_path / "packed.tar")
    with tarfile.open(tmp_path / "unlabelled.tar", "w") as tar:
        add(tar, "1.png", picture(1))
    with pytest.raises(DataError, match=r"image 1 .*1\.cls"):
        open_data(tmp_path / "unlabelled.tar")
    with tarfile.open(tmp_path / "nothing.tar", "w") as tar:
        add(tar, "readme.txt", b"x")
    with pytest.raises(DataError, match="no images with a class"):
        open_data(tmp_path / "nothing.tar")
    whole = (write_shards(tmp_path / "cut") / "train-0002.tar").read_bytes()
    (tmp_path / "cut" / "train-0002.tar").write_bytes(whole[:5000])
    with pytest.raises(DataError, match=r"train-0002\.tar cannot be read"):
        open_data(tmp_path / "cut")
    (tmp_path / "cut" / "train-0002.tar").unlink()
    (tmp_path / "cut" / "classes.txt").write_text("a\nb\n")
    with pytest.raises(DataError, match=r"2 classes.* 3"):
        open_data(tmp_path / "cut")


def test_joined_tar_files_are_read_whole(tmp_path):
    folder = write_shards(tmp_path / "parts", shards=3, images_each=20)
    (tmp_path / "all.tar").write_bytes(b"".join(file.read_bytes() for file in sorted(folder.iterdir())))
    split = open_data(tmp_path / "all.tar").splits["all"]
    assert [split.image(i).getpixel((0, 0)) for i in range(len(split))] == list(range(60))
    assert split.labels.tolist() == [i % 4 for i in range(60)]


def test_tar_files_that_do_not_end_as_tar_files_do(tmp_path):
    whole = (write_shards(tmp_path / "whole", shards=1, images_each=40) / "train-0000.tar").read_bytes()
    more = (write_shards(tmp_path / "more", shards=1, images_each=40, start=40) / "train-0000.tar").read_bytes()
    with tarfile.open(tmp_path / "whole/train-0000.tar") as tar:
        starts, end = [member.offset for member in tar], tar.offset
    cut = tmp_path / "cut.tar"
    for content, message in [
        (whole[: starts[6]], rf"header or the end .* at byte {starts[6]}, but the file ends"),
        (whole[: starts[6] + 100], rf"at byte {starts[6]}, but"),
        (whole[:end], rf"at byte {end}, but the file ends.*Download it or pack it again"),
        (whole[: end + 511], rf"at byte {end}, but the file ends"),
        (whole[: starts[6]] + bytes(len(whole) - starts[6]), rf"zeros follow byte {starts[6]}, .*not finished"),
        (whole[: starts[6]] + bytes(starts[70] - starts[6]) + whole[starts[70] :], rf"follow byte {starts[6]}, "),
        (whole[: starts[6]] + bytes(1100) + whole[starts[6] + 1100 :], r"something else"),
        (whole[: starts[6]] + b"x" * 512 + whole[starts[6] + 512 :], rf"at byte {starts[6]}, .*something else"),
        (whole + b"x", rf"at byte {len(whole)}, .*something else"),
        (whole + more[: starts[6]], rf"byte {len(whole) + starts[6]}, but the file ends"),
    ]:
        cut.write_bytes(content)
        with pytest.raises(DataError, match=rf"cut\.tar: .*{message}"):
            open_data(cut)
    for content in (whole[: end + 512], whole[: end + 1024], whole[: end + 1024].ljust(2 * 65536, b"\0")):
        cut.write_bytes(content)
        assert len(open_data(cut).splits["all"]) == 40


def test_numbers_of_classes_that_do_not_count_from_0(tmp_path):
    """Such as the keys of a data base: two million classes would be made of them."""
    write_shards(tmp_path / "keys", label=lambda i: ("2119789", "2084071")[i % 2])
    with pytest.raises(DataError, match=r"keys numbers classes up to 2,119,789, but only 2 .*count from 0.*names"):
        labelled_splits(open_data(tmp_path / "keys"))
    write_shards(tmp_path / "few", label=lambda i: str(i % 2 * 999))  # two of ImageNet's classes
    assert len(labelled_splits(open_data(tmp_path / "few"))[3]) == 1000


# -- images in memory --


def test_images_in_memory_that_are_too_many_at_the_models_size(monkeypatch):
    """They are resized one by one, to the same pixels."""
    split, size = open_data("digits").splits["test"], Preprocessing(3, (12, 16), (0,) * 3, (1,) * 3)
    monkeypatch.setattr("gspn.data.loader.KEPT", len(split) * 3 * 12 * 16)
    at_once = make_loader(split, size, 50, train=True, seed=1, workers=2)
    monkeypatch.setattr("gspn.data.loader.KEPT", len(split) * 3 * 12 * 16 - 1)
    one_by_one = make_loader(split, size, 50, train=True, seed=1, workers=2)
    assert at_once.dataset.pixels.shape == (359, 3, 12, 16) and at_once.num_workers == 0
    assert one_by_one.dataset.pixels is None and one_by_one.num_workers == 2
    for here, there in zip(at_once, one_by_one, strict=True):
        assert all(torch.equal(here[key], there[key]) for key in here)
    assert ImageDataset(split, GREY8).pixels is split.pixels  # which takes no memory


def test_images_in_memory_are_resized_into_place(monkeypatch):
    """So that they are in memory once, not twice."""
    split, size = open_data("digits").splits["test"], Preprocessing(1, (12, 16), (0,), (1,))
    expected = torch.stack([size(image) for image in map(split.image, range(len(split)))])
    monkeypatch.setattr(torch, "stack", None)
    assert torch.equal(ImageDataset(split, size).pixels, expected)


# -- streams of `datasets` --


@pytest.fixture
def streamed(tmp_path, monkeypatch):
    """A folder of parquet files: 90 training images in three of them, 10 for validation."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(tables, "BUFFER", 25)
    features = datasets.Features({"img": datasets.Image(), "kind": datasets.ClassLabel(names=["even", "odd"])})
    (tmp_path / "parquet").mkdir()
    for name, numbers in (
        ("train-0", range(30)),
        ("train-1", range(30, 60)),
        ("train-2", range(60, 90)),
        ("test", range(10)),
    ):
        rows = {"img": [{"bytes": picture(i), "path": None} for i in numbers], "kind": [i % 2 for i in numbers]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "parquet" / f"{name}.parquet")
    return tmp_path / "parquet"


def test_streams_give_every_image_once_in_an_order_that_repeats(streamed):
    data = open_data(streamed, streaming=True)
    train, test, _ = data.for_training()
    assert isinstance(train, tables.Stream) and train.counts == [30, 30, 30] and train.class_names == ["even", "odd"]
    rows = read_epoch(train)
    assert sorted(i for i, _, _ in rows) == list(range(90)) and [i for i, _, _ in rows] != list(range(90))
    assert all(brightness == i and label == i % 2 for i, brightness, label in rows)
    assert rows == read_epoch(train) == read_epoch(train, workers=2)
    assert rows != read_epoch(train, epoch=1) and rows != read_epoch(train, seed=2)
    assert rows[40:] == read_epoch(train, batches_done=4)
    flips = Augmentation(shift=1, fill="zero", flip=True)
    assert read_epoch(train, augmentation=flips) == read_epoch(train, augmentation=flips, workers=2)
    evaluation = torch.cat([batch["image"][:, 0, 0, 0] for batch in make_loader(test, GREY8, 4)])
    assert evaluation.tolist() == list(range(10))


def test_streams_are_splits(streamed):
    train = open_data(streamed, streaming=True).splits["train"].relabelled(["odd", "even"])
    assert [train.image(i).getpixel((0, 0)) for i in (0, 29, 30, 89)] == [0, 29, 30, 89]
    assert train.labels[:3].tolist() == [1, 0, 1] and train.channels() == 1 and len(list(train.sample(7))) == 7
    assert "row 5" in train.problem(5)
    with pytest.raises(DataError, match=r"held out.*stream"):
        open_data(streamed / "train-0.parquet", streaming=True)
    train.counts[1] -= 1
    with pytest.raises(DataError, match=r"shard 1 .* 29 .* 30"):
        list(train.keys(generator(0)))


def test_streaming_of_other_kinds_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"streaming.*`datasets`.*digits"):
        open_data("digits", streaming=True)
    for column in ("image_column", "label_column"):
        with pytest.raises(DataError, match=f"{column} is for data that `datasets` loads.*digits"):
            open_data("digits", **{column: "x"})
    (tmp_path / "train.csv").write_text("image,label\nx.png,1\n")
    with pytest.raises(DataError, match="columns' types"):
        open_data(tmp_path / "train.csv", streaming=True)


# -- has the data set changed? --


def test_fingerprint_of_files_follows_what_they_are_not_where(tmp_path):
    def write(root):
        for name, count in (("a", 3), ("b", 4)):
            (root / name).mkdir(parents=True)
            for i in range(count):
                (root / name / f"{i}.png").write_bytes(picture(i))
        return root

    one = open_data(write(tmp_path / "one")).fingerprint()
    two = write(tmp_path / "two")
    assert open_data(two).fingerprint() == one
    assert open_data(two, val_fraction=0.4).fingerprint() != one
    (two / "a" / "0.png").rename(two / "b" / "9.png")
    assert open_data(two).fingerprint() != one
    (two / "b" / "9.png").rename(two / "a" / "0.png")
    (two / "a" / "0.png").write_bytes(picture(0) + b"more")
    assert open_data(two).fingerprint() != one


def test_fingerprint_of_pixels_shards_and_tables(tmp_path, streamed):
    digits = open_data("digits")
    before = digits.fingerprint()
    assert (
        before == open_data("digits").fingerprint() != open_data("digits", class_names=list("abcdefghij")).fingerprint()
    )
    digits.splits["train"].pixels[7, 0, 3, 3] ^= 1
    assert digits.fingerprint() != before
    shards = write_shards(tmp_path / "shards")
    before = open_data(shards).fingerprint()
    write_shards(shards, label=lambda i: str((i + 1) % 4))
    assert open_data(shards).fingerprint() != before
    seen = {open_data(streamed, streaming=streaming).fingerprint() for streaming in (False, True)}
    assert len(seen) == 1  # the same images
    (streamed / "train-2.parquet").unlink()
    seen |= {open_data(streamed, streaming=streaming).fingerprint() for streaming in (False, True)}
    assert len(seen) == 2


# -- workers --


class Deadly:
    """Reads images; at the 13th its process is killed, as the system does when memory runs out."""

    def __call__(self, i):
        if i == 13:
            os.kill(os.getpid(), signal.SIGKILL)
        return Image.new("L", (8, 8), i)


def test_a_worker_that_dies_is_a_clear_error():
    split = images.Split(np.zeros(40), ["a"], read=Deadly())
    with pytest.raises(DataError, match=r"1 of the processes .*died.*--workers 0"):
        list(batches(make_loader(split, GREY8, 4, workers=1)))

    with pytest.raises(DataError, match=r"1 of the processes .*died"):
        list(batches(make_accelerator().prepare(make_loader(split, GREY8, 4, workers=1))))


def test_other_errors_of_a_loader_pass_through():
    def broken():
        yield {}
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        list(batches(broken()))

    def unreachable():
        yield {}
        raise ConnectionError("the hub is gone")

    with pytest.raises(ConnectionError, match="the hub is gone"):
        list(batches(unreachable()))


def test_unreadable_images_in_shards_and_streams_are_marked(tmp_path):
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for i in range(8):
            add(tar, f"{i}.png", picture(i)[: 30 if i == 5 else None])
            add(tar, f"{i}.cls", b"0")
    split = open_data(tmp_path).splits["all"]
    (batch,) = make_loader(split, GREY8, 8)
    assert torch.where(batch["label"] == UNREADABLE)[0].tolist() == [5] and "all.tar, 5" in split.problem(5)


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EMFILE, "open"), OSError(errno.EIO, "read")])
def test_what_the_machine_lacks_is_no_unreadable_image(error):
    split = images.Split([0, 0], ["a"], read=Raises(error))
    for work in (lambda: list(batches(make_loader(split, GREY8, 2))), lambda: list(split.sample())):
        with pytest.raises(type(error)) as told:
            work()
        assert told.value is error
    for own in (OSError("image file is truncated"), FileNotFoundError(errno.ENOENT, "no such file")):
        split = images.Split([0, 0], ["a"], read=Raises(own))
        (batch,) = batches(make_loader(split, GREY8, 2))
        assert batch["label"].tolist() == [UNREADABLE] * 2


class Raises:
    def __init__(self, error):
        self.error = error

    def __call__(self, i):
        raise self.error


# -- in training --


def test_training_and_evaluation_on_shards_and_on_a_stream(tmp_path, streamed, monkeypatch):
    for name in ("curves", "predictions", "context"):
        monkeypatch.setattr(plots, name, lambda *args: None)
    options = dict(model_args=TINY, epochs=1, batch_size=10, workers=1, augment="shift", flip=True)
    shards = write_shards(tmp_path / "shards")
    for name, data, count in (("shards", shards, 8), ("stream", streamed, 10)):
        run, metrics, _ = train_classifier(
            data, tmp_path / "runs" / name, Options(**options, streaming=name == "stream")
        )
        assert metrics["images"] == count and run.metrics[0]["step"] == 9
        again, _ = evaluate(run.path, data, workers=0)
        assert again["images"] == count and again["loss"] == pytest.approx(metrics["loss"], rel=1e-5)


# -- numbers as classes --


def test_names_for_numbers_when_a_split_lacks_a_class(tmp_path):
    import datasets

    for name, labels in (("train", [0, 1, 2, 2]), ("validation", [1, 2])):
        rows = {"image": [{"bytes": picture(i), "path": None} for i in range(len(labels))], "label": labels}
        features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{name}.parquet")
    splits = open_data(tmp_path, class_names=["a", "b", "c"], label_column="label").splits
    assert {name: split.labels.tolist() for name, split in splits.items()} == {"train": [0, 1, 2, 2], "val": [1, 2]}
    assert {tuple(split.class_names) for split in splits.values()} == {("a", "b", "c")}
    with pytest.raises(DataError, match="2 class names were given for 3 classes"):
        open_data(tmp_path, class_names=["a", "b"], label_column="label")
