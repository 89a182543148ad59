"""Distances between sets of features: closed forms, and the figures of torch-fidelity on the same features."""

import numpy as np
import pytest
import torch

from gspn.metrics import distances
from gspn.metrics.distances import Moments, Score, frechet_distance, kernel_distance, precision_recall


def rotation(d, seed=0):
    return np.linalg.qr(np.random.RandomState(seed).randn(d, d))[0]


@pytest.mark.parametrize("rounding", [0, 4e-15, -4e-15])
def test_frechet_distance_of_commuting_covariances(rounding):
    """One is singular, and what is rounding in it must not show: an eigenvalue of 4e-15 has the root 6e-8."""
    turn, a, b = rotation(6), np.arange(1.0, 7), np.array([4.0, 0, 9, 1, 0.5, 2])
    mean = np.arange(6.0)
    expected = 6 * 0.25 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    singular = turn @ np.diag(b) @ turn.T + rounding * np.eye(6)
    value = frechet_distance(mean, turn @ np.diag(a) @ turn.T, mean + 0.5, singular)
    # the roots that are left are of 0.5 and more: their rounding is some eps of 9, 6 times
    assert value == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_of_others():
    # of 2x2 matrices: tr (AB)^(1/2) = sqrt(tr AB + 2 sqrt(det A det B))
    a, b = np.array([[2.0, 0.5], [0.5, 1]]), np.array([[1.0, -0.7], [-0.7, 3]])
    shared = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a) * np.linalg.det(b)))
    assert frechet_distance([0, 0], a, [3, 4], b) == pytest.approx(25 + 3 + 4 - 2 * shared, rel=1e-12)
    # of uu^T and vv^T, which are singular: |u|^2 + |v|^2 - 2 |u.v|
    u, v = np.random.RandomState(1).randn(2, 50)
    value = frechet_distance(np.zeros(50), np.outer(u, u), np.zeros(50), np.outer(v, v))
    assert value == pytest.approx(u @ u + v @ v - 2 * abs(u @ v), rel=1e-12)


def test_frechet_distance_of_the_same_is_zero():
    x = np.random.RandomState(2).randn(20, 64) * np.logspace(-6, 3, 64)  # fewer than dimensions, and badly scaled
    mean, covariance = x.mean(0), np.cov(x, rowvar=False)
    assert 0 <= frechet_distance(mean, covariance, mean, covariance) < 1e-9 * np.trace(covariance)


def test_frechet_distance_refuses_what_it_cannot_compare():
    with pytest.raises(ValueError, match=r"mean \(d,\).*\(3,\), \(3, 3\), \(2,\), \(2, 2\)"):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(2), np.eye(2))
    with pytest.raises(ValueError, match="no finite numbers"):
        frechet_distance(np.zeros(2), np.eye(2) * np.nan, np.zeros(2), np.eye(2))


def test_the_figures_of_torch_fidelity():
    """torch-fidelity 0.4.0 gave these for the same features (kid_subset_size=250, else its own defaults)."""
    draw, d = np.random.RandomState(7), 12
    mix = draw.randn(d, d)
    reference = torch.from_numpy(draw.randn(300, d) @ mix)
    samples = torch.from_numpy(draw.randn(250, d) @ (mix + 0.3 * draw.randn(d, d)) + 0.4)
    logits = torch.from_numpy(3 * draw.randn(250, 5))
    moments, score = [Moments.empty(d), Moments.empty(d)], Score(250, 5)
    for each, rows in zip(moments, (samples, reference), strict=True):
        for batch in rows.split(64):
            each.add(batch)
    for index in torch.arange(250).split(64):
        score.add(index, logits[index])
    value = frechet_distance(*(x for each in moments for x in (each.mean, each.covariance())))
    assert value == pytest.approx(10.251059803015835, rel=1e-9)
    assert kernel_distance(samples, reference) == pytest.approx((14.223440507048362, 2.60175890244203, 250), rel=1e-9)
    assert precision_recall(samples, reference) == pytest.approx((0.82, 0.8333333), abs=1e-6)
    assert score.value() == pytest.approx((2.537075332193515, 0.19426852860791027), rel=1e-9)


def test_moments_do_not_depend_on_batches_and_bear_a_large_mean():
    x = torch.randn(101, 7, dtype=torch.float64) + 1e6
    moments = Moments.empty(7)
    for rows in (x[:1], x[1:1], x[1:60], x[60:]):
        moments.add(rows)
    assert np.allclose(moments.covariance().numpy(), np.cov(x.numpy(), rowvar=False), rtol=1e-8)
    assert torch.allclose(moments.mean, x.mean(0), rtol=1e-13, atol=0)
    one = Moments.empty(2)
    one.add(torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"two images.* 1"):
        one.covariance()


def test_kernel_distance_is_the_unbiased_estimate():
    x, y = torch.randn(6, 3), torch.randn(6, 3) + 1
    kernel = lambda a, b: (float(a.double() @ b.double()) / 3 + 1) ** 3  # noqa: E731
    pairs = [(i, j) for i in range(6) for j in range(6)]
    within = sum(kernel(each[i], each[j]) for each in (x, y) for i, j in pairs if i != j) / 30
    expected = within - 2 * sum(kernel(x[i], y[j]) for i, j in pairs) / 36
    mean, std, size = kernel_distance(x, y)  # every subset of six of six is all of them
    assert (mean, std, size) == (pytest.approx(expected, rel=1e-9), pytest.approx(0, abs=1e-9), 6)
    with pytest.raises(ValueError, match=r"two images.* 1 and 6"):
        kernel_distance(x[:1], y)


def test_precision_and_recall_of_what_covers_one_mode_of_two():
    reference = torch.cat([torch.randn(100, 2), torch.randn(100, 2) + 100])
    assert precision_recall(reference[:100], reference) == (1, 0.5)
    assert precision_recall(reference, reference[:100]) == (0.5, 1)
    assert precision_recall(reference - 1000, reference) == (0, 0)
    with pytest.raises(ValueError, match=r"more than 3 images.* 3 and 200"):
        precision_recall(reference[:3], reference)


def test_copies_are_near_whatever_rounding_makes_of_their_distance(monkeypatch):
    reference = torch.randn(60, 37, dtype=torch.float64).repeat(4, 1) + 1e4  # each has three copies: radii of 0
    monkeypatch.setattr(distances, "ROWS", 5)  # a row by itself is multiplied, and rounded, in another way
    assert precision_recall(reference[:6], reference)[0] == 1
    assert precision_recall(reference[:6] + 1e-2, reference)[0] == 0


def test_the_score_of_sure_answers_is_the_number_of_classes():
    sure = torch.eye(4).repeat(50, 1) * 1000
    score = Score(200, 4)
    score.add(torch.arange(200), sure)
    assert score.value()[0] == pytest.approx(4, rel=0.2)  # not every part has as many of each
    unsure = Score(200, 4)
    unsure.add(torch.arange(200), torch.zeros(200, 4))
    assert unsure.value() == pytest.approx((1, 0), abs=1e-12)
    unsure.add(torch.tensor([0]), torch.full((1, 4), torch.nan))
    assert all(value != value for value in unsure.value())
    assert Score(3, 2).part.sort().values.tolist() == [0, 1, 2]
