"""IoU, boundary F1: against scikit-learn, and where a class is not there. What an evaluation warns of and refuses."""

import math
import shutil

import pytest
import torch
from sklearn.metrics import confusion_matrix, jaccard_score

from gspn.data.images import UNREADABLE, DataError
from gspn.data.mask_classes import IGNORED, Classes
from gspn.files import SaveError
from gspn.metrics.segmentation import Segmented, boundary_scores, confusion_of, evaluate, intersection_over_union
from gspn.models import Segmenter
from gspn.options import OptionError
from gspn.train.run import RunError

CLASSES = Classes(("a", "b", "c", "d"), range(4), ((0, 0, 0),) * 4, (255,))


def test_iou_is_that_of_scikit_learn():
    truth, taken = torch.randint(0, 4, (2, 30, 40)).byte()
    truth[:3] = IGNORED
    confusion, known = confusion_of(taken, truth, 4), truth != IGNORED
    assert confusion.tolist() == confusion_matrix(truth[known], taken[known]).tolist()
    expected = jaccard_score(truth[known], taken[known], average=None)
    assert intersection_over_union(confusion).tolist() == pytest.approx(expected.tolist())


def test_a_class_that_never_occurs_is_not_a_number_and_does_not_count():
    truth = torch.tensor([[0, 0, 1, 1, 1, IGNORED]]).byte()
    taken = torch.tensor([[0, 1, 1, 1, 2, 3]]).byte()  # 2 is taken for something, but there is none
    confusion = confusion_of(taken, truth, 4)
    iou = intersection_over_union(confusion)
    assert iou[:2].tolist() == pytest.approx([1 / 2, 2 / 4]) and iou[2:].isnan().all()
    outcome = Segmented(torch.tensor([0]), torch.tensor([0]), confusion, torch.tensor([5.0]), torch.tensor([5.0]), None)
    metrics = outcome.metrics(CLASSES)
    assert metrics["miou"] == pytest.approx(0.5) and metrics["iou"] == {"a": 0.5, "b": 0.5, "c": None, "d": None}
    assert metrics["missing_classes"] == ["c", "d"] and metrics["pixel_accuracy"] == pytest.approx(3 / 5)
    assert metrics["loss"] == 1 and "boundary_f1" not in metrics


def test_without_a_pair_or_a_labelled_pixel_there_are_no_metrics():
    empty = torch.zeros(4, 4, dtype=torch.int64)
    none = Segmented(torch.tensor([0]), torch.tensor([UNREADABLE]), empty, torch.zeros(1), torch.zeros(1), None)
    with pytest.raises(DataError, match="none of the 1"):
        none.metrics(CLASSES)
    none.label = torch.tensor([0])
    with pytest.raises(DataError, match="ignored"):
        none.metrics(CLASSES)


def test_boundary_f1():
    truth = torch.zeros(100, 100, dtype=torch.uint8)
    truth[:, 50:] = 1
    assert boundary_scores(truth, truth) == (2.0, 2)
    for shift, expected in ((1, 2.0), (2, 0.0)):  # 0.75% of the diagonal is one pixel; the boundaries are two wide
        moved = torch.zeros_like(truth)
        moved[:, 50 + shift :] = 1
        score, count = boundary_scores(moved, truth)
        assert count == 2 and score == pytest.approx(expected), shift
    nothing = torch.zeros_like(truth)
    assert boundary_scores(nothing, nothing) == (1.0, 1) and boundary_scores(nothing, nothing + IGNORED) == (0.0, 0)
    assert math.isclose(boundary_scores(nothing, truth)[0], 0.0)
    assert boundary_scores(nothing + 1, nothing) == (0.0, 1)  # neither has a boundary, but all of it is wrong
    half = truth.clone()
    half[50:] = IGNORED
    assert boundary_scores(moved, torch.where(half == IGNORED, half, moved))[0] == 2.0  # whatever is below


# -- a run --


def test_the_data_of_the_training_in_another_place(masked_run, masked, tmp_path):
    copy = shutil.copytree(masked, tmp_path / "copy")
    metrics, warnings = evaluate(masked_run.path, copy, workers=0)
    assert metrics["split"] == "all" and metrics["images"] == 20
    assert sum("most of these images were trained on" in each for each in warnings) == 1
    own = evaluate(masked_run.path, masked, workers=0)[0]
    copied, warnings = evaluate(masked_run.path, copy, split="val", workers=0)
    assert copied["images"] == own["images"] == 4 and copied["loss"] == own["loss"] and warnings == []
    shutil.copy(copy / "images/00.png", copy / "images/01.png")
    assert evaluate(masked_run.path, copy, workers=0)[1] == []


def test_the_evaluation_is_not_written_into_the_data(masked_run, masked):
    with pytest.raises(OptionError, match="lies in the folder of the data"):
        evaluate(masked_run.path, masked, workers=0, out=masked / "evaluation")


def test_a_folder_that_cannot_be_made_is_an_error_before_the_work(masked_run, masked, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(Segmenter, "forward", lambda *_, **__: pytest.fail("work was done"))
    with pytest.raises(SaveError, match="file"):
        evaluate(masked_run.path, masked, workers=0, out=tmp_path / "file" / "evaluation")


def test_outputs_that_are_not_finite_are_an_error(masked_run, masked, monkeypatch):
    forward = Segmenter.forward
    monkeypatch.setattr(Segmenter, "forward", lambda *args, **more: forward(*args, **more) * math.nan)
    with pytest.raises(RunError, match="not finite for 4 of 4 images"):
        evaluate(masked_run.path, masked, workers=0)
