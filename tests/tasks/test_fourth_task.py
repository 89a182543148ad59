"""A task is a TaskSpec and a Setup: command, run folder, resuming and refusals follow from them."""

import sys
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch.nn.functional as F
import typer
from helpers.training import OneLayer
from typer.testing import CliRunner

import gspn
from gspn import cli
from gspn.cli import training
from gspn.data.images import Preprocessing
from gspn.data.loader import batches, make_loader
from gspn.data.unreadable import Unreadable
from gspn.options import TASKS, DataOptions, LoopOptions, TaskSpec
from gspn.tasks import base
from gspn.tasks.held_out import HeldOutTask
from gspn.train.run import Run, RunError

PREPROCESSING = Preprocessing(1, (8, 8), (0.5,), (0.5,))


@dataclass(frozen=True, kw_only=True)
class FourthOptions(DataOptions, LoopOptions):
    """The options of the task."""


class Fourth(HeldOutTask):
    def __init__(self, loader, unreadable):
        super().__init__(unreadable)
        self.loader = loader

    def prepare(self, batch):
        self.unreadable.saw(batch)
        return {"image": PREPROCESSING.normalize(batch["image"]), "label": batch["label"]}

    def count(self, batch):
        return (batch["label"] >= 0).sum()

    def losses(self, model, batch):
        return F.cross_entropy(model(batch["image"]), batch["label"], reduction="none")

    def loss(self, model, batch):
        return self.losses(model, batch).sum()

    def held_out_losses(self, model):
        for batch in batches(self.loader):
            prepared = {"image": PREPROCESSING.normalize(batch["image"]), "label": batch["label"]}
            yield batch, {"val_loss": self.losses(model, prepared)}

    def metrics(self, means):
        return means

    def line(self, row):
        return f"fourth: {row['val_loss']:.3f}"


SPEC = TaskSpec(
    name="fourth",
    command="train-fourth",
    help="Train the fourth task.",
    module="fourth_task",
    options=FourthOptions,
    data_help="The digits.",
    label=lambda options: "fourth",
    written=("masks.txt", "pictures/*.txt"),
    taken_by="nobody takes it",
)


class Setup(base.Setup):
    spec = SPEC

    @classmethod
    def of(cls, where, options, *, resuming=False):
        data = base.open_with(where, options)
        train_split, eval_split, name, _ = base.labelled_splits(data)
        options = options.resolved({"epochs": 1, "batch_size": 512, "lr": 0.01})
        splits = dict(train_split=train_split, eval_split=eval_split, eval_name=name)
        return cls(data=data, **splits, options=options, notes=[])

    def model(self, device):
        return OneLayer().to(device)

    def config(self, model):
        return {"size": [8, 8]}

    def about(self, model):
        return f"one layer, {base.parameters_of(model)}", "of digits", ()

    def train(self, run):
        options = self.options
        held_out = run.accelerator.prepare(make_loader(self.eval_split, PREPROCESSING, options.batch_size))
        task = Fourth(held_out, Unreadable({"train": self.train_split, "evaluation": self.eval_split}))
        loader = make_loader(self.train_split, PREPROCESSING, options.batch_size, train=True)
        (run.run.path / "masks.txt").write_text("a mask")
        (run.run.path / "pictures").mkdir(exist_ok=True)
        (run.run.path / "pictures" / "1.txt").write_text("a picture")
        run.loop(task, loader, options)
        return run.run, []


@pytest.fixture
def command(monkeypatch):
    monkeypatch.setitem(TASKS, "fourth", SPEC)
    monkeypatch.setitem(sys.modules, "fourth_task", SimpleNamespace(Setup=Setup))
    app = typer.Typer()
    app.callback()(lambda: None)
    monkeypatch.setattr(training, "app", app)
    training.add_command(SPEC)
    return lambda *arguments: CliRunner().invoke(app, ["train-fourth", *map(str, arguments)])


def test_a_task_needs_its_own_files_only(command, tmp_path):
    run = tmp_path / "run"
    result = command("digits", "--out", run)
    assert result.exit_code == 0, result.output
    assert "one layer" in result.stdout and "masks.txt, pictures; nobody" in result.stdout.replace("\n", " ")
    assert Run.open(run).config["task"] == "fourth" and Run.open(run).metrics[0]["images"] == 359
    result = command("--resume", run, "--workers", 0)
    assert result.exit_code == 0 and "nothing" in result.stdout
    result = command("--resume", run, "--lr", 1)
    assert result.exit_code == 2 and "lr" in result.stderr and "0.01" in result.stderr
    with pytest.raises(RunError, match=r"fourth.* nobody"):
        gspn.load_run(run)
    (run / "mine.txt").write_text("not of the run")
    Run.create(run, {"task": "fourth"}, overwrite=True)
    assert not (run / "masks.txt").exists() and (run / ".earlier" / "masks.txt").exists()
    assert (run / "mine.txt").exists()


def test_every_task_has_a_setup_and_a_command():
    commands = {each.name for each in cli.app.registered_commands}
    for name, spec in TASKS.items():
        assert spec.name == name and spec.command in commands
        assert import_module(spec.module).Setup.spec is spec
