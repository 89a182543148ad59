"""A training that was stopped at any moment goes on as if it had not been: the same parameters to the last bit."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from functools import partial

import pytest
import torch
from helpers.training import TINY, other_byte, same, tiny_options, tree
from rich.console import Console

from gspn import files, plots
from gspn.data.images import mixed_seed
from gspn.data.labelled import open_data
from gspn.files import BusyError, writing
from gspn.metrics.classification import evaluate
from gspn.options import OptionError, Options, read_file
from gspn.runs import load_classifier
from gspn.tasks.classify import resume_classifier, train_classifier
from gspn.train import loop
from gspn.train import run as run_folder
from gspn.train.loop import TrainingError
from gspn.train.run import Run, RunError

PICTURES = ("curves", "predictions", "context")
OPTIONS = dict(
    model_args=dict(TINY, depths=[2], width=8, drop_path_rate=0.3),
    epochs=4,
    batch_size=128,
    accumulate=2,
    ema=0.9,
    save_every="2",
    keep_every=1,
    keep=2,
    workers=0,
)
STEPS = {  # of writing a checkpoint: where a process kills itself
    "writes a tensor file": (run_folder, "save_tensors"),
    "waits for the disk": (files, "_sync"),
    "renames a folder": (os, "rename"),
    "renames a file": (os, "replace"),
    "removes a file": (files, "remove"),
}


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    for name in PICTURES:  # they take longer than the training
        monkeypatch.setattr(plots, name, lambda *args: None)


def work(path, step=None, count=0):
    """In a process of its own: trains, or goes on; kills itself before the `count`-th time of a step of STEPS."""
    torch.set_num_threads(1)
    for name in PICTURES:
        setattr(plots, name, lambda *args: None)
    if step is not None:
        module, name = STEPS[step]
        real, left = getattr(module, name), [count]

        def killing(*args, **more):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **more)

        setattr(module, name, killing)
    if (path / "config.json").exists():
        resume_classifier(path)
    else:
        train_classifier("digits", path, Options(**OPTIONS))


def start(path, **more):
    """A process that works; it is forked from one that has imported everything, which takes no time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gspn.tasks.classify", "sklearn.datasets", "torch._dynamo"])
    process = context.Process(target=partial(work, path, **more))
    process.start()
    return process


def outcome(path):
    """What has to be the same: the tensors of every checkpoint, and the metrics but for times."""
    run = Run.open(path)
    names = sorted(folder.name for folder in (path / "checkpoints").iterdir() if not folder.name.startswith("."))
    clocks = ("seconds", "data_seconds", "images_per_second")
    rows = [{key: value for key, value in row.items() if key not in clocks} for row in run.metrics]
    return names, [run.load_checkpoint(name)[0] for name in names], rows


def assert_same_outcome(one, other):
    assert one[0] == other[0] and one[2] == other[2]
    for name, mine, theirs in zip(one[0], one[1], other[1], strict=True):
        assert set(mine) == set(theirs) == {"model", "ema", "optimizer"}
        assert all(same(mine[part], theirs[part]) for part in mine), name


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "uninterrupted"
    finish(path)
    assert outcome(path)[0] == ["best", "epoch-0003", "epoch-0004", "last"]
    return outcome(path)


def killed(path, step=None, count=0, seconds=0.0):
    """Lets a training work and be killed; False if it came to its end before."""
    process = start(path, step=step, count=count)
    if step is None:
        time.sleep(seconds)
        process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def finish(path):
    process = start(path)
    process.join()
    assert process.exitcode == 0


def test_a_few_kills(uninterrupted, tmp_path):
    path = tmp_path / "run"
    assert killed(path, "writes a tensor file", 4) and killed(path, "renames a folder", 3)
    finish(path)
    assert_same_outcome(outcome(path), uninterrupted)


@pytest.mark.slow
def test_twenty_kills(uninterrupted, tmp_path, capsys):
    """At random moments, by the clock and by itself in the middle of a save; each training is killed until it ends."""
    rng, kills, number = random.Random(1), dict.fromkeys(["by the clock", *STEPS], 0), 0
    while sum(kills.values()) < 20:
        number += 1
        path, over = tmp_path / f"run-{number}", False
        while not over and sum(kills.values()) < 20:
            step = list(kills)[sum(kills.values()) % len(kills)]
            count = rng.randrange(2 if step == "renames a file" else 12)  # it is done once an epoch
            over = not killed(path, step if step in STEPS else None, count, rng.uniform(0.05, 1.5))
            kills[step] += not over
        finish(path)
        assert_same_outcome(outcome(path), uninterrupted)
    with capsys.disabled():
        print(f"\n{number} trainings, {sum(kills.values())} kills: {kills}")
    assert min(kills.values()) >= 1


# -- stopped without a kill: every place in an epoch, workers, images from files --


class Stopped(BaseException):
    """What stands for a kill in this process."""


@pytest.mark.parametrize("optimizer, stop_at", [*(("adamw", i) for i in (0, 3, 4, 5, 9)), ("muon", 5)])
def test_resume_with_files_and_workers(colours, tmp_path, monkeypatch, optimizer, stop_at):
    """Four steps an epoch; saved every second one; images cropped at random by two processes."""
    args = dict(TINY, depths=[2], width=8, drop_path_rate=0.3)
    kind = dict(augment="crop", flip=True, erase=0.5, precision="bf16", channels_last=True, optimizer=optimizer)
    options = tiny_options(epochs=3, batch_size=8, save_every="2", model_args=args, workers=2, **kind)
    train_classifier(colours, tmp_path / "whole", options)
    real, count = loop.backward, [0]

    def stopping(*given):
        if count[0] == stop_at:
            raise Stopped
        count[0] += 1
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "backward", stopping)
        with pytest.raises(Stopped):
            train_classifier(colours, tmp_path / "parts", options)
    resume_classifier(tmp_path / "parts", {"workers": 0})
    assert_same_outcome(outcome(tmp_path / "parts"), outcome(tmp_path / "whole"))


@pytest.mark.parametrize("stop_at", ["best", "append_metrics", "epoch-0001", "last"])
def test_stopped_among_the_files_of_an_epochs_end(colours, tmp_path, monkeypatch, stop_at):
    """Whatever of the first epoch's end is written, rows of metrics and the best checkpoint come out the same."""
    options = tiny_options(epochs=2, batch_size=16, save_every="1", keep_every=1)
    train_classifier(colours, tmp_path / "whole", options)
    save, append = Run.save_checkpoint, Run.append_metrics

    def stopping_save(run, name, tensors, state):
        if name == stop_at and state["epoch"] == 1:
            raise Stopped
        save(run, name, tensors, state)

    def stopping_append(run, row):
        if stop_at == "append_metrics":
            raise Stopped
        append(run, row)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save_checkpoint", stopping_save)
        patch.setattr(Run, "append_metrics", stopping_append)
        with pytest.raises(Stopped):
            train_classifier(colours, tmp_path / "parts", options)
    assert Run.open(tmp_path / "parts").load_checkpoint("last")[1]["epoch"] == 0
    resume_classifier(tmp_path / "parts")
    assert_same_outcome(outcome(tmp_path / "parts"), outcome(tmp_path / "whole"))


def test_what_is_random_belongs_to_seed_step_and_process(colours, tmp_path, monkeypatch):
    seeds, seed = [], loop.seed_everything
    monkeypatch.setattr(loop, "seed_everything", lambda value: (seeds.append(value), seed(value)))
    train_classifier(colours, tmp_path / "run", tiny_options(epochs=2, batch_size=16, seed=7))
    assert seeds == [mixed_seed(7, step, 0) for step in range(4)]


def test_resume_of_a_finished_run_changes_nothing(digits_run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(digits_run[0].path, copy)
    before = tree(copy)
    run, metrics, _ = resume_classifier(copy)
    assert tree(copy) == before and metrics["top1"] == pytest.approx(digits_run[1]["top1"]) and len(run.metrics) == 3


# -- what cannot be gone on with --


@pytest.fixture
def stopped(colours, tmp_path, monkeypatch):
    """A run that was stopped in its second epoch."""
    real, count = loop.backward, [0]

    def stopping(*given):
        count[0] += 1
        if count[0] == 4:
            raise Stopped
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "backward", stopping)
        with pytest.raises(Stopped):
            train_classifier(colours, tmp_path / "run", tiny_options(epochs=2, batch_size=16))
    return tmp_path / "run"


def test_changed_data_are_refused(stopped, colours):
    extra = colours / "red" / "extra.png"
    extra.write_bytes((colours / "red" / "1.png").read_bytes())
    with pytest.raises(RunError, match=r"not what .*: images, labels, captions .*--init-from"):
        resume_classifier(stopped)
    extra.unlink()
    colours.rename(colours.with_name("moved"))
    moved = colours.with_name("moved")
    run, _, _ = resume_classifier(stopped, data=moved)
    assert len(run.metrics) == 2
    # the run says where its data are now, in both of its files
    assert json.loads((stopped / "config.json").read_text())["data"]["where"] == str(moved)
    assert read_file(stopped / "options.yaml")["data"] == str(moved)
    assert evaluate(stopped, moved, workers=0)[0]["split"] == "val"


def test_what_moved_is_noted_where_it_stands_and_nowhere_else(tmp_path):
    config = {"base": {"path": "/old", "digest": "x"}, "data": {"where": "/a"}}
    config["options"] = {"base": "/old", "more": {"base": "/mine"}}
    text = "more: {\nbase: /mine,\ndata: 3}\nbase: /old  # here\ndata: /a\n"
    run = Run.create(tmp_path / "run", config, options=text)
    run.moved("base", "path", "/new")
    run.moved("data", "where", "/b")
    found = Run.open(tmp_path / "run").config
    assert (found["base"], found["data"]) == ({"path": "/new", "digest": "x"}, {"where": "/b"})
    assert found["options"] == {"base": "/new", "more": {"base": "/mine"}}
    written = (tmp_path / "run/options.yaml").read_text()
    assert written == text.replace("base: /old", "base: /new").replace("data: /a", "data: /b")
    (tmp_path / "run/options.yaml").unlink()
    run.moved("base", "path", "/newer")  # of a run without the file
    assert Run.open(tmp_path / "run").config["base"]["path"] == "/newer"


def test_an_image_of_the_same_size_and_time_is_other_data(stopped, colours):
    other_byte(colours / "green" / "7.png")
    with pytest.raises(RunError, match="not what"):
        resume_classifier(stopped)
    other_byte(colours / "green" / "7.png")
    assert len(resume_classifier(stopped)[0].metrics) == 2


def test_a_run_that_an_older_version_began_goes_on(stopped, colours, capsys):
    """Its fingerprint is of names and sizes, and is compared as such, which is told."""
    config = json.loads((stopped / "config.json").read_text())
    config["data"]["fingerprint"] = open_data(colours).fingerprint(like="")
    assert len(config["data"]["fingerprint"]) == 64
    (stopped / "config.json").write_text(json.dumps(config))
    file = colours / "green" / "7.png"
    content = file.read_bytes()
    file.write_bytes(content + b"longer")
    with pytest.raises(RunError, match="not what"):
        resume_classifier(stopped)
    file.write_bytes(content)
    run, _, _ = resume_classifier(stopped, console=Console(width=200))
    assert len(run.metrics) == 2 and "names and sizes" in capsys.readouterr().out


def test_options_of_the_result_cannot_change(stopped):
    with pytest.raises(OptionError, match=r"lr .*0\.005.* 0\.1 .*: .*workers.*--init"):
        resume_classifier(stopped, {"lr": 0.1})
    with pytest.raises(OptionError, match=r"epochs.*'x'"):
        resume_classifier(stopped, {"epochs": "x"})
    resume_classifier(stopped, {"lr": 0.005, "save_every": "never", "keep_every": 1})
    assert Run.open(stopped).has_checkpoint("epoch-0002")


def test_damaged_foreign_and_newer_checkpoints_are_refused(stopped, monkeypatch):
    last = stopped / "checkpoints" / "last"
    good = {file.name: file.read_bytes() for file in last.iterdir()}

    def refused(name, content, message):
        (last / name).write_bytes(content)
        with pytest.raises(RunError, match=message):
            resume_classifier(stopped)
        (last / name).write_bytes(good[name])

    state = good["state.json"]
    refused("optimizer.safetensors", good["optimizer.safetensors"][:-10], r"last is damaged")
    refused("model.safetensors", b"\x80\x02}q\x00.", r"last is damaged")  # a pickle
    refused("model.safetensors", good["optimizer.safetensors"], r"model: .*missing")
    refused("optimizer.safetensors", good["model.safetensors"], r"optimizer state.*not trained")
    refused("state.json", state[:40], r"last is damaged")
    refused("state.json", b"[1]", r"not the state")
    refused("state.json", state.replace(b'"format": 2', b'"format": 3'), r"newer gspn \(format 3; .* 2\)")
    refused("state.json", state.replace(b'"format": 2,', b""), r"older gspn")
    refused("state.json", state.replace(b'"position"', b'"place"'), r"KeyError: 'position'")
    refused("state.json", state.replace(b'"step": 2', b'"step": "2"'), r"ValueError: counts")
    refused("state.json", state.replace(b'"unreadable": [', b'"readable": ['), r"KeyError: 'unreadable'")
    ema = (last / "ema.safetensors").read_bytes()
    (last / "ema.safetensors").unlink()
    for use in (resume_classifier, lambda path: load_classifier(path, "last")):
        with pytest.raises(RunError, match=r"last is damaged: .*ema\.safetensors"):
            use(stopped)
    (last / "ema.safetensors").write_bytes(ema)
    config, metrics = stopped / "config.json", stopped / "metrics.jsonl"
    for file, old, new, message in (
        (config, b'"preprocessing"', b'"processing"', "KeyError: 'preprocessing'"),
        (config, b'"options"', b'"choices"', "no options"),
        (metrics, b'"epoch"', b'"era"', "rows with an epoch"),
    ):
        before = file.read_bytes()
        file.write_bytes(before.replace(old, new))
        with pytest.raises(RunError, match=message):
            resume_classifier(stopped)
        file.write_bytes(before)
    resume_classifier(stopped)


def test_trained_weights_are_the_start_also_before_the_first_checkpoint(digits_run, tmp_path, monkeypatch):
    shutil.copytree(digits_run[0].path, tmp_path / "source")
    options = tiny_options(init_from=str(tmp_path / "source"), model_args={}, save_every="never")
    train_classifier("digits", tmp_path / "whole", options)
    real, count = loop.backward, [0]

    def stopping(*given):
        count[0] += 1
        if count[0] == 3:
            raise Stopped
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "backward", stopping)
        with pytest.raises(Stopped):
            train_classifier("digits", tmp_path / "parts", options)
    shutil.copytree(tmp_path / "parts", tmp_path / "other")
    resume_classifier(tmp_path / "parts")
    assert_same_outcome(outcome(tmp_path / "parts"), outcome(tmp_path / "whole"))
    best = tmp_path / "source" / "checkpoints" / "best" / "ema.safetensors"
    best.write_bytes((tmp_path / "whole" / "checkpoints" / "best" / "ema.safetensors").read_bytes())
    with pytest.raises(RunError, match=r"source .*started from"):
        resume_classifier(tmp_path / "other")


def test_two_trainings_in_one_folder(tmp_path, stopped, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0.1)
    with writing(stopped):
        with pytest.raises(BusyError, match=rf"another gspn \(process {os.getpid()} on .*run"):
            resume_classifier(stopped)
        with pytest.raises(BusyError, match="another gspn"):
            train_classifier("digits", stopped, tiny_options(), overwrite=True)
    resume_classifier(stopped)


def test_a_folder_whose_lock_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0.1)
    (tmp_path / "run" / ".lock").mkdir(parents=True)
    with pytest.raises(files.SaveError, match=r"run/\.lock"):
        train_classifier("digits", tmp_path / "run", tiny_options())


def test_a_killed_training_leaves_no_lock(tmp_path, monkeypatch):
    process = start(tmp_path / "run", step="writes a tensor file", count=0)
    process.join()
    assert process.exitcode == -signal.SIGKILL and (tmp_path / "run" / ".lock").exists()
    monkeypatch.setattr(files, "PATIENCE", 0)
    with writing(tmp_path / "run"):
        pass


def test_a_resumed_training_that_diverges_names_the_checkpoint_it_has(stopped, monkeypatch):
    monkeypatch.setattr(loop, "backward", lambda *_: torch.tensor(float("nan")))
    with pytest.raises(TrainingError, match=r"nan at step 3 \(epoch 2, .*`last`.* step 2 \(epoch 1\)"):
        resume_classifier(stopped)


def test_a_folder_beside_the_checkpoints_is_left_alone(stopped):
    """Such as a copy that the user made."""
    copied = stopped / "checkpoints" / "epoch-0010.bak"
    copied.mkdir()
    assert len(resume_classifier(stopped)[0].metrics) == 2
    assert copied.exists()


def test_an_optimizer_of_another_model_is_refused(stopped, colours, tmp_path):
    other = tmp_path / "other"
    train_classifier(colours, other, tiny_options(epochs=1, batch_size=16, model_args=dict(TINY, width=24)))
    name = "checkpoints/last/optimizer.safetensors"
    shutil.copyfile(other / name, stopped / name)
    with pytest.raises(RunError, match=r"optimizer state of .* has the shape .*, expected .* another run"):
        resume_classifier(stopped)
