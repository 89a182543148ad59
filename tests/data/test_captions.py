"""What DATA means where images have captions, in all its kinds and with all its faults."""

import io
import json
import tarfile

import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from gspn.data.captions import open_captions
from gspn.data.images import Preprocessing
from gspn.data.labelled import DataError, open_data
from gspn.data.loader import make_loader


def picture(grey, size=(6, 4)):
    return Image.new("RGB", size, (grey, grey, grey))


def encoded(grey):
    file = io.BytesIO()
    picture(grey).save(file, "PNG")
    return file.getvalue()


def write_images(folder, count, start=0):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(start, start + count):
        picture(i).save(folder / f"{i:03}.png")


def write_list(folder, rows, name="metadata.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def rows(count, start=0, column="text", folder=""):
    return [{"file_name": f"{folder}{i:03}.png", column: f"grey {i}"} for i in range(start, start + count)]


def add(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def check(split, count):
    """Every image has the caption that says how bright it is."""
    assert len(split) == count == len(split.captions) and not split.labels.any()
    for i in range(count):
        grey = split.image(i).convert("RGB").getpixel((0, 0))[0]
        assert split.captions[i] == (f"grey {grey}",), (split.names(i), split.captions[i])


# -- folders --


def test_captions_may_hold_whatever_json_lines_may(tmp_path):
    write_images(tmp_path, 2)
    texts = ["one\u2028two\x85three", "a \u2029 b"]
    lines = [json.dumps({"file_name": f"{i:03}.png", "text": text}, ensure_ascii=False) for i, text in enumerate(texts)]
    (tmp_path / "metadata.jsonl").write_bytes("\r\n".join([*lines, ""]).encode())
    assert open_captions(tmp_path).splits["all"].captions == [(text,) for text in texts]


def test_folders_that_links_lead_to_count_once_and_hidden_ones_do_not(tmp_path):
    for folder, start in (("photos/own", 0), ("elsewhere/deep", 2), ("photos/own/.hidden", 9)):
        write_images(tmp_path / folder, 2, start)
        for i in range(start, start + 2):
            (tmp_path / folder / f"{i:03}.txt").write_text(f"grey {i}")
    for link, target in {"linked": "elsewhere", "again": "photos/own", "circle": "photos", "above": ""}.items():
        (tmp_path / "photos" / link).symlink_to(tmp_path / target, target_is_directory=True)
    (tmp_path / "elsewhere/circle").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    split = open_captions(tmp_path / "photos").splits["all"]
    check(split, 4)
    assert sorted(split.captions) == [(f"grey {i}",) for i in range(4)]


@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_a_folder_with_a_list(tmp_path, column, ending):
    write_images(tmp_path / "images", 10)
    write_images(tmp_path / "images", 1, start=99)
    listed = rows(10, column=column, folder="images/")
    if ending == "jsonl":
        write_list(tmp_path, reversed(listed))
    elif ending == "parquet":
        parquet.write_table(
            pa.Table.from_pylist([row | {"seen": b"x"} for row in listed]), tmp_path / "metadata.parquet"
        )
    else:
        lines = "".join(f'{row["file_name"]},"{row[column]}"\n' for row in listed)
        (tmp_path / "metadata.csv").write_text(f"file_name,{column}\n{lines}")
    data = open_captions(tmp_path, val_fraction=0.2)
    assert data.kind == "captioned folder" and data.splits.keys() == {"train", "val", "all"}
    for name, count in (("train", 8), ("val", 2), ("all", 10)):
        check(data.splits[name], count)
    ignored, held_out = data.notes
    assert ignored == "ignored 1 image: images/099.png without a caption" and "2 of 10 images are held out" in held_out


def test_the_column_is_asked_for_where_several_can_be_meant(tmp_path):
    write_images(tmp_path, 3)
    write_list(tmp_path, [row | {"source": "drawn"} for row in rows(3, column="prompt")])
    with pytest.raises(DataError, match=r"line 1 .*prompt, source.*text and caption"):
        open_captions(tmp_path)
    check(open_captions(tmp_path, caption_column="prompt").splits["all"], 3)
    with pytest.raises(DataError, match=r"prompt, source.*'prompts'"):
        open_captions(tmp_path, caption_column="prompts")
    write_list(tmp_path, [row | {"caption": "x"} for row in rows(3)])
    with pytest.raises(DataError, match="text and caption"):
        open_captions(tmp_path)
    # what one row calls its caption, the others have to call so too
    write_list(tmp_path, [*rows(2, column="a"), *rows(1, 2, column="b")])
    with pytest.raises(DataError, match=r"line 3 .* b: .*'a'"):
        open_captions(tmp_path)
    # a caption that is missing is not made up for by another text
    write_list(tmp_path, [row | {"text": None, "source": "drawn"} for row in rows(3)])
    with pytest.raises(DataError, match=r"line 1 .*'text' is 'None'"):
        open_captions(tmp_path)


def test_several_captions_of_one_image(tmp_path):
    write_images(tmp_path, 2)
    write_list(tmp_path, [row | {"text": [row["text"], "a picture"]} for row in rows(2)])
    assert open_captions(tmp_path).splits["all"].captions == [("grey 0", "a picture"), ("grey 1", "a picture")]


def test_texts_beside_images(tmp_path):
    write_images(tmp_path / "a", 6)
    for i in range(6):
        (tmp_path / "a" / f"{i:03}.txt").write_text(f"grey\n{i}\n")
    (tmp_path / "readme.txt").write_text("about")
    data = open_captions(tmp_path, val_fraction=0.5)
    check(data.splits["all"], 6)
    check(data.splits["val"], 3)
    assert data.notes[0] == "ignored 1 text: readme.txt without an image"
    (tmp_path / "a" / "003.txt").unlink()
    with pytest.raises(DataError, match=r"1 of 6 .*caption.*003\.png.*\.txt"):
        open_captions(tmp_path)
    (tmp_path / "a" / "003.txt").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(DataError, match=r"003\.txt .*UTF-8"):
        open_captions(tmp_path)
    (tmp_path / "a" / "003.txt").write_text(" ")
    assert "1 of 6 captions of the train split are empty" in open_captions(tmp_path).notes
    Image.new("RGB", (4, 4)).save(tmp_path / "a" / "004.jpg")
    with pytest.raises(DataError, match=r"same name.*004\.jpg"):
        open_captions(tmp_path)


def write_splits(folder, way, above=""):
    """Images of two splits under folder/above, with their captions, and a check of what is read."""
    for name, count, start in ((f"{above}train", 4, 0), (f"{above}validation", 2, 50)):
        write_images(folder / name, count, start)
        if way == "a list each":
            write_list(folder / name, rows(count, start))
        if way == "texts":
            for i in range(start, start + count):
                (folder / name / f"{i:03}.txt").write_text(f"grey {i}")
    if way == "one list":
        write_list(folder, [*rows(4, folder=f"{above}train/"), *rows(2, 50, folder=f"{above}validation/")])
    train, val, name = open_captions(folder).for_training()
    check(train, 4)
    check(val, 2)
    assert name == "val"


@pytest.mark.parametrize("way", ["one list", "a list each", "texts"])
def test_splits_are_folders(tmp_path, way):
    write_splits(tmp_path, way)
    if way == "one list":
        write_images(tmp_path, 1)
        write_list(tmp_path, [*rows(4, folder="train/"), *rows(1)])
        with pytest.raises(DataError, match=r"1 image: .*000\.png .*train"):
            open_captions(tmp_path)


@pytest.mark.parametrize("way", ["one list", "a list each", "texts"])
def test_splits_are_folders_at_any_depth(tmp_path, way):
    write_splits(tmp_path, way, above="a/")
    (tmp_path / "a").rename(tmp_path / "test")
    if way == "one list":
        write_list(tmp_path, [*rows(4, folder="test/train/"), *rows(2, 50, folder="test/validation/")])
    splits = open_captions(tmp_path).splits
    assert {name: len(split) for name, split in splits.items()} == {"train": 4, "val": 2}  # all are in `test`


def test_faults_of_lists(tmp_path):
    write_images(tmp_path, 3)
    cases = {
        '{"file_name": "000.png", "text": "a"}\n{"file_name": ': "metadata.jsonl, line 2: ",
        '["000.png", "a"]': "line 1: .*JSON object",
        '{"image": "000.png", "text": "a"}': "image, text: .*file_name",
        '{"file_name": "9.png", "text": "a"}': r"9\.png.*not exist",
        '{"file_name": "../9.png", "text": "a"}': "path inside",
        '{"file_name": "000.png", "text": "a"}\n{"file_name": "000.png", "text": "b"}': "line 2 .* line 1 ",
        '{"file_name": "000.png", "text": 3}': "'text' is '3'",
        '{"file_name": "000.png", "text": []}': "has no caption",
        '{"file_name": "000.png", "text": "a"}': "one image: .*two",
        "\n": "holds no rows",
    }
    for text, message in cases.items():
        (tmp_path / "metadata.jsonl").write_text(text)
        with pytest.raises(DataError, match=message):
            open_captions(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name,text\n000.png,a,b\n")
    with pytest.raises(DataError, match=r"metadata\.csv and metadata\.jsonl"):
        open_captions(tmp_path)
    (tmp_path / "metadata.jsonl").unlink()
    with pytest.raises(DataError, match=r"metadata\.csv, line 2: .*2 values"):
        open_captions(tmp_path)
    (tmp_path / "metadata.csv").rename(tmp_path / "metadata.parquet")
    with pytest.raises(DataError, match=r"metadata\.parquet .*parquet file"):
        open_captions(tmp_path)
    parquet.write_table(pa.table({"file_name": ["000.png"], "text": [b"red"]}), tmp_path / "metadata.parquet")
    with pytest.raises(DataError, match=r"metadata\.parquet, row 1 .*'text' is 'None'"):
        open_captions(tmp_path)
    (tmp_path / "metadata.parquet").rename(tmp_path / "metadata.csv")
    write_images(tmp_path / "more", 1)
    write_list(tmp_path / "more", rows(1))
    with pytest.raises(DataError, match=r"list of captions.*folders"):
        open_captions(tmp_path)


def test_what_is_no_captioned_data(tmp_path):
    with pytest.raises(DataError, match=r"holds nothing.*metadata\.jsonl"):
        open_captions(tmp_path)
    (tmp_path / "notes.doc").write_text("x")
    with pytest.raises(DataError, match=r"1 other thing: notes\.doc"):
        open_captions(tmp_path)
    with pytest.raises(DataError, match="unknown kind"):
        open_captions(tmp_path / "notes.doc")
    with pytest.raises(DataError, match="no /nowhere/at/all"):
        open_captions("/nowhere/at/all")
    write_images(tmp_path, 2)
    with pytest.raises(DataError, match=r"2 of 2 .*caption"):
        open_captions(tmp_path)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "1.png", encoded(1))
    with pytest.raises(DataError, match="tar files and images"):
        open_captions(tmp_path)
    write_images(tmp_path / "b", 2)
    write_list(tmp_path / "b", rows(2))
    with pytest.raises(DataError, match=r"streaming.*`datasets`"):
        open_captions(tmp_path / "b", streaming=True)


# -- shards --


def test_shards(tmp_path):
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard:05}.tar", "w") as tar:
            for i in range(shard * 5, shard * 5 + 5):
                # as img2dataset writes them: the text and more about the image, in any order
                add(tar, f"{i:04}.json", json.dumps({"caption": f"json {i}", "url": "u"}).encode())
                add(tar, f"{i:04}.png", encoded(i))
                add(tar, f"{i:04}.txt", f"grey {i}\n".encode())
        (tmp_path / f"{shard:05}_stats.json").write_text("{}")
        (tmp_path / f"{shard:05}.parquet").write_bytes(b"")
    data = open_captions(tmp_path)
    assert data.kind == "captioned shards" and len(data.splits["all"].shard.unique()) == 2
    check(data.splits["all"], 10)
    check(open_captions(tmp_path / "00001.tar").splits["all"], 5)
    assert open_captions(tmp_path, caption_column="caption").splits["all"].captions[3] == ("json 3",)
    with pytest.raises(DataError, match=r"0000\.json .*caption, url: .*'x'"):
        open_captions(tmp_path, caption_column="x")


def test_faults_of_shards(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "1.png", encoded(1))
    with pytest.raises(DataError, match=r"image 1 .*caption: .*1\.txt or 1\.json"):
        open_captions(tmp_path)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "1.png", encoded(1))
        add(tar, "1.json", b"{")
    with pytest.raises(DataError, match=r"a\.tar, 1\.json .*JSON"):
        open_captions(tmp_path)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "1.png", encoded(1))
        add(tar, "1.json", b'{"texts": "a"}')
    with pytest.raises(DataError, match=r"texts: .*text and caption"):
        open_captions(tmp_path)


# -- what datasets loads --


def table(count, start=0, **columns):
    import datasets

    images = [{"bytes": encoded(i), "path": None} for i in range(start, start + count)]
    texts = {"text": [f"grey {i}" for i in range(start, start + count)]}
    columns = texts | columns
    features = {name: datasets.Value("string") for name in columns}
    features = {
        name: datasets.List(features[name]) if isinstance(v[0], list) else features[name] for name, v in columns.items()
    }
    return datasets.Dataset.from_dict(
        {"image": images} | columns, features=datasets.Features({"image": datasets.Image(), **features})
    )


def test_tables(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    table(6).save_to_disk(tmp_path / "disk")
    data = open_captions(tmp_path / "disk")
    assert data.kind == "captioned datasets"
    check(data.splits["all"], 6)
    table(6, url=["u"] * 6).to_parquet(tmp_path / "two.parquet")
    check(open_captions(tmp_path / "two.parquet").splits["all"], 6)
    table(6, caption=["u"] * 6).to_parquet(tmp_path / "three.parquet")
    with pytest.raises(DataError, match=r"text and caption.*--caption-column"):
        open_captions(tmp_path / "three.parquet")
    check(open_captions(tmp_path / "three.parquet", caption_column="text").splits["all"], 6)
    with pytest.raises(DataError, match=r"column 'image' .*texts"):
        open_captions(tmp_path / "three.parquet", caption_column="image")
    with pytest.raises(DataError, match=r"column 'x'.*image, text, caption"):
        open_captions(tmp_path / "three.parquet", caption_column="x")
    lists = table(3, text=[["a", "b"], ["c"], ["d"]])
    lists.save_to_disk(tmp_path / "lists")
    assert open_captions(tmp_path / "lists").splits["all"].captions == [("a", "b"), ("c",), ("d",)]
    table(3, text=["a", None, "c"]).save_to_disk(tmp_path / "none")
    with pytest.raises(DataError, match=r"1 rows .*no value .*'text'"):
        open_captions(tmp_path / "none")
    table(3, text=[["a", "b"], [], ["d"]]).save_to_disk(tmp_path / "empty")
    with pytest.raises(DataError, match=r"1 rows .*no caption .*'text'"):
        open_captions(tmp_path / "empty")


def test_streams(tmp_path_factory, monkeypatch):
    import datasets

    tmp_path = tmp_path_factory.mktemp("stream")  # datasets takes a folder called test_... for a split

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name, count, start in (("train", 6, 0), ("validation", 2, 50)):
        table(count, start).to_parquet(tmp_path / f"{name}.parquet")
    data = open_captions(tmp_path, streaming=True)
    train, val, _ = data.for_training()
    assert data.fingerprint() == open_captions(tmp_path, streaming=True).fingerprint()
    for split in (train, val):
        loader = make_loader(split, Preprocessing(3, (4, 6), (0.5,) * 3, (0.5,) * 3), 2, train=split is train)
        loader.begin(0)
        for batch in loader:
            for i, image in zip(batch["index"].tolist(), batch["image"], strict=True):
                assert split.captions[i] == (f"grey {int(image[0, 0, 0])}",)
    (tmp_path / "validation.parquet").unlink()
    with pytest.raises(DataError, match=r"held out.*stream"):
        open_captions(tmp_path, streaming=True)


# -- what data are --


def test_another_caption_is_other_data(tmp_path):
    write_images(tmp_path, 5)
    write_list(tmp_path, rows(5))
    first = open_captions(tmp_path).fingerprint()
    (tmp_path / "metadata.jsonl").rename(tmp_path / "kept")
    write_list(tmp_path, rows(5))
    assert open_captions(tmp_path).fingerprint() == first
    write_list(tmp_path, [*rows(4), {"file_name": "004.png", "text": "gray 4"}])
    assert open_captions(tmp_path).fingerprint() != first


def test_batches_know_their_captions(tmp_path):
    write_images(tmp_path, 12)
    write_list(tmp_path, rows(12))
    (tmp_path / "005.png").write_bytes(b"damaged")
    train = open_captions(tmp_path).splits["train"]
    loader = make_loader(train, Preprocessing(3, (4, 4), (0.5,) * 3, (0.5,) * 3), 3, train=True, seed=1)
    loader.begin(2)
    seen = []
    for batch in loader:
        for i, image, label in zip(batch["index"].tolist(), batch["image"], batch["label"], strict=True):
            seen.append(i)
            if label == 0:
                assert train.captions[i] == (f"grey {int(image[0, 0, 0])}",)
    assert len(set(seen)) == len(seen) == 9
    # classes are what they were: captions are no part of them
    write_images(tmp_path / "c" / "one", 3)
    write_images(tmp_path / "c" / "two", 3)
    assert open_data(tmp_path / "c").splits["all"].captions is None
    assert torch.equal(open_data(tmp_path / "c").splits["all"].labels, torch.tensor([0, 0, 0, 1, 1, 1]))
