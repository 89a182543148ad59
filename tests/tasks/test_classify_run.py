"""The run folder: overwriting, crashes, damage."""

import os
import shlex
import shutil
from dataclasses import asdict

import pytest
import torch
from helpers.fresh import fresh
from helpers.training import tiny_options, tree
from torch import nn

from gspn.files import SaveError, atomic, is_temporary, write_json, writing
from gspn.metrics.classification import evaluate
from gspn.options import OptionError, Options
from gspn.options.classify import SPEC
from gspn.runs import load_classifier
from gspn.tasks.base import changed
from gspn.tasks.classify import train_classifier
from gspn.train import run as run_folder
from gspn.train.loop import TrainingError
from gspn.train.run import FORMAT, Run, RunError


def test_run_folder_in_the_way(digits_run, tmp_path):
    run, _ = digits_run
    with pytest.raises(RunError, match=r"not empty.*--overwrite"):
        train_classifier("digits", run.path, tiny_options())
    (tmp_path / "letters.txt").write_text("dear")
    with pytest.raises(RunError, match="no run"):
        train_classifier("digits", tmp_path, tiny_options(), overwrite=True)
    with pytest.raises(RunError, match="a file"):
        train_classifier("digits", tmp_path / "letters.txt", tiny_options())
    assert (tmp_path / "letters.txt").read_text() == "dear"
    other = Run.create(tmp_path / "other", {"task": "x"})
    (other.path / "mine.txt").write_text("stays")
    other.append_metrics({"epoch": 1})
    run = Run.create(tmp_path / "other", {"task": "y"}, overwrite=True)
    run.save_checkpoint("best", {}, {"epoch": 1})
    assert {file.name for file in other.path.iterdir()} == {"config.json", "checkpoints", "mine.txt"}


def test_the_command_that_resumes_a_run_can_be_pasted(tmp_path):
    path = tmp_path / "my first; run"
    Run.create(path, {"task": "classification"})
    with pytest.raises(RunError, match="is not empty") as error:
        Run.check_free(path)
    command = str(error.value).split("`")[1]
    assert shlex.split(command) == ["gspn", "train", "--resume", str(path)]


def test_a_run_from_before_there_was_a_choice_goes_on_with_adamw():
    before = {name: value for name, value in asdict(Options(preset="small")).items() if name != "optimizer"}
    assert changed({"options": before}, {}, SPEC).optimizer == "adamw"


def test_overwrite_with_a_bad_option_keeps_the_earlier_run(digits_run):
    run, _ = digits_run
    with pytest.raises(OptionError, match="there is no model 'gspn_huge'"):
        train_classifier("digits", run.path, Options(model="gspn_huge"), overwrite=True)
    assert Run.open(run.path).metrics == run.metrics


@pytest.fixture
def full_run(tmp_path):
    """A run with one of everything, each file of its own content."""
    run = Run.create(tmp_path / "run", {"task": "classification", "options": {"tensorboard": False}})
    for name in ("last", "best"):
        run.save_checkpoint(name, {"model": {"w": torch.ones(3)}}, {"epoch": 1, "name": name})
    run.append_metrics({"epoch": 1})
    for name in ("curves", "predictions", "context", "context-old"):
        (run.path / f"{name}.png").write_text(name)
    for name in FOREIGN:
        (run.path / name).parent.mkdir(exist_ok=True)
        (run.path / name).write_text("not the run's")
    return run


# What lies in the run's folder and no classifier's training writes.
FOREIGN = ("mine.txt", "samples/epoch-0001.png", "samples/samples.json", "tensorboard/events.out.tfevents.1.mine")


def test_overwritten_run_waits_until_the_new_one_has_a_checkpoint(full_run):
    before = tree(full_run.path)
    run = Run.create(full_run.path, {"task": "new"}, overwrite=True)
    assert {name for name in tree(run.path) if ".earlier" not in name} == {"config.json", *FOREIGN}
    assert tree(run.path / ".earlier") == {name: data for name, data in before.items() if name not in FOREIGN}
    assert Run.open(run.path / ".earlier").load_checkpoint("best")[1]["name"] == "best"
    with pytest.raises(RunError, match=r"checkpoint 'best'.*\.earlier"):
        run.load_checkpoint("best")
    run.save_checkpoint("last", {"model": {}}, {"epoch": 1})
    assert (run.path / ".earlier").exists()
    run.save_checkpoint("best", {"model": {}}, {"epoch": 1})
    assert {name for name in tree(run.path) if not name.startswith("checkpoints")} == {"config.json", *FOREIGN}
    assert not run.restore_earlier()


@pytest.mark.parametrize("tensorboard", [True, False])
def test_overwriting_a_generator_s_run_takes_its_pictures_and_no_others(tmp_path, tensorboard):
    """Also what TensorBoard was shown: that of older versions by the options, and all that has our suffix."""
    run = Run.create(tmp_path, {"task": "diffusion", "options": {"tensorboard": tensorboard}})
    own = {"samples/epoch-0001.png", "samples/epoch-0010.png", "curves.png", "tensorboard/events.out.tfevents.2.gspn"}
    other = {"samples/samples.json", "samples/images/000000-a.png", "predictions.png", "context-cat.png"}
    (own if tensorboard else other).add("tensorboard/events.out.tfevents.1.host")
    for name in own | other:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    before = tree(tmp_path)
    run = Run.create(tmp_path, {"task": "classification"}, overwrite=True)
    assert set(tree(tmp_path)) == {"config.json", ".earlier/config.json", *other, *(f".earlier/{each}" for each in own)}
    assert run.restore_earlier() and tree(tmp_path) == before and not (tmp_path / ".earlier").exists()


def test_overwritten_run_comes_back_when_the_new_one_fails(full_run):
    before = tree(full_run.path)
    run = Run.create(full_run.path, {"task": "new"}, overwrite=True)
    run.save_checkpoint("last", {"model": {}}, {"epoch": 1})
    assert run.restore_earlier() and tree(run.path) == before
    assert not run.restore_earlier() and tree(run.path) == before


def test_overwritten_run_that_a_crash_did_not_get_to_remove_is_not_put_back(full_run, tmp_path):
    run = Run.create(full_run.path, {"task": "new"}, overwrite=True)
    shutil.copytree(run.path / ".earlier", tmp_path / "left")
    run.save_checkpoint("best", {"model": {}}, {"epoch": 1})
    before = tree(run.path)
    (tmp_path / "left").rename(run.path / ".earlier")
    assert Run.create(run.path, {"task": "newer"}, overwrite=True).restore_earlier() and tree(run.path) == before


def test_training_that_diverges_at_once_leaves_the_run_it_was_to_overwrite(colours, tmp_path):
    options = dict(batch_size=16)
    run, _, _ = train_classifier(colours, tmp_path / "run", tiny_options(**options))
    before = tree(run.path)
    with pytest.raises(TrainingError, match="no checkpoint"):
        train_classifier(colours, run.path, tiny_options(lr=1e30, clip=0.0, **options), overwrite=True)
    assert tree(run.path) == before and evaluate(run.path, colours, workers=0)[0]["split"] == "val"


class Killed(BaseException):
    """What stands for a kill: nothing may catch it and go on."""


def test_kill_at_any_step_of_overwriting_loses_nothing(full_run, monkeypatch):
    """Killed before each rename or removal of a file in turn, overwriting can be done again and can be undone."""
    before = tree(full_run.path)
    monkeypatch.setattr("gspn.files._alive", lambda process: False)  # this process stands for those that were killed
    steps = {name: getattr(os, name) for name in ("rename", "replace", "unlink", "rmdir")}
    for kill_at in range(40):
        count = [0]

        def step(name, count=count, kill_at=kill_at):
            def run(*args, **more):
                count[0] += 1
                if count[0] > kill_at:  # everything after it fails too: a dead process does no cleaning up
                    raise Killed
                return steps[name](*args, **more)

            return run

        with monkeypatch.context() as patch:
            for name in steps:
                patch.setattr(os, name, step(name))
            try:
                Run.create(full_run.path, {"task": "new"}, overwrite=True).restore_earlier()
                done = True
            except Killed:
                done = False
        with writing(full_run.path):
            Run.create(full_run.path, {"task": "newer"}, overwrite=True).restore_earlier()
        assert tree(full_run.path) == before, f"killed at step {kill_at}"
        if done:
            return
    pytest.fail("overwriting never came to its end")


def test_overwriting_that_the_system_refuses_is_an_error_that_tells_and_undoes(full_run, monkeypatch):
    before, replace = tree(full_run.path), os.replace

    def refuse(source, target):
        if str(source).endswith("metrics.jsonl"):
            raise PermissionError(13, "Permission denied", str(source))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(SaveError, match=r"earlier run .*Permission denied"):
            Run.create(full_run.path, {"task": "new"}, overwrite=True)
    assert tree(full_run.path) == before

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(SaveError, match=r"config\.json: No space left on device.*untouched"):
        Run.create(full_run.path, {"task": "new"}, overwrite=True)
    assert tree(full_run.path) == before


def test_what_a_kill_left_of_the_start_is_not_in_the_way(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".config.json.new").write_text("{")
    Run.create(tmp_path, {"task": "x"})
    assert Run.open(tmp_path).config["task"] == "x"


def test_metrics_are_taken_back(tmp_path):
    run = Run.create(tmp_path / "run", {"task": "x"})
    for epoch in (1, 2, 3):
        run.append_metrics({"epoch": epoch})
    run.rewind(3)
    assert len(Run.open(run.path).metrics) == 3
    run.rewind(1)
    assert run.metrics == Run.open(run.path).metrics == [{"epoch": 1}]


def test_old_checkpoints_are_pruned(tmp_path):
    run = Run.create(tmp_path / "run", {"task": "x"})
    for name in ("last", "best", *(f"epoch-{epoch:04}" for epoch in (2, 4, 10, 12))):
        run.save_checkpoint(name, {"model": {}}, {})
    run.prune(0)
    assert len(os.listdir(run.path / "checkpoints")) == 6
    run.prune(2)
    assert sorted(os.listdir(run.path / "checkpoints")) == ["best", "epoch-0010", "epoch-0012", "last"]
    run.prune(5)
    assert len(os.listdir(run.path / "checkpoints")) == 4


def test_the_newest_checkpoints_are_kept_whatever_their_number_of_digits(tmp_path):
    run = Run.create(tmp_path / "run", {"task": "x"})
    for epoch in (9998, 9999, 10000):
        run.save_checkpoint(f"epoch-{epoch:04}", {"model": {}}, {})
    run.prune(2)
    assert sorted(os.listdir(run.path / "checkpoints")) == ["epoch-10000", "epoch-9999"]


def test_runs_that_cannot_be_opened(tmp_path):
    with pytest.raises(RunError, match="no run: "):
        Run.open(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RunError, match="cannot be read"):
        Run.open(tmp_path)
    (tmp_path / "config.json").write_text('{"name": "another program\'s"}')
    with pytest.raises(RunError, match="not the config"):
        Run.open(tmp_path)
    write_json(tmp_path / "config.json", {"format": "1"})
    with pytest.raises(RunError, match="not the config"):
        Run.open(tmp_path)
    write_json(tmp_path / "config.json", {"format": FORMAT + 1})
    with pytest.raises(RunError, match=rf"newer gspn .format {FORMAT + 1}; .* {FORMAT}\)"):
        Run.open(tmp_path)
    write_json(tmp_path / "config.json", {"format": FORMAT, "task": "classification"})
    with pytest.raises(RunError, match="damaged or foreign: KeyError: 'model'"):
        load_classifier(tmp_path)


def test_damaged_checkpoint(tmp_path):
    run = Run.create(tmp_path / "run", {"task": "x"})
    with pytest.raises(RunError, match="checkpoint 'best'"):
        run.load_checkpoint("best")
    run.save_checkpoint("best", {"model": {"w": torch.ones(100)}}, {"epoch": 1})
    file = run.path / "checkpoints" / "best" / "model.safetensors"
    assert file.stat().st_mode & 0o777 == (file.parent / "state.json").stat().st_mode & 0o777
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(RunError, match="best is damaged"):
        run.load_checkpoint("best")


def test_checkpoint_survives_a_crash_between_the_renames_and_readers_change_nothing(tmp_path):
    run = Run.create(tmp_path / "run", {"task": "x"})
    run.save_checkpoint("last", {"model": {"w": torch.ones(3)}}, {"epoch": 1})
    folder = run.path / "checkpoints"
    os.rename(folder / "last", folder / ".last.old")
    assert run.load_checkpoint("last")[1]["epoch"] == 1 and os.listdir(folder) == [".last.old"]
    run.save_checkpoint("last", {"model": {"w": torch.zeros(3)}}, {"epoch": 2})
    assert run.load_checkpoint("last")[1]["epoch"] == 2 and os.listdir(folder) == ["last"]


def test_second_crash_between_the_renames_loses_nothing_either(tmp_path, monkeypatch):
    run = Run.create(tmp_path / "run", {"task": "x"})
    run.save_checkpoint("last", {"model": {"w": torch.ones(3)}}, {"epoch": 1})
    folder = run.path / "checkpoints"
    os.rename(folder / "last", folder / ".last.old")  # the first crash
    rename = os.rename

    def crash(source, target):
        if is_temporary(source):
            raise Killed
        rename(source, target)

    monkeypatch.setattr(os, "rename", crash)
    with pytest.raises(Killed):
        run.save_checkpoint("last", {"model": {"w": torch.zeros(3)}}, {"epoch": 2})
    assert run.load_checkpoint("last")[1]["epoch"] == 1


def test_checkpoint_replaced_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    run = Run.create(tmp_path / "run", {"task": "x"})
    run.save_checkpoint("last", {"model": {"w": torch.zeros(3)}}, {"epoch": 0})
    load, count = run_folder.load_file, [0]

    def load_while_training_goes_on(file):
        count[0] += 1
        if count[0] < 3:
            run.save_checkpoint("last", {"model": {"w": torch.full((3,), float(count[0]))}}, {"epoch": count[0]})
        return load(file)

    monkeypatch.setattr(run_folder, "load_file", load_while_training_goes_on)
    tensors, state = run.load_checkpoint("last")
    assert state["epoch"] == 2 and (tensors["model"]["w"] == 2).all()


def test_tied_weights_are_stored_under_both_names(tmp_path):
    run, layer = Run.create(tmp_path / "run", {"task": "x"}), nn.Linear(4, 4)
    tied = {"a": layer.weight, "b": layer.weight, "c": layer.weight[1:].t(), "d": layer.bias}
    run.save_checkpoint("last", {"model": tied}, {})
    stored = run.load_checkpoint("last")[0]["model"]
    assert set(stored) == set(tied) and all(torch.equal(stored[name], tied[name]) for name in tied)


def test_atomic_leaves_nothing_behind(tmp_path):
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(KeyboardInterrupt), atomic(tmp_path / "a.json") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["a.json"] and (tmp_path / "a.json").read_text() == "1\n"
    with pytest.raises(SaveError, match=r"nowhere/a\.json: No such file"):
        write_json(tmp_path / "nowhere" / "a.json", 1)


def test_full_disk_keeps_the_previous_checkpoint(tmp_path):
    """A real one: the system refuses to write a file beyond 100,000 bytes."""
    code = f"""
import resource, signal, torch
from gspn.files import SaveError
from gspn.train.run import Run
run = Run.create({str(tmp_path / "run")!r}, dict(task="x"))
run.save_checkpoint("last", dict(model=dict(w=torch.ones(50_000))), dict(epoch=1))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    run.save_checkpoint("last", dict(model=dict(w=torch.zeros(50_000))), dict(epoch=2))
except SaveError as error:
    print(error)
tensors, state = run.load_checkpoint("last")
assert state["epoch"] == 1 and bool((tensors["model"]["w"] == 1).all())
"""
    result = fresh(code)
    assert "checkpoints/last: " in result.stdout and "File too large" in result.stdout
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["last"]
