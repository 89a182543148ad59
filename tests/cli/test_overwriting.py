"""No command overwrites what is there, unless it is told to; what cannot be written is one line."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.diffusion import generator_run
from PIL import Image
from typer.testing import CliRunner

from gspn.cli import app
from gspn.files import SaveError, atomic, check_writable, remove, write_text
from gspn.models import context_maps, create_model
from gspn.train.run import Run

MODEL = dict(num_classes=2, in_chans=1, width=8, depths=(2,), global_levels=(0,))
NEW = b"what somebody else wrote"


def command(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_model("gspn_micro", **MODEL).eval()


@pytest.fixture
def run(model, tmp_path):
    """A run folder of a tiny classifier of grey images of 8x8."""
    preprocessing = {"channels": 1, "size": [8, 8], "mean": [0.5], "std": [0.25], "crop": 1.0}
    config = {
        "task": "classification",
        "model": model.config,
        "class_names": ["cat", "dog"],
        "preprocessing": preprocessing,
        "options": {"precision": "fp32"},
        "data": {"where": "photos"},
    }
    Run.create(tmp_path / "run", config).save_checkpoint("best", {"model": model.state_dict()}, {})
    return tmp_path / "run"


@pytest.fixture
def picture(tmp_path):
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.fixture
def photos(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "photos" / "test" / name).mkdir(parents=True)
        for i in range(12):
            pixels = np.random.default_rng(i).integers(0, 255, (8, 8), np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"photos/test/{name}/{i}.png")
    shutil.copytree(tmp_path / "photos/test", tmp_path / "photos/train")
    return tmp_path / "photos"


def refused_and_then_replaced(file, *arguments):
    """Whether the command leaves a `file` alone that is there, and writes it with --overwrite."""
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(NEW)
    result = command(*arguments)
    assert result.exit_code == 2 and f"{file} is there already" in result.stderr and "--overwrite" in result.stderr
    assert file.read_bytes() == NEW and len(result.stderr.splitlines()) == 1
    result = command(*arguments, "--overwrite")
    assert result.exit_code == 0, result.output
    assert file.read_bytes() != NEW


def test_show(run, picture, tmp_path):
    before = picture.read_bytes()
    assert command("show", run, picture, "--out", picture).exit_code == 2 and picture.read_bytes() == before
    refused_and_then_replaced(tmp_path / "context.png", "show", run, picture, "--out", tmp_path / "context.png")
    refused_and_then_replaced(run / "context-picture.png", "show", run, picture)
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere")  # a name that is taken, though nothing is behind it
    assert command("show", run, picture, "--out", tmp_path / "link.png").exit_code == 2


@pytest.mark.slow
def test_export(run, tmp_path):
    pytest.importorskip("onnxscript")
    arguments = ("export", run, "--onnx", "--no-check", "--size", 8)
    refused_and_then_replaced(tmp_path / "model.onnx", *arguments, "--out", tmp_path / "model.onnx")
    (run / "model.pt2").write_bytes(NEW)
    assert command("export", run, "--aoti").exit_code == 2 and (run / "model.pt2").read_bytes() == NEW


def test_export_of_a_pipeline(tmp_path):
    source, _ = generator_run(tmp_path / "generator")
    arguments = ("export", source.path, "--diffusers", "--out", tmp_path / "pipeline")
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "mine").write_bytes(NEW)
    for more in ((), ("--overwrite",)):  # a folder that holds something else is not for it to replace
        result = command(*arguments, *more)
        assert result.exit_code == 2 and (tmp_path / "pipeline" / "mine").read_bytes() == NEW
    assert "holds no pipeline" in result.stderr
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    assert command(*arguments).exit_code == 2
    assert command(*arguments, "--overwrite").exit_code == 0
    assert "GSPNPipeline" in (tmp_path / "pipeline/model_index.json").read_text()
    assert not (tmp_path / "pipeline/mine").exists()


def test_eval(run, photos, tmp_path):
    folder = tmp_path / "evaluation"
    for name in ("evaluation-8x8.json", "confusion-8x8.png"):
        shutil.rmtree(folder, ignore_errors=True)
        refused_and_then_replaced(folder / name, "eval", run, photos, "--workers", 0, "--out", folder)
    result = command("eval", run, photos, "--workers", 0, "--sizes", "12,8", "--out", folder)
    assert result.exit_code == 2 and not (folder / "evaluation-12x12.json").exists()  # before any work
    assert command("eval", run, photos, "--workers", 0, "--sizes", "12", "--out", folder).exit_code == 0
    assert json.loads((folder / "evaluation-12x12.json").read_text())["images"] == 24


def test_fid(run, photos, tmp_path):
    arguments = ("fid", photos, "--reference", photos, "--features", f"classifier:{run}", "--workers", 0, "--no-cache")
    refused_and_then_replaced(tmp_path / "result.json", *arguments, "--out", tmp_path / "result.json")
    kept = tmp_path / "reference.safetensors"
    refused_and_then_replaced(kept, *arguments, "--save", kept)
    assert command(*arguments, "--save", kept).exit_code == 0  # as after a stop: these statistics are its own
    result = command(*arguments, "--save", kept, "--split", "test")
    assert result.exit_code == 2 and f"{kept} is there already" in result.stderr  # those of other images


# -- what cannot be written, and blocks by name --


def test_the_result_of_fid_is_not_lost(run, photos, tmp_path, monkeypatch):
    arguments = ("fid", photos, "--reference", photos, "--features", f"classifier:{run}", "--workers", 0, "--no-cache")
    assert command(*arguments, "--out", tmp_path / "new" / "folder" / "result.json").exit_code == 0
    assert json.loads((tmp_path / "new/folder/result.json").read_text())["frechet_distance"] is not None
    (tmp_path / "file").write_text("")
    with monkeypatch.context() as patch:  # a folder that cannot be made is told before the work
        patch.setattr("gspn.metrics.fid.evaluate_samples", None)
        result = command(*arguments, "--out", tmp_path / "file" / "result.json")
    assert result.exit_code == 2 and "cannot write to the folder" in result.stderr
    for more in (("--json",), ()):
        with monkeypatch.context() as patch:  # a disk that is full by then
            patch.setattr(os, "replace", lambda *_: os.stat("/no/such/file"))
            result = command(*arguments, "--out", tmp_path / "result.json", *more)
        assert result.exit_code == 1 and "cannot write" in result.stderr
        assert "Frechet distance" in result.stdout


def test_a_read_only_disk_is_one_line(run, picture, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:  # where even removing what is not there fails
        patch.setattr(Path, "unlink", refuse)
        result = command("show", run, picture, "--out", tmp_path / "context.png")
    assert result.exit_code == 1 and len(result.stderr.splitlines()) == 1
    assert f"cannot write {tmp_path / 'context.png'}: Read-only file system" in result.stderr
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        remove(tmp_path / "nothing", quietly=True)
        with pytest.raises(OSError, match="Read-only"):
            remove(tmp_path / "nothing")
        with pytest.raises(SaveError, match="Read-only file system"), atomic(tmp_path / "file"):
            pass
    write_text(tmp_path / "file", "as usual")


def test_a_block_by_the_name_that_the_picture_prints(model, run, picture, tmp_path):
    image = torch.randn(1, 8, 8)
    for number in (0, 1, -1):
        by_number = context_maps(model, image, (3, 4), number)
        by_name = context_maps(model, image, (3, 4), by_number["block"])
        assert by_name["block"] == by_number["block"] and torch.equal(by_name["merged"], by_number["merged"])
    names = [context_maps(model, image, (0, 0), number)["block"] for number in (0, 1)]
    files = []
    for block in ("0", "-2", names[0]):
        files.append(tmp_path / f"{block}.png")
        assert command("show", run, picture, "--block", block, "--out", files[-1]).exit_code == 0
    assert len({file.read_bytes() for file in files}) == 1
    result = command("show", run, picture, "--block", "stages.9", "--out", tmp_path / "x.png")
    assert result.exit_code == 2 and f"no block 'stages.9'; there are {', '.join(names)}" in result.stderr


def test_weights_that_are_not_finite_are_not_drawn(model, picture, tmp_path):
    from gspn.data.images import Preprocessing, decode
    from gspn.plots import context
    from gspn.runs import Classifier

    broken = create_model("gspn_micro", **MODEL)
    with torch.no_grad():
        for parameter in broken.parameters():
            parameter.fill_(float("nan"))
    classifier = Classifier(None, broken.eval(), Preprocessing(1, (8, 8), (0.5,), (0.25,)), ["cat", "dog"])
    with pytest.raises(ValueError, match=r"\d+ values of the context in .* are not finite"):
        context(tmp_path / "context.png", classifier, decode(picture))
    assert not (tmp_path / "context.png").exists()


def test_what_a_killed_process_left_is_not_in_the_way(tmp_path):
    (tmp_path / ".out.new").mkdir()
    (tmp_path / ".out.new" / "half").touch()
    check_writable(tmp_path / "out")
    assert not list(tmp_path.iterdir())
