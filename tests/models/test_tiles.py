"""Segmentation within a bound of memory: what tiles cover, that they change nothing in a local model, the bound."""

import re
from itertools import pairwise

import numpy as np
import pytest
import torch

import gspn
from gspn.models import tiles
from gspn.models.segmenter import Segmenter
from gspn.models.tiles import LEAST, _Steps, fitting_tile, segment, spans

TINY = dict(depths=[1, 1], width=8, global_levels=[0, 1])


class Local(Segmenter):
    """A segmenter whose logits are means over 4x4 pixels: a tile's are those of the whole image."""

    def coarse_logits(self, x):
        return torch.nn.functional.avg_pool2d(x, 4, ceil_mode=True, count_include_pad=False)


def segmenter(kind=Segmenter):
    torch.manual_seed(0)
    return kind(gspn.create_model("gspn_micro", stem_stride=4, **TINY), 3).eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def no_workspace(monkeypatch):
    """What kernels need is much more than these small models do."""
    monkeypatch.setattr(tiles, "WORKSPACE", 0)


def normalize(pixels):
    return pixels.float() / 255 - 0.5


def pixels_of(height, width):
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (1, 3, height, width), generator=random, dtype=torch.uint8)


@pytest.mark.parametrize(("length", "tile"), [(100, 48), (101, 32), (47, 48), (48, 48), (1000, 56), (65, 64)])
def test_spans_cover_the_side_and_overlap(length, tile):
    found = list(spans(length, tile, 8))
    assert found[0][0] == 0 and found[-1][1] == length
    assert all(begin % 8 == 0 and 0 < end - begin <= tile for begin, end in found)
    for (_, end), (begin, _) in pairwise(found):
        assert end - begin >= tile // 4 // 8 * 8 > 0


def test_tiles_change_nothing_in_a_local_model_and_need_less():
    model, pixels, told = segmenter(Local), pixels_of(150, 203), []
    whole = segment(model, pixels, normalize, (150, 203), None, told.append)
    expected = model.enlarge(model.coarse_logits(normalize(pixels)), (150, 203)).argmax(1)[0]
    assert np.array_equal(whole, expected) and whole.dtype == np.uint8
    steps = _Steps(model, normalize)
    _, needed = fitting_tile(steps, pixels, (150, 203), 10**12)
    tile, less = fitting_tile(steps, pixels, (150, 203), needed - 1)
    assert max(tile) < 203 and less < needed
    tiled = segment(model, pixels, normalize, (150, 203), needed - 1, told.append)
    assert (tiled == whole).mean() > 0.999  # but for ties by rounding
    assert told[0].startswith("in one go") and "overlapping tiles" in told[1]


def test_tiles_of_a_global_model_are_close_and_none_is_left_out():
    model, pixels = segmenter(), pixels_of(96, 160)
    pixels[..., 80:] = pixels[..., 80:] // 4  # two halves, so that the classes differ
    steps = _Steps(model, normalize)
    whole = steps.best(steps.coarse(pixels), (96, 160), (96, 160))
    _, needed = fitting_tile(steps, pixels, (96, 160), 10**12)
    tiled = segment(model, pixels, normalize, (96, 160), needed // 2)
    assert (torch.from_numpy(tiled) == whole).float().mean() > 0.8
    assert segment(model, pixels, normalize, (48, 80)).shape == (48, 80)  # resized to another size


def test_the_bound(monkeypatch):
    steps, pixels = _Steps(segmenter(), normalize), pixels_of(256, 384)
    needs = [fitting_tile(steps, pixels_of(side, 384), (side, 384), 10**12)[1] for side in (128, 256)]
    assert needs[1] == pytest.approx(2 * needs[0], rel=0.1)  # linear in the pixels
    # at its widest, the decoder's block holds its map of 16 channels and that of the MLP's 32, at a quarter of the size
    assert needs[1] > 256 * 384 / 16 * 48 * 4
    monkeypatch.setattr(tiles, "WORKSPACE", 10**6)
    assert fitting_tile(steps, pixels, (256, 384), 10**12)[1] == needs[1] + 10**6
    monkeypatch.setattr(tiles, "WORKSPACE", 0)
    assert fitting_tile(steps, pixels, (256, 384), None) == ((256, 384), None)
    for bound in (needs[1], needs[1] // 2):
        assert fitting_tile(steps, pixels, (256, 384), bound)[1] <= bound
    with pytest.raises(ValueError, match=r"256x384 does not fit into 0\.0003 GB"):
        fitting_tile(steps, pixels, (256, 384), 300_000)


def test_the_message_names_the_smallest_tile_that_was_tried(monkeypatch):
    """Of a model that takes 0.9 GB whatever the tile, and the rest nothing."""
    steps, pixels = _Steps(segmenter(), normalize), pixels_of(256, 384)
    monkeypatch.setattr(tiles, "WORKSPACE", 0)
    monkeypatch.setattr(tiles, "peak_bytes", lambda steps, what, *inputs: 9 * 10**8 * (what == "coarse"))
    with pytest.raises(ValueError, match="does not fit") as caught:
        fitting_tile(steps, pixels, (256, 384), 8 * 10**8)
    sides = re.search(r"tiles of (\d+)x(\d+) 0\.9 GB", str(caught.value))
    assert min(map(int, sides.groups())) >= LEAST * steps.model.reduction
