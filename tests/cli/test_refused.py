"""What a command refuses before any work: places that cannot be written, folders for images, generators for
classifiers, and sizes beyond any memory.
"""

import errno
import json
import os
import re
import sys
import tempfile

import numpy as np
import pytest
from helpers.diffusion import generator_run
from PIL import Image
from typer.testing import CliRunner

from gspn import weights
from gspn.cli import app

HUGE = 10**7  # no address space holds an image of this size
SIDE = f"{HUGE}x{HUGE}"


def refused(*arguments):
    """The message of a command that is refused, without "error: "; it is one line."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 2 and result.stdout == "" and result.stderr.startswith("error: "), result.output
    assert result.stderr.endswith("\n") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr[len("error: ") : -1]


@pytest.fixture
def picture(tmp_path):
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


# -- where nothing can be written --

FOLDERS = {  # commands that write to a folder
    "train digits": "gspn.tasks.base",
    "train-diffusion digits": "gspn.tasks.base",
    "train-segmentation {masked}": "gspn.tasks.base",
    "eval {run} digits": "gspn.metrics.classification",
    "eval {segmenter} {masked}": "gspn.metrics.segmentation",
    "segment {segmenter} {picture}": "gspn.runs",
    "export {run} --hub --overwrite": "gspn.runs",
    "bench layer": "gspn.bench",
}
FILES = {  # those that write a file
    "show {run} {picture} --out {file}/a.png": "--out",
    "export {run} --onnx --out {file}/a.onnx": "--out",
    "fid digits --reference digits --features classifier:{run} --out {file}/a.json": "--out",
    "fid digits --reference digits --features classifier:{run} --save {file}/a.safetensors": "--save",
}


@pytest.fixture
def places(tmp_path, digits_run, masked, masked_run, picture):
    (tmp_path / "file").write_text("")
    return dict(
        file=tmp_path / "file", run=digits_run[0].path, segmenter=masked_run.path, masked=masked, picture=picture
    )


@pytest.mark.parametrize("line", FOLDERS)
def test_a_folder_that_cannot_be_made_is_told_before_any_work(places, line, monkeypatch):
    monkeypatch.setitem(sys.modules, FOLDERS[line], None)  # what works cannot be imported
    file, arguments = places["file"], line.format(**places).split()
    told = refused(*arguments, "--out", file)
    assert told == f"cannot write to the folder {file}: it is a file; choose another one with --out"
    told = refused(*arguments, "--out", file / "new" / "run")
    assert told == f"cannot make the folder {file}/new/run: {file} is a file; choose another one with --out"


@pytest.mark.parametrize("line", FILES)
def test_a_file_whose_folder_is_none(places, line):
    file, option = places["file"], FILES[line]
    told = refused(*line.format(**places).split())
    assert told == f"cannot write to the folder {file}: it is a file; choose another one with {option}"


def test_what_another_task_has_instead(places):
    run, segmenter, masked = places["run"], places["segmenter"], places["masked"]
    told = refused("eval", segmenter, masked, "--sizes", 32)
    assert told == f"--sizes is not for {segmenter}, a run of segmentation; --scale resizes its images"
    assert refused("eval", run, "digits", "--scale", 2) == f"--scale is not for {run}, a run of classification"


def test_samples_latents_and_pipelines_cannot_go_into_a_file(places, tmp_path):
    run, file = generator_run(tmp_path / "generator")[0].path, places["file"]
    for line in (f"sample {run}", f"encode digits --vae {tmp_path} --size 8"):
        assert "it is a file; choose another one" in refused(*line.split(), "--out", file)
    assert f"{file} is a file" in refused("export", run, "--diffusers", "--out", file / "new" / "pipeline")


def test_a_folder_without_permission(tmp_path, monkeypatch):
    """Without rights of its own: tests may run as root, whom nothing hinders."""
    told = ": no file can be made in {} (Read-only file system); choose another one with --out"
    (tmp_path / "there").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "TemporaryFile", refuse)
        for folder, what, nearest in (
            (tmp_path / "new" / "run", "make", tmp_path),
            (tmp_path / "there", "write to", tmp_path / "there"),
        ):
            found = refused("train", "digits", "--out", folder)
            assert found == f"cannot {what} the folder {folder}{told.format(nearest)}"
    name = tmp_path / ("n" * 300)
    assert "too long; choose another one with --out" in refused("train", "digits", "--out", name)
    assert sorted(tmp_path.rglob("*")) == before


def refuse(**_):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


# -- what is no image, no run --


def test_a_folder_is_no_image(places, tmp_path):
    (tmp_path / "flat").mkdir()
    for folder, files in ((tmp_path / "flat", "*.png"), (places["masked"], "*/*.png")):
        expected = f"a folder; expected image files, such as {folder}/{files}"
        told = refused("show", places["run"], folder)
        assert told == f"{folder} cannot be read as an image: {expected}"
        result = CliRunner().invoke(app, ["predict", *map(str, (places["run"], folder, places["picture"])), "--json"])
        assert result.exit_code == 1 and json.loads(result.stdout)[0]["error"] == expected
        for command, run in (("predict", "run"), ("segment", "segmenter")):
            result = CliRunner().invoke(app, [command, str(places[run]), str(folder)])
            assert result.exit_code == 2 and f"{folder}: {expected}" in result.stderr


@pytest.mark.parametrize("kind", ["GSPNPipeline", "DiTPipeline"])
@pytest.mark.parametrize("line", ["predict {} {}", "show {} {}", "segment {} {}", "eval {} {}", "export {} --onnx"])
def test_a_saved_generator_is_for_sample(line, kind, picture, tmp_path):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    told = refused(*line.format(tmp_path / "saved", picture).split())
    assert told == f"{tmp_path}/saved generates images; use `gspn sample`"
    told = refused("export", tmp_path / "saved", "--diffusers")
    assert told == f"{tmp_path}/saved is a folder for GSPNPipeline.from_pretrained already: {tmp_path}/saved"


def test_the_generator_of_the_package_is_called_by_its_name(picture, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert "digits-generator" in weights.names()
    assert refused("predict", "digits-generator", picture) == "digits-generator generates images; use `gspn sample`"


# -- what no memory holds --


@pytest.mark.parametrize("line", ["train digits", "train-diffusion digits", "train-segmentation {masked}"])
def test_a_training_at_a_size_for_which_memory_does_not_suffice(masked, line, tmp_path):
    arguments = (*line.format(masked=masked).split(), "--out", tmp_path / "run", "--size", HUGE, "--workers", 0)
    result = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
    told = rf"error: \S+ fails when tried with .*{SIDE}.*: memory does not suffice; use a smaller --size\n"
    assert result.exit_code == 2 and re.fullmatch(told, result.stderr), result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_evaluation_for_which_memory_does_not_suffice(digits_run, workers):
    told = refused("eval", digits_run[0].path, "digits", "--sizes", HUGE, "--workers", workers)
    assert told == f"memory does not suffice for 256 images of {SIDE} at a time: lower --batch-size or --sizes"


@pytest.mark.parametrize(
    "line, does, what",
    [
        ("eval {segmenter} {masked} --workers 0", "metrics.segmentation.segment_batches", "16 images at a time"),
        ("fid digits --reference digits", "metrics.fid.evaluate_samples", "64 images at a time"),
        ("encode digits --vae {vae} --size 8", "sampling.encode._encode_shards", "32 images of 8x8 at a time"),
    ],
)
def test_other_work_for_which_memory_does_not_suffice(masked, masked_run, vae, tmp_path, monkeypatch, line, does, what):
    def short(*_, **__):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(f"gspn.{does}", short)
    arguments = line.format(segmenter=masked_run.path, masked=masked, vae=vae).split()
    out = ("--out", tmp_path / "out") if arguments[0] == "encode" else ()
    result = CliRunner().invoke(app, [*arguments, *map(str, out)], catch_exceptions=False)
    told = f"error: memory does not suffice for {what}: lower --batch-size or --s"
    assert result.exit_code == 2 and result.stderr.startswith(told) and result.stderr.count("\n") == 1
