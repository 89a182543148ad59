"""Folders of samples: one that was stopped is continued, a finished one can grow, another one is refused."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from helpers.diffusion import generator_run
from helpers.sampling import options, pixels
from helpers.training import tree
from PIL import Image

from gspn.digests import is_earlier
from gspn.files import SaveError, writing
from gspn.options import OptionError
from gspn.sampling import sample as module
from gspn.sampling.generators import load_pipeline
from gspn.sampling.sample import sample
from gspn.sampling.sample_folder import Samples
from gspn.train.run import Run, RunError


class Stopped(BaseException):
    """What stands for a kill."""


def test_batches_are_the_same_when_a_part_is_there(tmp_path):
    samples = Samples(tmp_path, {}, 8, [0], ["a"])
    (tmp_path / "images").mkdir()
    assert module._batches(samples, 3) == [([0, 1, 2], [0, 1, 2]), ([3, 4, 5], [3, 4, 5]), ([6, 7], [6, 7])]
    for i in (0, 1, 2, 3, 5):
        samples.path(i).touch()
    assert module._batches(samples, 3) == [([3, 4, 5], [4]), ([6, 7], [6, 7])]


def test_a_folder_that_another_process_began_in_the_meantime_is_refused(run, done, tmp_path, monkeypatch):
    """Between the first look and the lock."""

    @contextmanager
    def late(folder):
        with writing(folder):
            shutil.copy(done[0] / "samples.json", folder)
            yield

    monkeypatch.setattr(module, "writing", late)
    with pytest.raises(RunError, match="made with seed 0, not 1"):
        sample(run, tmp_path / "a", options(seed=1))
    assert Samples.open(tmp_path / "a").settings["seed"] == 0 and not (tmp_path / "a/images").exists()


@pytest.mark.parametrize("after", [0, 1, 4, 6])
def test_a_stopped_folder_comes_out_as_if_it_had_not_been(run, done, tmp_path, monkeypatch, after):
    save, count = module.save_picture, [0]

    def stopping(path, picture):
        if count[0] == after:
            Path(path).with_name(f".{Path(path).name}.new").write_bytes(b"half")
            raise Stopped
        count[0] += 1
        save(path, picture)

    monkeypatch.setattr(module, "save_picture", stopping)
    with pytest.raises(Stopped):
        sample(run, tmp_path / "a", options(npz=True))
    monkeypatch.setattr(module, "save_picture", save)
    samples = Samples.open(tmp_path / "a")
    assert len(samples.missing()) == 7 - after
    with pytest.raises(RunError, match=f"{7 - after} of 7 samples"):
        samples.split()
    said = sample(run, tmp_path / "a", options(npz=True))
    assert said["made"] == 7 - after
    assert {p: b for p, b in tree(tmp_path / "a").items() if not p.endswith(".new")} == tree(done[0])


def test_samples_that_an_older_version_began_can_grow(run, done, tmp_path):
    folder = shutil.copytree(done[0], tmp_path / "a")
    about = json.loads((folder / "samples.json").read_text())
    assert not is_earlier(about["settings"]["weights"])
    about["settings"]["weights"] = module._digest(load_pipeline(run), like="")
    (folder / "samples.json").write_text(json.dumps(about))
    assert sample(run, folder, options(count=9, batch_size=2))["made"] == 2
    about["settings"]["weights"] = "0" * 64
    (folder / "samples.json").write_text(json.dumps(about))
    with pytest.raises(RunError, match="other weights"):
        sample(run, folder, options(count=9, batch_size=2))


def test_a_finished_folder_is_left_as_it_is_and_can_grow(run, done, tmp_path, monkeypatch):
    folder = shutil.copytree(done[0], tmp_path / "a")
    times = {path: path.stat().st_mtime_ns for path in (folder / "images").iterdir()}
    assert sample(run, folder, options(npz=True))["made"] == 0
    assert tree(folder) == tree(done[0])
    assert sample(run, folder, options(count=9, batch_size=2, npz=True))["made"] == 2
    assert len(pixels(folder)) == 9 and all(path.stat().st_mtime_ns == time for path, time in times.items())
    with np.load(folder / "samples.npz") as arrays:
        assert arrays["arr_1"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    with pytest.raises(RunError, match=r"9 samples.* 7"):
        sample(run, folder, options())


@pytest.mark.parametrize(
    ("more", "what"),
    [
        (dict(guidance=3.0), r"guidance 2.0, not 3.0"),
        (dict(steps=3), r"steps 2, not 3"),
        (dict(seed=1), r"seed 0, not 1"),
        (dict(size=(8, 12)), r"size \[8, 8\], not \[8, 12\]"),
        (dict(scheduler="ddim"), r"scheduler class DDPMScheduler, not DDIMScheduler"),
        (dict(precision="bf16"), r"precision fp32, not bf16"),
        (dict(classes="0,1,2,3"), r"classes \[0, 1, 2, 3, 4\], not \[0, 1, 2, 3\]"),
    ],
)
def test_other_arguments_in_the_same_folder_are_refused(run, done, more, what):
    before = tree(done[0])
    with pytest.raises(RunError, match=f"with {what}"):
        sample(run, done[0], options(**more))
    assert tree(done[0]) == before


def test_samples_made_with_an_option_are_not_mixed_with_others(run, tmp_path):
    """Options that are stored only where they are used."""
    sample(run, tmp_path / "a", options(size=(16, 16), steps=4, enlarge=0.5))
    with pytest.raises(RunError, match=r"with enlarge 0\.5, not without it"):
        sample(run, tmp_path / "a", options(size=(16, 16), steps=4))


def test_other_weights_in_the_same_folder_are_refused(done, tmp_path):
    run, _ = generator_run(tmp_path / "run")
    tensors, state = run.load_checkpoint("last")
    tensors["ema"]["norm.weight"][0] += 1e-3
    Run.open(run.path).save_checkpoint("last", tensors, state)
    with pytest.raises(RunError, match="other weights"):
        sample(run.path, done[0], options())


def test_folders_of_something_else_are_refused(run, done, tmp_path):
    (tmp_path / "precious.txt").write_text("here")
    with pytest.raises(RunError, match=r"not empty.*no samples"):
        sample(run, tmp_path, options())
    with pytest.raises(OptionError, match="it is a file; choose another one"):
        sample(run, tmp_path / "precious.txt", options())
    assert tree(tmp_path) == {"precious.txt": b"here"}
    for text, message in (("{}", "KeyError"), ('{"format": 9}', "newer gspn")):
        (tmp_path / "samples.json").write_text(text)
        with pytest.raises(RunError, match=message):
            sample(run, tmp_path, options())
    with pytest.raises(RunError, match="no samples"):
        Samples.open(done[0] / "images")


def test_a_full_disk_is_told_and_leaves_what_is_done(run, tmp_path, monkeypatch):
    save = Image.Image.save

    def full(self, path, *more, **options):
        if "000003" in str(path):
            raise OSError(28, "No space left on device")
        save(self, path, *more, **options)

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(SaveError, match=r"000003-four\.png: No space left"):
        sample(run, tmp_path / "a", options())
    assert len(list((tmp_path / "a/images").iterdir())) == 3


@pytest.mark.slow
def test_two_processes_share_the_batches(run, done, tmp_path):
    """Of a folder in which some samples are there already."""
    folder = shutil.copytree(done[0], tmp_path / "a")
    for path in sorted((folder / "images").iterdir())[1:]:
        path.unlink()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "gspn"]
    command += ["sample", str(run), "--out", str(folder), "--count", "7", "--steps", "2", "--guidance", "2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command += ["--batch-size", "3", "--npz"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("7 samples, 6 of them made now") == 1
    assert tree(folder) == tree(done[0])
