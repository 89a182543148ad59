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
from helpers.files import half_written
from PIL import Image
from typer.testing import CliRunner

from gspn.cli import app
from gspn.digests import digest
from gspn.files import (
    BusyError,
    SaveError,
    atomic,
    check_writable,
    is_temporary,
    remove,
    write_json,
    write_text,
    writing,
)
from gspn.models import context_maps, create_model
from gspn.pretrained import MARK, Card
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
    assert command(*arguments, "--out", tmp_path / "new" / "folder" / "model.onnx").exit_code == 0  # it makes folders
    assert (tmp_path / "new" / "folder" / "model.onnx").exists()
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


def test_a_folder_for_the_hub(run, tmp_path):
    arguments, card = ("export", run, "--hub", "--out", tmp_path / "out", "--overwrite"), tmp_path / "out" / "README.md"
    card.parent.mkdir()
    card.write_bytes(NEW)
    assert command(*arguments, "--license", "mit", "--trained-on", "cats").exit_code == 0  # there is no config.json yet
    assert Card.read(card) == Card("mit", "cats")
    assert command(*arguments).exit_code == 0
    assert Card.read(card) == Card("mit")  # cats belong to the weights that are gone
    card.write_bytes(NEW)
    assert command(*arguments).exit_code == 0 and Card.read(card) == Card()
    for told in ("{", "[1]", '{"price": 3}'):  # a mark of another gspn
        card.write_text(f"a card{MARK}{digest(['a card', told])} {told} -->\n")
        assert Card.read(card) is None
    assert command(*arguments).exit_code == 0 and Card.read(card) == Card()
    card.unlink()
    (card / "mine").mkdir(parents=True)
    assert Card.read(card) is None
    result = command(*arguments)
    assert result.exit_code == 2 and "README.md is a folder" in result.stderr and (card / "mine").exists()


def test_a_saved_model_exported_again_keeps_its_card(run, tmp_path):
    """Its weights are the same, so the metrics stay too; those at another size say so."""
    found = {"split": "test", "images": 5, "top1": 0.5, "size": [12, 8], "trained_size": [8, 8]}
    write_json(tmp_path / "evaluation.json", found)
    told = ("--license", "mit", "--trained-on", "cats", "--evaluation", tmp_path / "evaluation.json")
    assert command("export", run, "--hub", "--out", tmp_path / "a", *told).exit_code == 0
    assert command("export", tmp_path / "a", "--hub", "--out", tmp_path / "b").exit_code == 0
    card = Card.read(tmp_path / "b" / "README.md")
    assert card == Card("mit", "cats", {"top-1 accuracy (test, 5 images at 12x8)": "0.5"})


def test_a_failed_export_for_the_hub_leaves_the_card(run, tmp_path, monkeypatch):
    """Also one inside of gspn, which is no fault of the user's."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "README.md").write_bytes(NEW)
    write_json(folder / "config.json", {"class": "another"})

    def removed(file, *_):
        file.unlink()
        if file.name == "README.md":
            raise ValueError("a fault of gspn")

    monkeypatch.setattr("gspn.files.remove", removed)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    result = command("export", run, "--hub", "--out", folder, "--overwrite")
    assert isinstance(result.exception, ValueError) and result.exit_code == 1
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize("what", ["weights", "config.json"])
def test_what_cannot_be_exported_for_the_hub(run, model, tmp_path, what):
    arguments = ("export", run, "--hub", "--out", tmp_path / "out", "--overwrite", "--precision", "fp16")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_bytes(NEW)
    if what == "weights":
        weights = {**model.state_dict(), "head.bias": torch.full((2,), 1e5)}
        Run.open(run).save_checkpoint("best", {"model": weights}, {})
    else:
        (tmp_path / "out" / "config.json").write_text("{")
    result = command(*arguments)
    told = "head.bias holds 1e+05, which torch.float16 cannot" if what == "weights" else "config.json cannot be read"
    assert result.exit_code == 2 and told in result.stderr and len(result.stderr.splitlines()) == 1
    assert (tmp_path / "out" / "README.md").read_bytes() == NEW


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
        patch.setattr("gspn.files._sync", refuse)
        result = command("show", run, picture, "--out", tmp_path / "context.png")
    assert result.exit_code == 1 and len(result.stderr.splitlines()) == 1
    assert f"cannot write {tmp_path / 'context.png'}: Read-only file system" in result.stderr
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        remove(tmp_path / "nothing", quietly=True)
        with pytest.raises(OSError, match="Read-only"):
            remove(tmp_path / "nothing")
        with pytest.raises(SaveError, match="Read-only file system"), atomic(tmp_path / "file"):
            refuse()
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
    out = tmp_path / "out"
    left = [half_written(out), half_written(tmp_path / "below" / "out")]
    kept = [half_written(out, os.getpid()), half_written(out, machine="another")]
    kept += [tmp_path / ".notes-20260115.new", tmp_path / ".mine.new"]  # the user's
    for number in range(2):
        for folder in (*left, *kept):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "half").touch()
        if number:
            check_writable(out)
        else:
            with writing(tmp_path):
                pass
        assert not any(folder.exists() for folder in left) and all((folder / "half").exists() for folder in kept)
    with atomic(out) as temporary:
        assert temporary.name[:-13] == half_written(out, os.getpid()).name[:-13]
        temporary.touch()


@pytest.mark.parametrize("name", ["x" * 250 + ".png", "\u65e5" * 84])
def test_long_names_fit(tmp_path, name):
    write_text(tmp_path / name, "text")
    assert (tmp_path / name).read_text() == "text"
    with pytest.raises(SaveError, match="File name too long"):
        write_text(tmp_path / (2 * name), "text")


def test_writers_without_a_lock_do_not_meet(tmp_path):
    file = tmp_path / "out"
    with atomic(file) as one, atomic(file) as other:
        assert one != other and is_temporary(one) and is_temporary(other)
        one.write_text("one")
        other.write_text("other")
    assert file.read_text() == "one" and {*tmp_path.iterdir()} == {file}  # the outer block ends last


def test_a_folder_that_cannot_be_synced_is_no_error(tmp_path, monkeypatch):
    """Windows opens no folder, and syncs no file that is open to read alone."""
    system = os.open

    def opening(path, flags, *more, **named):
        if os.path.isdir(path) or not flags & (os.O_RDWR | os.O_WRONLY):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return system(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", opening)
    write_text(tmp_path / "file", "text")
    with atomic(tmp_path / "folder") as folder:
        (folder / "below").mkdir(parents=True)
        (folder / "below" / "file").write_text("text")
    assert {file.read_text() for file in tmp_path.rglob("file") if file.is_file()} == {"text"}

    def failing(handle):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(SaveError, match="untouched"):
        write_text(tmp_path / "file", "other")
    assert (tmp_path / "file").read_text() == "text"


def test_a_lock_that_nobody_can_read_is_told_too(tmp_path, monkeypatch):
    """As on Windows, while another process holds it."""
    monkeypatch.setattr("gspn.files.PATIENCE", 0)

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with writing(tmp_path), monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", refuse)
        with pytest.raises(BusyError, match=r"another gspn \(process unknown\)"), writing(tmp_path):
            pass


def test_infinity_comes_back_as_it_was(tmp_path):
    """As `gspn sample` compares the settings of dpm-solver++ with those in the folder."""
    write_json(tmp_path / "a.json", {"lambda_min_clipped": -float("inf")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"lambda_min_clipped": -float("inf")}
