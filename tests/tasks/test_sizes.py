"""Random sizes of training images: which sizes, and that what is seen is the picture."""

import numpy as np
import pytest
import torch

from gspn.data.images import Split
from gspn.tasks.sizes import ChosenSizes, RandomSizes, enlarged_note


def test_random_sizes():
    torch.manual_seed(0)
    ramp = torch.linspace(-1, 1, 16).expand(3, 2, 12, 16)
    made = [RandomSizes(0.5, 2.0, 4)(ramp) for _ in range(40)]
    heights, widths = {x.shape[2] for x in made}, {x.shape[3] for x in made}
    assert heights == {4 * i for i in range(2, 7)} | ({4} & heights) and widths <= {4 * i for i in range(2, 9)}
    assert min(widths) == 8 and max(widths) == 32 and len({x.shape for x in made}) > 10
    for x in made:
        expected = torch.linspace(-1, 1, 2 * x.shape[3] + 1)[1::2]
        assert x.shape[:2] == (3, 2) and (x - expected).abs().max() < 0.1
    square = [RandomSizes(0.5, 2.0, 4, square=True)(torch.zeros(1, 1, 16, 16)).shape for _ in range(9)]
    assert all(shape[2] == shape[3] for shape in square) and len(set(square)) > 2
    assert RandomSizes(1, 1, 4)(ramp) is ramp


def test_chosen_sizes_are_those_of_the_factors():
    torch.manual_seed(0)
    sizes = ChosenSizes((32, 16), (0.5, 1, 1.5), 8)
    assert sizes.largest == (48, 24)
    made = {tuple(sizes(torch.zeros(1, 3, *sizes.largest)).shape[2:]) for _ in range(100)}
    assert made == {(h, w) for h in (16, 32, 48) for w in (8, 16, 24)}
    often = [sizes.__class__((8, 8), (1, 1, 1, 2), 8)(torch.zeros(1, 1, 16, 16)).shape[2] for _ in range(400)]
    assert 0.68 < often.count(8) / 400 < 0.82  # a factor given three times of four
    assert ChosenSizes((24, 24), (0.75,), 8).largest == (16, 16)  # a multiple of 8


@pytest.mark.parametrize("factors, seen", [((2.0, 1.0), 0.5), ((1.0, 2.0), 0.5), ((1.0, 1.0), 1.0)])
def test_chosen_sizes_cut_and_do_not_stretch(monkeypatch, factors, seen):
    """A ramp along both axes: the middle of the shorter side, the whole of the longer one."""
    down = torch.linspace(-1, 1, 33)[:-1] + 1 / 32
    images = torch.stack([down[:, None].expand(32, 32), down[None].expand(32, 32)])[None]
    order = [(1.0, 2.0).index(factor) for factor in factors]
    monkeypatch.setattr(torch, "randint", lambda *args: torch.tensor(order))
    rows, columns = ChosenSizes((16, 16), (1.0, 2.0), 8)(images)[0]
    assert tuple(rows.shape) == tuple(int(16 * factor) for factor in factors)
    shares = [seen if factor < max(factors) else 1.0 for factor in factors]
    spans = [float(axis.max() - axis.min()) / 2 for axis in (rows, columns)]
    for span, share, length in zip(spans, shares, rows.shape, strict=True):
        assert span == pytest.approx(share * (1 - 1 / length), abs=0.03)
    assert abs(float(rows.mean())) < 1e-3 and abs(float(columns.mean())) < 1e-3  # about the centre


def test_enlarged_images_are_told():
    split = Split(np.zeros(1, int), ["a"], pixels=torch.zeros(1, 3, 20, 30, dtype=torch.uint8))
    assert enlarged_note(split, (20, 30)) is None and enlarged_note(split, (8, 8)) is None
    assert "first image is 20x30, smaller than the largest size in training, 24x24" in enlarged_note(split, (24, 24))
    damaged = Split(np.zeros(1, int), ["a"], read=lambda i: 1 / 0, names=str)
    assert enlarged_note(damaged, (24, 24)) is None
