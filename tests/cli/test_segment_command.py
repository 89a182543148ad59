"""`gspn train-segmentation`, `eval` and `segment`, as a user meets them."""

import json

import numpy as np
import pytest
from helpers.masks import FLAGS, make_masked, pair, save_pair
from PIL import Image
from typer.testing import CliRunner

from gspn import plots, plots_masks
from gspn.cli import app
from gspn.data.images import decode
from gspn.models import Segmenter, tiles
from gspn.options.segment import parse_ignored, parse_memory
from gspn.runs import Segmentation, load_segmenter
from gspn.train.run import Run


def gspn_command(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def run(masked_run):
    return masked_run.path


def test_training_resuming_and_the_same_options_again(masked, tmp_path, monkeypatch):
    for module, name in ((plots, "curves"), (plots_masks, "pixel_confusion")):  # longer than the training
        monkeypatch.setattr(module, name, lambda *args: None)
    path, again = tmp_path / "run", tmp_path / "again"
    flags = ["--epochs", 2, "--batch-size", 4, "--lr", 0.01, "--workers", 0, "--precision", "bf16"]
    code, out, err = gspn_command("train-segmentation", masked, "--out", path, *flags, *FLAGS)
    assert code == 0, err
    assert "18 training and 2 val images with masks of 3 classes" in out and "crops of 24x32" in out
    assert out.count("mean IoU") == 2 and "predictions.png" in out
    code, out, _ = gspn_command("train-segmentation", "--resume", path)
    assert code == 0 and "nothing is left to do" in out
    (masked / "classes.json").rename(tmp_path / "classes.json")
    try:
        flags = ["--out", again, "--epochs", 1, "--classes", tmp_path / "classes.json"]
        code, _, err = gspn_command("train-segmentation", "--config", path / "options.yaml", *flags)
    finally:
        (tmp_path / "classes.json").rename(masked / "classes.json")
    assert code == 0, err
    one, other = (Run.open(each).config for each in (path, again))
    assert one["classes"] == other["classes"]
    assert other["options"] | {"epochs": 2, "classes": None} == one["options"]


def test_eval_goes_by_the_task_of_the_run(run, masked, tmp_path):
    code, out, err = gspn_command("eval", run, masked, "--workers", 0, "--json")
    assert code == 0, err
    assert json.loads(out)["miou"] == pytest.approx(max(row["miou"] for row in Run.open(run).metrics))
    code, out, _ = gspn_command("eval", run, masked, "--workers", 0, "--out", tmp_path / "out")
    assert code == 0 and all(word in out for word in ("mean IoU", "boundary F1", "IoU disc", "evaluation.json"))
    code, _, err = gspn_command("eval", run, masked, "--out", tmp_path / "out")
    assert code == 2 and "there already" in err
    code, _, err = gspn_command("eval", run, masked, "--sizes", "20")
    assert code == 2 and "--sizes" in err and "segmentation" in err
    code, _, err = gspn_command("eval", run, tmp_path / "nothing")
    assert code == 2 and "nothing" in err


def test_eval_with_an_unknown_value_names_no_option_that_it_lacks(run, tmp_path):
    folder = make_masked(tmp_path / "data", 3)
    image, mask = pair(9)
    save_pair(folder, "zz", image, np.where(mask == 1, 9, mask).astype(np.uint8))
    code, _, err = gspn_command("eval", run, folder, "--split", "all", "--workers", 0)
    told = " ".join(err.split())
    assert code == 2 and "holds 1 value: 9" in told and "Correct the mask: give these pixels one of these" in told
    assert "--classes" not in told and "--ignore" not in told


def test_eval_of_a_classifier_has_no_options_of_segmentation(tmp_path):
    Run.create(tmp_path / "run", {"task": "classification"})
    code, _, err = gspn_command("eval", tmp_path / "run", "digits", "--scale", 2)
    assert code == 2 and "--scale" in err and "classification" in err


def test_segment_writes_masks_and_overlays_and_tells_shares(run, masked, tmp_path, monkeypatch):
    monkeypatch.setattr(tiles, "WORKSPACE", 0)  # it is much more than this small model takes
    large = tmp_path / "large.jpg"
    Image.fromarray(pair(5, 150, 210)[0]).save(large)
    out = tmp_path / "out"
    code, text, err = gspn_command("segment", run, masked / "images/00.png", large, "--out", out, "--json")
    assert code == 0, err
    small, big = json.loads(text)
    assert small["size"] == [24, 32] and big["size"] == [150, 210] and "in one go" in big["how"]
    mask = Image.open(big["mask"])
    assert mask.mode == "P" and mask.size == (210, 150)
    values, counts = np.unique(np.asarray(mask), return_counts=True)
    shares = {name: share for name, share in big["classes"].items() if share}
    assert sum(shares.values()) == pytest.approx(1) and len(shares) == len(values)
    assert sorted(shares.values()) == pytest.approx(sorted((counts / counts.sum()).tolist()))
    overlay = Image.open(big["overlay"])
    assert overlay.height >= 150 and overlay.width > 210  # the legend is beside it
    code, _, err = gspn_command("segment", run, large, "--out", out)
    assert code == 2 and "there already" in err
    code, text, _ = gspn_command("segment", run, large, "--out", out, "--overwrite", "--max-memory", "2.5MB")
    assert code == 0 and "overlapping tiles" in text
    code, _, err = gspn_command("segment", run, large, "--out", out, "--overwrite", "--max-memory", "100KB")
    assert code == 2 and "150x210 does not fit" in err and "--max-memory" in err


@pytest.mark.parametrize(
    "error", [ValueError("150x210 does not fit"), RuntimeError("CUDA out of memory: does not fit")]
)
def test_an_image_that_does_not_fit_leaves_the_others(run, masked, tmp_path, monkeypatch, error):
    def numbers(self, image, *more):
        if image.height == 150:
            raise error
        return original(self, image, *more)

    original = Segmentation.numbers
    monkeypatch.setattr(Segmentation, "numbers", numbers)
    large = tmp_path / "large.png"
    Image.new("RGB", (210, 150)).save(large)
    code, text, err = gspn_command("segment", run, large, masked / "images/00.png", "--out", tmp_path / "out", "--json")
    first, second = json.loads(text)
    assert code == 1 and "does not fit (--max-memory)" in first["error"] and second["size"] == [24, 32]
    assert "1 of 2 images could not be segmented" in err and "does not fit" in err


def test_pictures_of_16_bit_images_are_not_white(run, tmp_path):
    dark = tmp_path / "dark.png"
    Image.fromarray(np.full((24, 32), 40 * 257, np.uint16)).save(dark)
    assert gspn_command("segment", run, dark, "--out", tmp_path, "--json")[0] == 0
    colours = load_segmenter(run).classes.coloured(load_segmenter(run).numbers(decode(dark)))
    laid = np.asarray(Image.open(tmp_path / "dark-overlay.png"))[:24, :32]
    assert abs(laid.astype(int) - (40 + colours.astype(int)) // 2).max() <= 1


def test_segment_names_what_it_cannot_read(run, masked, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    images = [masked / "images/00.png", bad, tmp_path / "none.png"]
    code, out, err = gspn_command("segment", run, *images, "--out", tmp_path / "out", "--json")
    assert code == 1 and [("error" in each) for each in json.loads(out)] == [False, True, True]
    assert "bad.png" in err and "none.png" in err and "2 of 3" in err
    code, _, err = gspn_command("segment", run, *images, "--out", tmp_path / "strict", "--strict")
    assert code == 2 and "none.png" in err
    code, _, err = gspn_command("segment", run, masked / "images/00.png", masked / "masks/00.png")
    assert code == 2 and "same name" in err


def test_strict_stops_at_the_first_image_that_cannot_be_read(run, masked, tmp_path, monkeypatch):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    images = [masked / "images/00.png", bad, masked / "images/01.png"]
    code, _, err = gspn_command("segment", run, *images, "--out", tmp_path / "out", "--strict")
    assert code == 2 and "1 of 3 images could not be segmented" in err and str(bad) in err
    assert [file.name for file in sorted((tmp_path / "out").iterdir())] == ["00-mask.png", "00-overlay.png"]

    def fail(path):
        raise EOFError

    monkeypatch.setattr("gspn.data.images.decode", fail)
    code, _, err = gspn_command("segment", run, bad, "--out", tmp_path / "none")
    assert code == 2 and f"{bad}: EOFError" in err


def test_logits_that_are_not_finite_are_an_error(run, masked, tmp_path, monkeypatch):
    """Of NaN the largest is no class."""
    coarse = Segmenter.coarse_logits
    monkeypatch.setattr(Segmenter, "coarse_logits", lambda self, x: coarse(self, x) * float("nan"))
    images = [masked / "images/00.png", masked / "images/01.png"]
    code, out, err = gspn_command("segment", run, *images, "--out", tmp_path / "out", "--json")
    assert code == 2 and out == "" and "not finite for some pixels: its weights are damaged" in err
    assert "--max-memory" not in err and "could not be segmented" not in err


def test_a_classifier_cannot_segment(masked, tmp_path):
    Run.create(tmp_path / "run", {"task": "classification"})
    code, _, err = gspn_command("segment", tmp_path / "run", masked / "images/00.png")
    assert code == 2 and "expected segmentation" in err


def test_what_is_ignored():
    assert parse_ignored("255,void") == ("255", "void") and parse_ignored("") == parse_ignored([]) == ()
    assert parse_ignored(0) == parse_ignored("0") == ("0",)  # a file's number


def test_memory():
    told = {"2GB": 2 * 10**9, "1.5 gib": 3 * 2**29, "64KB": 64_000, "3m": 3_000_000}
    assert {text: parse_memory(text) for text in told} == told
    for text in ("", "GB", "0GB", "2TB", "-1", "2", "100B", "9" * 400 + "GB"):
        with pytest.raises(ValueError, match="a size with a unit such as 2GB"):
            parse_memory(text)


def test_the_context_of_a_pixel_is_drawn(run, masked, tmp_path):
    image, picture = sorted((masked / "images").iterdir())[0], tmp_path / "context.png"
    code, out, err = gspn_command("show", run, image, "--place", "3,5", "--out", picture)
    assert code == 0 and f"wrote {picture}" in out.replace("\n", ""), err
    assert decode(picture).width > 500
    code, _, err = gspn_command("show", run, image, "--place", "999,0", "--out", tmp_path / "no.png")
    assert code == 2 and "(999, 0) is not on the" in err
