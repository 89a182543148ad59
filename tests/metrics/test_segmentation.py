"""IoU, boundary F1: against scikit-learn, and where a class is not there. What an evaluation warns of and refuses."""

import math
import shutil

import numpy as np
import pytest
import torch
from scipy import ndimage
from sklearn.metrics import confusion_matrix, jaccard_score

from gspn.data.images import UNREADABLE, DataError
from gspn.data.mask_classes import IGNORED, Classes
from gspn.files import SaveError
from gspn.metrics.classification import warnings_of
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


def test_a_class_without_a_pixel_counts_only_if_it_is_predicted():
    truth = torch.tensor([[0, 0, 1, 1, 1, IGNORED]]).byte()
    taken = torch.tensor([[0, 1, 1, 1, 2, 3]]).byte()  # what is taken for 3 is ignored
    confusion = confusion_of(taken, truth, 4)
    iou, known = intersection_over_union(confusion), truth != IGNORED
    assert iou[:3].tolist() == pytest.approx([1 / 2, 2 / 4, 0]) and iou[3].isnan()
    outcome = Segmented(torch.tensor([0]), torch.tensor([0]), confusion, torch.tensor([5.0]), torch.tensor([5.0]), None)
    metrics = outcome.metrics(CLASSES)
    assert metrics["miou"] == pytest.approx(jaccard_score(truth[known], taken[known], average="macro"))
    assert metrics["iou"] == {"a": 0.5, "b": 0.5, "c": 0, "d": None}
    assert [each.partition("; ")[2] for each in warnings_of(metrics, [], "pixel", "it")] == [
        "it is over the others: d",
        "it counts them as 0, because they were predicted: c",
    ]
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


def test_boundaries_are_as_far_as_scipy_says():
    truth = (torch.rand(400, 300) < 0.002).byte()
    taken = truth.roll((3, 3), (0, 1))  # farther than 4 pixels, which are 0.75% of the diagonal
    reach, expected = 4, []
    for number in range(2):
        edges = [side == number for side in (taken.numpy(), truth.numpy())]
        edges = [inside & ~ndimage.binary_erosion(inside, np.ones((3, 3)), border_value=1) for inside in edges]
        near = [ndimage.distance_transform_edt(~edge) <= reach for edge in edges]
        precision, recall = near[1][edges[0]].mean(), near[0][edges[1]].mean()
        expected.append(2 * precision * recall / (precision + recall))
    assert boundary_scores(taken, truth) == (pytest.approx(sum(expected), rel=1e-5), 2)
    thin = torch.tensor([[0, 1, 1, 0] * 500]).byte()  # lower than the distance
    assert boundary_scores(thin, thin) == (2.0, 2)


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
