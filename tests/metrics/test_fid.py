"""`gspn fid`: what is compared, the command, several processes."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.comparing import (
    NAMES,
    as_npz,
    classifier_run,
    colour_extractor,
    colour_features,
    compare,
    looked_at,
    paint,
    paint_both,
)
from PIL import Image
from typer.testing import CliRunner

from gspn.cli import app
from gspn.data import tables
from gspn.data.images import DataError
from gspn.metrics import image_statistics
from gspn.metrics.distances import frechet_distance, kernel_distance, precision_recall
from gspn.metrics.image_sets import open_images
from gspn.options import OptionError
from gspn.train.run import RunError


@pytest.fixture
def pictures(tmp_path):
    return paint_both(tmp_path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return classifier_run(tmp_path_factory.mktemp("runs") / "run")


# -- images, compared by their colours --


def test_comparing_two_folders(pictures):
    result = compare(pictures.drawn, pictures.real, split="all", samples_split="all")
    x, y = map(colour_features, pictures.images)
    expected = frechet_distance(x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))
    assert result["frechet_distance"] == pytest.approx(expected, rel=1e-6) and expected > 0.1
    x, y = map(torch.from_numpy, (x, y))
    assert result["kernel_distance"]["mean"] == pytest.approx(kernel_distance(x.float(), y.float())[0], rel=1e-6)
    assert (result["precision"], result["recall"]) == precision_recall(x.float(), y.float())
    assert result["accuracy"] == result["reference_accuracy"] == 1 and result["score"]["mean"] > 1.5
    assert result["samples"] == {"where": str(pictures.drawn), "split": "all", "images": 36, "unreadable": 0}
    assert result["reference"]["images"] == 60 and result["size"] == [10, 8]
    assert result["names"]["frechet_distance"] == "Frechet distance (colours)"
    assert "FID" not in json.dumps(result) and "Inception" not in json.dumps(result)


def test_the_training_images_are_the_reference_and_evaluation_s_the_samples(pictures):
    result = compare(pictures.real, pictures.real)
    assert (result["samples"]["split"], result["reference"]["split"]) == ("all", "train")
    assert (result["samples"]["images"], result["reference"]["images"]) == (60, 54)
    told = [note for note in result["notes"] if "no evaluation split" in note]
    assert [note.partition(":")[0] for note in told] == ["the samples", "the reference"]
    assert "all 60 images" in told[0] and "for training" in told[0] and "54 of 60 images, those for training" in told[1]
    chosen = compare(pictures.real, pictures.real, samples_split="val", split="train")["notes"]
    assert sum("6 of 60 images are held out" in note for note in chosen) == 2
    with pytest.raises(DataError, match="split 'test'"):
        compare(pictures.drawn, pictures.real, split="test")


def test_labels_count_only_against_the_classifier_s_own_names(pictures):
    (pictures.drawn / "green").rename(pictures.drawn / "violet")
    result = compare(pictures.drawn, pictures.real)
    assert result["accuracy"] is None and result["reference_accuracy"] == 1
    assert any("no accuracy on the samples" in note and "violet" in note for note in result["notes"])
    assert compare(pictures.drawn, pictures.real, colour_extractor(class_names=None))["accuracy"] is None
    turned = compare(pictures.real, pictures.real, colour_extractor(class_names=["red", "green", "blue"]))
    assert turned["accuracy"] == pytest.approx(1 / 3)


def test_folders_of_files_and_arrays_are_the_same_images(pictures):
    flat = pictures.at / "flat"
    flat.mkdir()
    for i, pixels in enumerate(pictures.images[0]):
        Image.fromarray(pixels).save(flat / f"{i:03}.png")
    labels = np.repeat(np.arange(3), 12)
    stored = as_npz(pictures.at / "stored.npz", pictures.images[0], arr_1=labels)
    packed = as_npz(pictures.at / "packed.npz", pictures.images[0], np.savez_compressed)
    results = [compare(each, pictures.real) for each in (flat, stored, packed)]
    classes = compare(pictures.drawn, pictures.real, samples_split="all")
    for result in results:
        assert result["frechet_distance"] == classes["frechet_distance"]
        assert result["samples"]["split"] is None and result["samples"]["images"] == 36
    assert [result["accuracy"] for result in results] == [None, 1, None]
    assert any("numbers of classes" in note for note in results[1]["notes"])
    with pytest.raises(OptionError, match=r"splits.*'train'"):
        compare(flat, pictures.real, samples_split="train")
    (flat / "more").mkdir()
    Image.fromarray(pictures.images[0][0]).save(flat / "more" / "a.png")
    with pytest.raises(DataError, match=r"images and folders .*\(more\)"):
        compare(flat, pictures.real)


def test_arrays_that_cannot_be_used(pictures):
    at, images = pictures.at, pictures.images[0]
    good = as_npz(at / "good.npz", images)
    broken = {
        "cut.npz": "npz",
        "float.npz": r"arr_0 .*float64 \(36, 10, 8, 3\)",
        "four.npz": r"uint8 \(36, 10, 8, 4\)",
        "other.npz": "1 array: images",
        "labels.npz": r"arr_1 .*int64 \(3,\)",
        "absent.npz": r"no .*absent\.npz",
    }
    (at / "cut.npz").write_bytes(good.read_bytes()[:-500])
    np.savez(at / "float.npz", images / 255)
    np.savez(at / "four.npz", np.concatenate([images, images[..., :1]], 3))
    np.savez(at / "other.npz", images=images)
    np.savez(at / "labels.npz", images, np.arange(3))
    for name, message in broken.items():
        with pytest.raises(DataError, match=message):
            compare(at / name, pictures.real)


def _marked(path, at, value):
    """Sets two bytes at `at` after the start of the headers of arr_0: that of the member, and in the directory."""
    data = bytearray(path.read_bytes())
    for start, shift in ((data.find(b"PK\3\4"), 0), (data.find(b"PK\1\2"), 2)):
        data[start + shift + at : start + shift + at + 2] = value.to_bytes(2, "little")
    path.write_bytes(data)


def _rewritten(path, change):
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, change(data) if name == "arr_0.npy" else data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: _marked(path, 6, 1), "encrypted"),
        (lambda path: _marked(path, 8, 99), "compression"),
        (lambda path: _rewritten(path, lambda data: data.replace(b"(36, 10", b"((36,10")), "damaged"),
        (
            lambda path: _rewritten(path, lambda data: data[:-240]),
            r"arr_0 \(36, 10, 8, 3\) has 8400 bytes, expected 8640",
        ),
        (lambda path: np.savez(path, np.zeros((36, 0, 8, 3), np.uint8)), r"arr_0 .*uint8 \(36, 0, 8, 3\); expected"),
    ],
)
def test_damaged_arrays(pictures, damage, message):
    path = as_npz(pictures.at / "a.npz", pictures.images[0], arr_1=np.repeat(np.arange(3), 12))
    damage(path)
    with pytest.raises(DataError, match=message):
        compare(path, pictures.real)


def test_names_of_the_classes_of_arrays(pictures):
    """Their numbers are not the network's."""
    arrays = as_npz(pictures.at / "a.npz", pictures.images[0], arr_1=np.repeat([2, 0, 1], 12))
    result = compare(arrays, arrays, class_names=("green", "red", "blue"))
    assert result["accuracy"] == 1 and not any("numbers of classes" in note for note in result["notes"])
    with pytest.raises(DataError, match="from 0 to 2, but 2 class names"):
        compare(arrays, arrays, class_names=("green", "red"))


@pytest.mark.parametrize("option", ["class_names", "image_column", "label_column", "streaming"])
def test_options_that_apply_to_neither_set(pictures, option):
    arrays = as_npz(pictures.at / "a.npz", pictures.images[0])
    (pictures.at / "flat").mkdir()
    for i, pixels in enumerate(pictures.images[1]):
        Image.fromarray(pixels).save(pictures.at / "flat" / f"{i:03}.png")
    extractor, given = colour_extractor(), {option: NAMES if option == "class_names" else "x"}
    with pytest.raises(OptionError, match=rf"{option} cannot apply to .*a\.npz or .*flat"):
        compare(arrays, pictures.at / "flat", extractor, **given)
    assert looked_at(extractor) == 0
    if option == "class_names":  # one of the two sets is enough
        assert compare(arrays, pictures.real, extractor, **given)["reference_accuracy"] == 1


def test_the_folder_of_gspn_sample(pictures):
    folder = pictures.at / "samples"
    (folder / "images").mkdir(parents=True)
    about = {"format": 1, "settings": {"seed": 0}, "count": 6, "classes": [2, 0], "class_names": ["a", "blue", "red"]}
    about["class_names"] = ["green", "blue", "red"]
    (folder / "samples.json").write_text(json.dumps(about))
    Image.new("RGB", (300, 200)).save(folder / "grid.png")  # which is no sample
    for i in range(6):
        name, place = ("red", 24) if i % 2 == 0 else ("green", 12)
        Image.fromarray(pictures.images[0][place + i]).save(folder / "images" / f"{i:06}-{name}.png")
    result = compare(folder, pictures.real)
    assert result["samples"]["images"] == 6 and result["accuracy"] == 1
    (folder / "images" / "000003-green.png").unlink()
    with pytest.raises(RunError, match="1 of 6 samples"):
        compare(folder, pictures.real)


def test_other_sizes_are_resized_to_the_reference_s(pictures):
    paint(pictures.at / "large", 1, scale=2)  # the pictures of `drawn`, every pixel four times
    extractor = colour_extractor()
    large = compare(pictures.at / "large", pictures.real, extractor, samples_split="all")
    assert {shape[2:] for shape in extractor.network.seen} == {(10, 8)}
    small = compare(pictures.drawn, pictures.real, samples_split="all")
    assert large["accuracy"] == 1 and large["size"] == [10, 8] and "as they are" in large["resized"]
    assert large["frechet_distance"] == pytest.approx(small["frechet_distance"], rel=0.5)
    compare(pictures.drawn, pictures.real, extractor, size=(5, 6))
    assert extractor.network.seen[-1][2:] == (5, 6)
    Image.new("RGB", (9, 9)).save(pictures.real / "blue" / "00.png")
    with pytest.raises(OptionError, match=r"2 sizes: 9x9, 10x8.*--size HxW"):
        compare(pictures.drawn, pictures.real, split="all")


def test_unreadable_images_are_named_and_left_out_or_refused(pictures):
    whole = compare(pictures.drawn, pictures.real, samples_split="all")
    bad = pictures.drawn / "green" / "03.png"
    bad.write_bytes(bad.read_bytes()[:60])
    result = compare(pictures.drawn, pictures.real, samples_split="all")
    assert result["samples"]["unreadable"] == 1 and result["accuracy"] == 1
    assert any(str(bad) in note for note in result["notes"])
    x, y = map(colour_features, (np.delete(pictures.images[0], 15, 0), pictures.images[1]))
    reference = open_images(pictures.real, None, "train").split
    y = colour_features(np.stack([np.asarray(reference.image(i)) for i in range(len(reference))]))
    expected = frechet_distance(x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))
    assert result["frechet_distance"] == pytest.approx(expected, rel=1e-6) != whole["frechet_distance"]
    for cache in (None, pictures.at / "cache"):
        with pytest.raises(DataError, match=r"--strict.*green/03\.png"):
            compare(pictures.drawn, pictures.real, samples_split="all", strict=True, cache=cache)


def test_strict_refuses_statistics_that_were_made_without_an_image(pictures, monkeypatch):
    bad = pictures.real / "green" / "03.png"
    bad.write_bytes(bad.read_bytes()[:60])
    extractor, cache, file = colour_extractor(), pictures.at / "cache", pictures.at / "real.safetensors"
    arguments = dict(split="all", cache=cache)
    first = compare(pictures.drawn, pictures.real, extractor, **arguments, save=file)
    looked_at(extractor)
    again = compare(pictures.drawn, pictures.real, extractor, **arguments)
    assert again == first and looked_at(extractor) == first["samples"]["images"]
    assert sum(str(bad) in note for note in again["notes"]) == 1  # named also where it was not read again
    message = r"\(--strict\): 1 of 60 .*"
    with pytest.raises(DataError, match=message + r"green/03\.png"):
        compare(pictures.drawn, pictures.real, extractor, **arguments, strict=True)
    with pytest.raises(DataError, match=message + r"real\.safetensors"):
        compare(pictures.drawn, file, extractor, strict=True)
    assert not looked_at(extractor)


def test_too_few_images_are_told(pictures):
    few = as_npz(pictures.at / "few.npz", pictures.images[0][:5])
    result = compare(few, pictures.real)
    (note,) = (note for note in result["notes"] if "too few" in note)
    assert "samples: 5 images are too few for 6 features" in note and "rank of at most 4" in note
    assert not any("too few" in note for note in compare(pictures.drawn, pictures.real)["notes"])
    two = compare(as_npz(few, pictures.images[0][:2]), pictures.real)
    assert two["precision"] is None and two["frechet_distance"] > 0
    with pytest.raises(DataError, match="1 of 1 images"):
        compare(as_npz(few, pictures.images[0][:1]), pictures.real)


@pytest.mark.parametrize(("count", "scored"), [(10, False), (19, False), (20, True)])
def test_a_score_of_too_few_images_is_left_out(pictures, count, scored):
    """In a part of one image it is 1, whatever the image."""
    few = as_npz(pictures.at / "few.npz", pictures.images[0][:count], arr_1=np.zeros(count, int))
    result = compare(few, as_npz(pictures.at / "real.npz", pictures.images[1]))
    assert (result["score"] is not None) == scored and result["reference_score"]["mean"] > 1
    notes = [note for note in result["notes"] if "no score" in note]
    told = f"no score of the samples: it takes two images in each of 10 parts, of {count}"
    assert notes == ([] if scored else [told])


def test_other_classes_are_told(pictures):
    def told(samples, reference, **more):
        notes = compare(samples, reference, **{"samples_split": "all"} | more)["notes"]
        return [
            note for note in notes if ("classes" in note and "accuracy" not in note) or note.startswith("no samples")
        ]

    assert told(pictures.drawn, pictures.real) == []
    (pictures.drawn / "green").rename(pictures.at / "green")
    (note,) = told(pictures.drawn, pictures.real, save=pictures.at / "real.safetensors")
    assert "not of the same classes" in note and note.endswith("no samples of 1 class: green")
    assert told(pictures.drawn, pictures.at / "real.safetensors") == [note]
    (pictures.at / "green").rename(pictures.drawn / "violet")
    (note,) = told(pictures.drawn, pictures.real)
    assert note.endswith("no samples of 1 class: green; no reference images of 1 class: violet")
    for folder in (pictures.drawn / "violet", pictures.real / "green"):
        folder.rename(pictures.at / folder.name)
    assert told(pictures.drawn, pictures.real) == ["no samples of 1 class: green that colours knows"]


def test_a_stream_is_read_once(pictures, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", pictures.at / "cache of datasets")
    monkeypatch.setattr(image_statistics, "SAVE_EVERY", 0)
    rows = {"image": [Image.fromarray(pixels) for pixels in pictures.images[1]], "label": np.repeat(np.arange(3), 20)}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    for split in ("train", "test"):
        file = pictures.at / "tables" / f"{split}.parquet"
        file.parent.mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(file)
    opened, shard = [], tables.Stream._shard

    def opening(stream, *more):
        opened.append(more)
        return shard(stream, *more)

    monkeypatch.setattr(tables.Stream, "_shard", opening)
    samples = as_npz(pictures.at / "samples.npz", pictures.images[0])
    for names in (NAMES, None):
        whole = compare(samples, file.parent, colour_extractor(class_names=names))
        extractor, cache = colour_extractor(class_names=names), pictures.at / f"cache of {names}"
        extractor.network.stop = 2
        with pytest.raises(KeyboardInterrupt):
            compare(samples, file.parent, extractor, cache=cache, streaming=True)
        extractor.network.stop = None
        assert compare(samples, file.parent, extractor, cache=cache, streaming=True) == whole
        assert looked_at(extractor) == 36 + 60  # each image once
    assert len(opened) == 2 * 2 * 4  # for the size, the digest of each of the two splits, the features


def test_latents_are_no_images(pictures):
    (pictures.at / "latents").mkdir()
    (pictures.at / "latents" / "config.json").write_text('{"kind": "latents"}')
    for sets in ((pictures.at / "latents", pictures.real), (pictures.drawn, pictures.at / "latents")):
        with pytest.raises(DataError, match=r"latents.*gspn encode.*gspn train-diffusion"):
            compare(*sets)


# -- the command, and several processes --


def test_the_command(pictures, run, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: pictures.at)
    monkeypatch.chdir(run.path.parent)
    arguments = ["fid", str(pictures.drawn), "--reference", str(pictures.real), "--workers", "0"]
    arguments += ["--features", "classifier:run", "--split", "all", "--samples-split", "all"]
    told = CliRunner().invoke(app, [*arguments, "--out", str(pictures.at / "result.json"), "--size", "9x7"])
    assert told.exit_code == 0, told.output
    text = " ".join(told.output.split())
    assert "36 against 60" in text and "9x7" in text and "accuracy (classifier:run)" in text and "FID" not in text
    result = json.loads((pictures.at / "result.json").read_text())
    assert result["size"] == [9, 7] and len(list((pictures.at / ".cache/gspn/fid").glob("*.safetensors"))) == 1
    printed = CliRunner().invoke(app, [*arguments, "--json", "--no-cache"])
    assert json.loads(printed.stdout.splitlines()[0])["frechet_distance"] > 0
    for wrong, message in (
        (["--cache", "x", "--no-cache"], "--no-cache"),
        (["--size", "a"], "--size"),
        (["--features", "vgg"], "'vgg'"),
    ):
        failed = CliRunner().invoke(app, [*arguments, *wrong])
        assert failed.exit_code == 2 and message in failed.output


@pytest.mark.slow
def test_two_processes_are_as_one(pictures, run):
    arguments = [str(pictures.drawn), "--reference", str(pictures.real), "--features", f"classifier:{run.path}"]
    arguments += ["--workers", "0", "--samples-split", "all", "--batch-size", "8"]
    one = CliRunner().invoke(app, ["fid", *arguments, "--json", "--no-cache"])
    file = pictures.at / "two.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "gspn", "fid", *arguments, "--cache", str(pictures.at / "cache"), "--out", str(file)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    one, two = json.loads(one.stdout.splitlines()[0]), json.loads(file.read_text())
    assert two["samples"] == one["samples"] and two["reference"] == one["reference"]
    assert two["frechet_distance"] == pytest.approx(one["frechet_distance"], rel=1e-5)
    assert two["accuracy"] == one["accuracy"] and two["precision"] == one["precision"]
