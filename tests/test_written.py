"""What version 0.1.0 wrote opens today and means the same: runs, latents, samples, statistics, swapped layers.

tests/written/make.py made the files. Numbers were computed on another machine, so they agree up to rounding.
"""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image
from typer.testing import CliRunner

import gspn
from gspn.cli import app

ARCHIVE = Path(__file__).parent / "written" / "0.1.tar.xz"


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    with tarfile.open(ARCHIVE) as tar:
        tar.extractall(folder, filter="data")
    return folder


@pytest.fixture
def written(archive, tmp_path, monkeypatch):
    """The files in a folder of their own, which is the current one."""
    shutil.copytree(archive, tmp_path / "then")
    monkeypatch.chdir(tmp_path / "then")
    return tmp_path / "then"


@pytest.fixture(scope="module")
def expected(archive):
    return json.loads((archive / "expected.json").read_text())


def gspn_command(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def close(value):
    return pytest.approx(value, rel=1e-3, abs=1e-4)


def last_row(run):
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


def test_a_classifier_is_evaluated_and_predicts_alike(written, expected):
    row = json.loads(gspn_command("eval", "classifier", "pictures", "--split", "val", "--json"))
    assert row["loss"] == close(last_row(written / "classifier")["val_loss"])
    (said,) = json.loads(gspn_command("predict", "classifier", "pictures/bright/0.png", "--json"))
    (then,) = expected["predicted"]
    assert [one["name"] for one in said["classes"]] == [one["name"] for one in then["classes"]]
    assert [one["probability"] for one in said["classes"]] == close([one["probability"] for one in then["classes"]])


@pytest.mark.parametrize(
    ("run", "command", "where", "compared"),
    [
        ("classifier", "train", "pictures", ("train_loss", "val_loss", "lr")),
        ("generator", "train-diffusion", "latents", ("train_loss", "val_loss", "val_bound", "lr")),
        ("student", "distill", "base", ("train_loss", "val_noise", "val_output", "val_feature", "lr")),
    ],
)
def test_a_stopped_training_goes_on_to_what_it_came_to_then(written, expected, run, command, where, compared):
    moved = [where, "--data", "captioned"] if command == "distill" else [where]
    gspn_command(command, *moved, "--resume", f"{run}-stopped")
    row = last_row(written / f"{run}-stopped")
    assert row["epoch"] == 2
    assert {key: row[key] for key in compared} == {key: close(expected[run][key]) for key in compared}


def test_samples_are_complete_and_new_ones_the_same(written):
    said = gspn_command("sample", "generator", "--vae", "vae", "--per-class", 2, "--steps", 4, "--out", "samples")
    assert "0 of them made now" in said
    gspn_command("sample", "generator", "--vae", "vae", "--per-class", 2, "--steps", 4, "--out", "again")
    files = sorted(path.relative_to("samples") for path in Path("samples").rglob("*.png"))
    assert len(files) == 5  # and the grid
    for file in files:
        then, now = (np.asarray(Image.open(Path(folder, file)), np.int16) for folder in ("samples", "again"))
        assert np.abs(then - now).max() <= 2, file


def test_latents_are_complete(written):
    said = gspn_command("encode", "pictures", "--vae", "vae", "--size", 16, "--out", "latents", "--workers", 0)
    assert "14 (train), 2 (val) latents" in said
    assert "written now" not in said


def test_saved_statistics_are_a_reference(written):
    told = json.loads(
        gspn_command(
            *("fid", "samples", "--reference", "statistics.safetensors", "--features", "classifier:classifier"),
            *("--no-cache", "--workers", 0, "--json"),
        )
    )
    then = json.loads(Path("fid.json").read_text())
    assert told["frechet_distance"] == close(then["frechet_distance"])


def test_swapped_layers_go_into_their_pipeline(written):
    pipe = StableDiffusionPipeline.from_pretrained("base")
    swapped = gspn.load_swap(pipe, "student")
    assert len(swapped.layers) == 7
    swapped.restore()
