"""Evaluation: what is counted, confusion, calibration, other sizes, several processes, what is written."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers.training import TINY, other_byte, tiny_options
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from gspn import plots
from gspn.cli import app
from gspn.data.images import UNREADABLE
from gspn.data.labelled import Data, DataError
from gspn.files import SaveError
from gspn.metrics.classification import Outcome, evaluate, mistakes
from gspn.models import Backbone
from gspn.options import Options
from gspn.tasks.classify import train_classifier


def outcome(label, top, probability):
    label, top = torch.tensor(label), torch.tensor(top)[:, None]
    probability = torch.tensor(probability)[:, None]
    return Outcome(torch.arange(len(label)), label, top, probability, torch.zeros(len(label)), 1.0, 1.0)


# -- what is counted --


def test_calibration_of_answers_counted_by_hand():
    # 10 answers at 0.95 of which 6 are right, 10 at 0.35 of which 4 are right, one unreadable
    label = [0] * 20 + [UNREADABLE]
    top = [0] * 6 + [1] * 4 + [0] * 4 + [1] * 6 + [0]
    error, rows = outcome(label, top, [0.95] * 10 + [0.35] * 10 + [1.0]).calibration()
    assert error == pytest.approx((10 * 0.35 + 10 * 0.05) / 20, abs=1e-6)
    assert [row["images"] for row in rows] == [10, 10]
    assert rows[0]["from"] <= 0.35 <= rows[0]["to"] and rows[0]["accuracy"] == pytest.approx(0.4)
    assert rows[1]["probability"] == pytest.approx(0.95)
    sure = outcome([0, 0], [0, 0], [1.0, 1.0]).calibration()
    assert sure[0] == 0 and sure[1][0]["to"] == 1


def test_a_calibrated_classifier_has_a_small_error():
    probability = torch.rand(20000)
    right = torch.rand(20000) < probability
    each = outcome([0] * 20000, (~right).long().tolist(), probability.tolist())
    assert each.calibration()[0] < 0.02
    overconfident = outcome([0] * 20000, (~right).long().tolist(), probability.sqrt().tolist())
    assert overconfident.calibration()[0] == pytest.approx(2 / 3 - 1 / 2, abs=0.02)


def test_confusion_and_its_mistakes():
    each = outcome([0, 0, 0, 1, 2, 2, UNREADABLE], [0, 1, 1, 1, 0, 2, 0], [0.5] * 7)
    matrix = each.confusion(4)
    assert matrix.tolist() == [[1, 2, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    assert mistakes(matrix, list("abcd")) == [("a", "b", 2), ("c", "a", 1)]
    assert mistakes(matrix, list("abcd"), count=1) == [("a", "b", 2)]
    with pytest.raises(DataError, match="none of the 1 images"):
        outcome([UNREADABLE], [0], [0.5]).confusion(4)


# -- a run --


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "digits"
    options = Options(model_args=TINY, epochs=2, batch_size=64, lr=1e-2, ema=0.8, workers=0)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("curves", "predictions", "context"):
            patch.setattr(plots, name, lambda *args: None)  # they take longer than the training
        return train_classifier("digits", path, options)[0]


def test_metrics_hang_together(run):
    metrics, _ = evaluate(run.path, "digits")
    assert metrics["size"] == [8, 8] and 0 < metrics["ece"] < 1
    rows = metrics["reliability"]
    assert sum(row["images"] for row in rows) == metrics["images"] == 359
    assert sum(row["images"] * row["accuracy"] for row in rows) / 359 == pytest.approx(metrics["top1"])
    wrong = round(359 * (1 - metrics["top1"]))
    assert 0 < sum(count for _, _, count in metrics["confused"]) <= wrong
    assert metrics["model_images_per_second"] >= metrics["images_per_second"] > 0
    json.dumps(metrics)


def test_other_sizes_and_what_is_written(run, tmp_path):
    folder = tmp_path / "new" / "folder"
    result = CliRunner().invoke(
        app, ["eval", str(run.path), "digits", "--sizes", "8, 12x16,24", "--out", str(folder), "--json"]
    )
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["size"] for line in lines] == [[8, 8], [12, 16], [24, 24]]
    assert lines[0]["top1"] == evaluate(run.path, "digits")[0]["top1"] != lines[1]["top1"]
    assert json.loads((folder / "evaluation-12x16.json").read_text()) == lines[1]
    for name in ("8x8", "12x16", "24x24"):
        with Image.open(folder / f"confusion-{name}.png") as picture:
            assert min(picture.size) > 400 and np.asarray(picture.convert("L")).std() > 10
    text = CliRunner().invoke(app, ["eval", str(run.path), "digits", "--sizes", "12"]).output
    assert "359 (test) at 12x12" in text and "calibration error" in text and "without" in text


def test_data_that_changed_or_moved_since_hold_out_others_than_one_expects(colours, tmp_path, monkeypatch):
    for name in ("curves", "predictions", "context"):
        monkeypatch.setattr(plots, name, lambda *args: None)
    run, _, _ = train_classifier(colours, tmp_path / "run", tiny_options(batch_size=16))

    def warned(what, data=colours, **more):
        metrics, warnings = evaluate(run.path, data, workers=0, **more)
        return metrics["split"], any(what in warning for warning in warnings)

    def changed(**more):
        return warned("has changed since", **more)

    def trained_on(**more):
        return warned("most of these images were trained on", **more)

    moved = shutil.copytree(colours, tmp_path / "moved")
    assert changed() == ("val", False)
    assert trained_on(data=moved) == ("all", True) and trained_on() == ("val", False)
    assert trained_on(data=moved, split="val") == ("val", False)
    other_byte(colours / "blue" / "5.png")
    other_byte(moved / "blue" / "5.png")
    assert changed() == ("val", True) and changed(split="all") == ("all", False)
    assert trained_on(data=moved) == ("all", False)
    console, given = Console(quiet=True), []
    monkeypatch.setattr(Data, "fingerprint", lambda self, like, console=None: given.append(console))
    changed(console=console)
    assert given == [console]  # reading all data is long work, of which a user is told


def test_the_part_that_the_run_held_out_is_that_of_a_copy_of_its_data(colours, tmp_path, monkeypatch):
    for name in ("curves", "predictions", "context"):
        monkeypatch.setattr(plots, name, lambda *args: None)
    run, _, _ = train_classifier(colours, tmp_path / "run", tiny_options(batch_size=16, val_fraction=0.25))
    copy = shutil.copytree(colours, tmp_path / "copy")
    metrics, warnings = evaluate(run.path, copy, workers=0)
    assert metrics["split"] == "all" and sum("most of these images were trained on" in each for each in warnings) == 1
    own = evaluate(run.path, colours, workers=0)[0]
    assert own["split"] == "val" and own["images"] < metrics["images"]
    copied, warnings = evaluate(run.path, copy, split="val", workers=0)
    assert copied["images"] == own["images"] and copied["loss"] == own["loss"] and "trained on" not in str(warnings)
    for data in (colours, copy):
        for fraction, warned in ((0.1, 0), (0.25, 0), (0.5, 1)):  # a smaller part lies in the one that was held out
            _, warnings = evaluate(run.path, data, split="val", workers=0, val_fraction=fraction)
            assert sum("val_fraction is 0.5, but was 0.25" in each for each in warnings) == warned, fraction
            assert "has changed" not in str(warnings)
    assert "most of these" in str(evaluate(run.path, copy, workers=0, val_fraction=0.5)[1])
    other_byte(copy / "blue" / "5.png")  # it may be any other data
    assert "val_fraction" not in str(evaluate(run.path, copy, split="val", workers=0, val_fraction=0.5)[1])


def test_the_evaluation_is_not_written_into_the_data(run, colours):
    result = CliRunner().invoke(app, ["eval", str(run.path), str(colours), "--out", str(colours / "evaluation")])
    assert result.exit_code == 2 and "lies in the folder of the data" in result.stderr
    assert not (colours / "evaluation").exists()


def test_a_folder_that_cannot_be_made_is_an_error_before_the_work(run, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(Backbone, "forward", lambda *_, **__: pytest.fail("work was done"))
    with pytest.raises(SaveError, match="file"):
        evaluate(run.path, run.config["data"]["where"], workers=0, out=tmp_path / "file" / "evaluation")


def test_outputs_that_are_not_finite_are_an_error(run, monkeypatch):
    forward = Backbone.forward

    def broken(self, images):
        logits = forward(self, images)
        logits[:3] = torch.nan
        return logits

    monkeypatch.setattr(Backbone, "forward", broken)
    result = CliRunner().invoke(app, ["eval", str(run.path), "digits", "--batch-size", "200", "--json"])
    assert result.exit_code == 2 and "not finite for 6 of 359 images" in result.stderr and result.stdout == ""


def test_faults(run, tmp_path):
    for flag, value, message in (
        ("--sizes", "12,x", "x'"),
        ("--class-names", "a,a", "distinct"),
    ):
        result = CliRunner().invoke(app, ["eval", str(run.path), "digits", flag, value])
        assert result.exit_code == 2 and flag in result.output and message in result.output
    (tmp_path / "file").write_text("x")
    result = CliRunner().invoke(app, ["eval", str(run.path), "digits", "--out", str(tmp_path / "file")])
    assert result.exit_code == 2 and "folder" in result.output


# -- several processes --


@pytest.mark.slow
def test_two_processes_count_no_image_twice(run, tmp_path):
    # 359 images in batches of 102 (101 cannot be shared) over two processes: accelerate pads the last one
    alone, _ = evaluate(run.path, "digits", batch_size=100)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "gspn", "eval", run.path, "digits"]
    result = subprocess.run(
        [str(part) for part in [*command, "--batch-size", 101, "--json", "--out", tmp_path]],
        capture_output=True,
        text=True,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    (line,) = result.stdout.splitlines()  # from one of them only
    together = json.loads(line)
    assert together["images"] == alone["images"] == 359
    for name in ("top1", "top5", "confused"):
        assert json.loads(json.dumps(alone[name])) == together[name]
    assert together["loss"] == pytest.approx(alone["loss"], rel=1e-5)
