"""What DATA means where images have masks: layouts, classes, and every kind of pair that does not fit."""

import errno
import io
import json
import math
import struct
import tarfile
import zlib
from unittest.mock import Mock

import numpy as np
import pytest
from helpers.masks import CLASSES, make_masked, pair, save_pair
from PIL import Image

from gspn.data.images import DataError, decode, with_channels
from gspn.data.labelled import Data
from gspn.data.mask_classes import IGNORED, Classes, values_of
from gspn.data.masks import find_classes, open_masked, survey


def masks_of(split, classes):
    return [split.pair(i, classes.numbers)[1] for i in range(len(split))]


def surveyed(path, ignore=("255",)):
    data = open_masked(path)
    train, held_out, name = data.for_training()
    return survey({"train": train, name: held_out}, find_classes(data, None), ignore)


def shards(path, count=6, mask=True):
    path.mkdir()
    with tarfile.open(path / "train-0.tar", "w") as tar:
        for seed in range(count):
            for suffix, pixels in zip(("png", "seg.png"), pair(seed), strict=True):
                file = io.BytesIO()
                Image.fromarray(pixels).save(file, "png")
                if suffix == "png" or mask:
                    info = tarfile.TarInfo(f"{seed:03}.{suffix}")
                    info.size = file.tell()
                    tar.addfile(info, io.BytesIO(file.getvalue()))
    return path


def table(path, count=6):
    import datasets

    columns = {"image": [], "truth": []}
    for seed in range(count):
        for column, pixels in zip(columns.values(), pair(seed), strict=True):
            column.append(Image.fromarray(pixels))
    features = datasets.Features(dict.fromkeys(columns, datasets.Image()))
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)
    return path


def test_every_kind_of_data_holds_the_same_pairs(tmp_path):
    classes = Classes(("a", "b", "c"), (0, 1, 2), ((0, 0, 0),) * 3, (255,))
    expected = [np.where(pair(seed)[1] == 255, IGNORED, pair(seed)[1]) for seed in range(6)]
    for kind, where in {
        "masked folder": make_masked(tmp_path / "folder", 6),
        "masked shards": shards(tmp_path / "shards"),
        "masked datasets": table(tmp_path / "train.parquet"),
    }.items():
        data = open_masked(where)
        whole = data.splits["all"]
        assert data.kind == kind and len(data.splits["val"]) == 1 and len(data.splits["train"]) == 5
        assert all(map(np.array_equal, masks_of(whole, classes), expected)), kind
        assert np.array_equal(np.asarray(whole.image(3)), pair(3)[0])
        part = whole.subset([4, 2])
        assert np.array_equal(masks_of(part, classes)[0], expected[4]) and part.names(1) == whole.names(2)


def test_splits_above_or_below_images(tmp_path):
    for name, where in {"a": "above/train", "b": "above/val"}.items():
        save_pair(tmp_path / where, name, *pair(0))
    for side in ("images", "masks"):
        for split, name in {"train": "x", "test": "y"}.items():
            (tmp_path / "below" / side / split).mkdir(parents=True)
            Image.fromarray(pair(0)[side == "masks"]).save(tmp_path / "below" / side / split / f"{name}.png")
    assert {k: len(v) for k, v in open_masked(tmp_path / "above").splits.items()} == {"train": 1, "val": 1}
    assert {k: len(v) for k, v in open_masked(tmp_path / "below").splits.items()} == {"train": 1, "test": 1}
    save_pair(tmp_path / "above", "c", *pair(0))
    with pytest.raises(DataError, match=r"c\.png.* no split"):
        open_masked(tmp_path / "above")


def test_a_changed_mask_is_another_data_set(tmp_path):
    folder = make_masked(tmp_path / "data", 4)
    before = open_masked(folder).fingerprint()
    assert open_masked(folder).fingerprint() == before
    image, mask = pair(1)
    mask[5] = 2
    save_pair(folder, "01", image, mask)
    assert open_masked(folder).fingerprint() != before


def test_what_is_no_pair_is_an_error_or_a_note(tmp_path):
    folder = make_masked(tmp_path / "data", 4)
    Image.fromarray(pair(0)[1]).save(folder / "masks/lonely.png")
    Image.fromarray(pair(0)[0]).save(folder / "beside.png")
    assert [note.count("lonely.png") + note.count("beside.png") for note in open_masked(folder).left_out] == [1, 1]
    (folder / "masks/02.png").unlink()
    with pytest.raises(DataError, match=r"no mask of 1 image: images/02\.png.*masks/02\.png"):
        open_masked(folder)
    Image.fromarray(pair(2)[1]).save(folder / "masks/02.jpg")
    with pytest.raises(DataError, match=r"1 mask: masks/02\.jpg.*PNG"):
        open_masked(folder)
    (tmp_path / "no").mkdir()
    Image.fromarray(pair(0)[0]).save(tmp_path / "no/a.png")
    with pytest.raises(DataError, match=r"images/ or masks/"):
        open_masked(tmp_path / "no")
    with pytest.raises(DataError, match=r"000 has no mask.*000\.seg\.png"):
        open_masked(shards(tmp_path / "shards", mask=False))
    with pytest.raises(DataError, match="mask_column"):
        open_masked(make_masked(tmp_path / "other", 3), mask_column="truth")


def test_columns_of_tables(tmp_path):
    where = table(tmp_path / "train.parquet", 2)
    assert len(open_masked(where, image_column="truth", mask_column="image").splits["all"]) == 2
    with pytest.raises(DataError, match=r"no column 'mask'.*image, truth"):
        open_masked(where, mask_column="mask")


def test_classes_lie_beside_data_of_every_kind(tmp_path, monkeypatch):
    names = tmp_path / "classes.json"
    names.write_text(json.dumps(CLASSES))
    shards(tmp_path / "shards")
    (tmp_path / "shards/classes.json").write_text(names.read_text())
    tar = tmp_path / "one.tar"
    (tmp_path / "shards/train-0.tar").rename(tar)
    (tmp_path / "shards/train-0.tar").write_bytes(tar.read_bytes())
    table(tmp_path / "rows.parquet")
    monkeypatch.chdir(tmp_path)
    for where, expected in [
        ("one.tar", names),
        ("rows.parquet", names),
        ("shards", tmp_path / "shards/classes.json"),
        (make_masked(tmp_path / "folder", 3), tmp_path / "folder/classes.json"),
    ]:
        assert find_classes(open_masked(where), None) == expected
    asked = []
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "get_hf_file_metadata", lambda url, **_: None)
    monkeypatch.setattr(hub, "hf_hub_download", lambda *what, **how: asked.append((what, how)) or str(names))
    remote = Data("masked datasets", "someone/streets", {}, [])
    assert find_classes(remote, None) == names
    assert asked == [(("someone/streets", "id2label.json"), {"repo_type": "dataset", "local_files_only": False})]
    assert surveyed(tar).classes.names == ("ground", "disc", "square")


@pytest.mark.parametrize("reachable", [True, False])
def test_no_classes_on_the_hub(monkeypatch, tmp_path, reachable):
    hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def metadata(url, **_):
        if not reachable:
            raise OSError("no network")

    def download(*_, local_files_only, **__):
        assert local_files_only != reachable  # so that nothing waits for a hub out of reach
        raise LocalEntryNotFoundError("not kept") if local_files_only else EntryNotFoundError("no such file")

    monkeypatch.chdir(tmp_path)
    (tmp_path / "classes.json").write_text(json.dumps(CLASSES))  # not what lies here
    monkeypatch.setattr(hub, "get_hf_file_metadata", metadata)
    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert find_classes(Data("masked datasets", "a-name-on-the-hub", {}, []), None) is None


def test_a_file_on_the_hub_that_does_not_come_is_an_error(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub.errors import LocalEntryNotFoundError

    monkeypatch.setattr(hub, "get_hf_file_metadata", lambda url, **_: None)
    for problem in (OSError("503"), LocalEntryNotFoundError("the connection was lost")):

        def download(*_, problem=problem, **__):
            raise problem

        monkeypatch.setattr(hub, "hf_hub_download", download)
        with pytest.raises(DataError, match=f"id2label.json of someone/streets .*{problem}.*--classes"):
            find_classes(Data("masked datasets", "someone/streets", {}, []), None)


def test_pairs_that_do_not_fit_name_file_and_value(tmp_path):
    image, mask = pair(0)
    wrong = np.array(mask)
    wrong[3, :4] = 9
    for name, bad, message in [
        ("size", mask[:-1], r"images/zz\.png is 32x24 .* mask 32x23"),
        ("value", wrong, r"images/zz\.png holds 1 value: 9 \(4 pixels\).*0 ground, 1 disc, 2 square.*255.*--ignore"),
        ("colour", Image.fromarray(image), r"images/zz\.png is in colours without a palette.*RGB.*grey"),
    ]:
        folder = make_masked(tmp_path / name, 3)
        save_pair(folder, "zz", image, bad)
        with pytest.raises(DataError, match=message):
            surveyed(folder)


def test_survey_counts_and_takes_the_values_as_classes_without_names(tmp_path):
    folder = make_masked(tmp_path / "data", 5, classes=None)
    found = surveyed(folder)
    data = open_masked(folder)
    expected = sum(np.bincount(pair(i)[1].ravel(), minlength=256) for i in range(5))
    assert found.classes.names == ("0", "1", "2") and not found.classes.named
    assert np.array_equal(sum(found.pixels.values()), expected[:3])
    assert found.sizes == {(24, 32): len(data.splits["train"])} and not found.notes()
    assert surveyed(folder, ("255", "1")).classes.names == ("0", "2")
    with pytest.raises(DataError, match="void"):
        surveyed(folder, ("void",))


def test_a_class_with_the_value_that_is_ignored_by_default_is_not_lost(tmp_path):
    folder = tmp_path / "data"
    for seed in range(4):
        image, mask = pair(seed)
        save_pair(folder, f"{seed}", image, np.where(mask == 1, 255, 0).astype(np.uint8))  # as tools write two classes
    with pytest.raises(DataError, match=r"0 and 255 only.*--ignore"):
        surveyed(folder, None)
    assert surveyed(folder, ()).classes.values == (0, 255)
    with pytest.raises(DataError, match=r"the masks .* hold 1 class .* ignored values, '0'; expected 2 .* background"):
        surveyed(folder, ("255",))
    (folder / "classes.json").write_text(json.dumps({"0": "ground", "255": "disc"}))
    with pytest.raises(DataError, match=r"'disc' has the value 255.*--ignore"):
        surveyed(folder, None)
    found = surveyed(folder, ())
    assert found.classes.names == ("ground", "disc") and found.classes.ignored == () and not found.notes()
    assert surveyed(make_masked(tmp_path / "three", 3), None).classes.ignored == (255,)


def test_a_class_without_a_pixel_is_noted(tmp_path):
    notes = surveyed(make_masked(tmp_path / "data", 4, [*CLASSES, "unicorn"])).notes()
    assert len(notes) == 2 and all("unicorn" in note for note in notes) and "not a number" in notes[1]


def test_an_unreadable_mask_is_left_out_of_the_survey_and_named(tmp_path):
    folder = make_masked(tmp_path / "data", 4)
    file = folder / "masks/02.png"
    file.write_bytes(file.read_bytes()[:60])
    surveyed(folder)
    assert "mask of" in open_masked(folder).splits["all"].problem(2) and "02" in open_masked(folder).splits[
        "all"
    ].names(2)
    for file in (folder / "masks").iterdir():
        file.write_bytes(b"no")
    with pytest.raises(DataError, match="none of 3 pairs"):
        surveyed(folder)


def test_classes_from_json(tmp_path):
    file = tmp_path / "classes.json"
    for content, names, values in [
        (["a", "void", "b"], ("a", "b"), (0, 2)),
        ({"7": "a", "300": "b"}, ("a", "b"), (7, 300)),
        ([{"name": "a", "value": 4}, {"name": "b", "value": 1}], ("a", "b"), (4, 1)),
    ]:
        file.write_text(json.dumps(content))
        classes = Classes.read(file, ("255", "void") if "void" in content else ("255",))
        assert (classes.names, classes.values) == (names, values) and Classes(**classes.to_json()) == classes
        mask = np.array([[values[1], values[0], 255]], np.uint16)
        assert classes.numbers(Image.fromarray(mask)).tolist() == [[1, 0, IGNORED]]
    for content, message in [
        (["a", "a"], "name: a"),
        ([{"name": "a", "value": 1}, {"name": "b", "value": 1}], "value: 1"),
        ([3], "classes"),
        ([{"name": "a", "color": [1, 2]}], "color"),
        ([], r"classes\.json holds 0 classes .*; expected 2 to 255"),
        (["a"], r"classes\.json holds 1 class .*, 'a'; expected 2 to 255\. A background is a class too"),
        ([f"{i}" for i in range(256)], r"holds 256 classes beside the ignored values; expected 2 to 255$"),
        ([{"name": "a", "value": 1.7}], r"the value 1\.7, expected a whole number from 0 to 65535"),
        ([{"name": "a", "value": math.inf}], "the value inf"),
        ([{"id": 0, "name": "sky"}, {"id": 2, "name": "tree"}], "no key 'id'; there are name, value, color"),
        ([{"name": "a", "colour": "#ff0000"}], "no key 'colour', did you mean 'color'"),
        ("abc", "does not hold classes, but 'abc': expected a list"),
        (3, "does not hold classes, but '3'"),
    ]:
        file.write_text(json.dumps(content))
        with pytest.raises(DataError, match=message):
            Classes.read(file, ())
    file.write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        Classes.read(file, ())


def test_a_file_of_classes_that_begins_with_a_mark(tmp_path):
    (tmp_path / "classes.json").write_text('["a", "b"]', encoding="utf-8-sig")
    assert Classes.read(tmp_path / "classes.json", ()).names == ("a", "b")


def grey_png(values, bits, chunks=()):
    """A grey PNG of (H, W) values of few bits, which Pillow does not write; `chunks` (name, content) before them."""
    width = 8 // bits * -(-values.shape[1] * bits // 8)
    padded = np.pad(values, ((0, 0), (0, width - values.shape[1])))
    rows = np.packbits(np.unpackbits(padded[..., None], axis=2)[..., 8 - bits :].reshape(len(values), -1), axis=1)
    header = struct.pack(">IIBBBBB", *values.shape[::-1], bits, 0, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    joined = [struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(joined)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_grey_masks_of_few_bits_have_the_values_of_their_files(tmp_path, bits):
    values = (np.arange(24 * 31).reshape(24, 31) % min(2**bits, 200)).astype(np.uint8)
    content = grey_png(values, bits)
    assert np.array_equal(values_of(decode(io.BytesIO(content))), values)
    orientation = b"MM\0*" + struct.pack(">IHHHIIH", 8, 1, 0x0112, 3, 1, 6 << 16, 0) + bytes(2)
    turned = decode(io.BytesIO(grey_png(values, bits, [(b"eXIf", orientation)])))
    assert np.array_equal(values_of(turned), np.rot90(values, -1))
    seen = np.asarray(with_channels(decode(io.BytesIO(content)), 1))  # as an image it has its full range
    assert np.array_equal(seen, values.astype(int) * (255 // (2**bits - 1)))
    for seed in range(3):
        save_pair(tmp_path, f"{seed}", pair(0, 24, 31)[0], pair(0, 24, 31)[1])
        (tmp_path / "masks" / f"{seed}.png").write_bytes(content)
    assert surveyed(tmp_path).classes.values == tuple(range(min(2**bits, 200)))


def test_a_survey_does_not_count_what_the_machine_lacks(tmp_path):
    split = open_masked(make_masked(tmp_path, 4)).splits["all"]
    split.masks = Mock(side_effect=OSError(errno.ENFILE, "too many open files"))
    with pytest.raises(OSError, match="too many open files"):
        survey({"train": split}, None, ("255",))


def test_palettes_give_colours_and_masks_keep_their_values():
    mask = Image.fromarray(np.array([[0, 5, 255]], np.uint8))
    mask.putpalette([value for i in range(256) for value in (i, 2 * i % 256, 7)])
    classes = Classes.of_values([0, 5, 255], (255,), mask)
    assert classes.colours == ((0, 0, 7), (5, 10, 7)) and classes.values == (0, 5)
    picture = classes.picture(classes.numbers(mask)[:, :2])
    assert picture.mode == "P" and np.asarray(picture).tolist() == [[0, 5]]
    assert picture.convert("RGB").getpixel((1, 0)) == (5, 10, 7)
    many = Classes.of_values(range(100), ())
    assert len(set(many.colours)) == 100
