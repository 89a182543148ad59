"""The segmenter: any size, one grid at all sizes, frozen names, what does not fit."""

import re

import pytest
import torch
import torch.nn.functional as F

import gspn
from gspn.models.segmenter import _upsampled

TINY = dict(depths=[1, 1, 1], width=8, global_levels=[0, 1, 2])


def tiny(**more):
    torch.manual_seed(0)
    return gspn.create_segmenter("gspn_micro", num_classes=3, **TINY | more)


@pytest.mark.parametrize("size", [(1, 1), (5, 9), (16, 16), (33, 18), (40, 70)])
@pytest.mark.parametrize("stem_stride", [1, 4])
def test_logits_at_full_size_for_any_size(size, stem_stride):
    model = tiny(stem_stride=stem_stride).eval()
    logits = model(torch.randn(2, 3, *size))
    assert logits.shape == (2, 3, *size) and logits.isfinite().all()
    assert model.coarse_logits(torch.randn(1, 3, *size)).shape[-2:] == tuple(-(-side // stem_stride) for side in size)
    assert model(torch.randn(1, 3, *size), (7, 11)).shape == (1, 3, 7, 11)


def test_maps_lie_at_the_same_places_at_any_size():
    """A map of an odd size is the part of a larger one, not a stretched one: it would shift the classes otherwise."""
    wide = torch.randn(1, 2, 9, 9)
    whole = F.interpolate(wide, scale_factor=4.0, mode="bilinear", align_corners=False)
    assert torch.equal(_upsampled(wide, 4, (33, 35)), whole[..., :33, :35])
    assert torch.equal(_upsampled(wide, 1, (9, 9)), wide)


def test_an_image_does_not_depend_on_its_batch_and_every_weight_is_used():
    model, x = tiny(), torch.randn(3, 3, 20, 28)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-4, atol=1e-5)  # in training mode, too
    model(x).square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert not without


def test_the_finest_map_is_mixed_globally():
    """The logits of one corner depend on the pixels of the other through the decoder alone: its backbone is local."""
    local = dict(depths=[1], width=8, global_levels=[], segment=1, stem_stride=1)
    reach = []
    for depth in (0, 1):
        model = tiny(**local, decoder_depth=depth)
        x = torch.randn(1, 3, 24, 40, requires_grad=True)
        model(x)[0, :, 0, 0].sum().backward()
        reach.append(float(x.grad[0, :, -1].abs().sum()))
    assert reach[0] < 1e-6 < reach[1]  # GRN alone carries what the backbone knows of the other corner


def test_config_makes_the_same_model_and_the_names_are_frozen():
    model = tiny(decoder_width=12)
    twin = gspn.create_segmenter(**model.config)
    twin.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 9, 14)
    assert torch.equal(model.eval()(x), twin.eval()(x))
    names = {name.split(".")[0] for name in model.state_dict()}
    assert names == {"backbone", "norms", "laterals", "blocks", "norm", "classifier"}
    assert not any(name.startswith(("backbone.head", "backbone.norm.")) for name in model.state_dict())
    assert model.state_dict()["laterals.2.weight"].shape == (12, 32, 1, 1)
    assert gspn.create_segmenter("gspn_micro", num_classes=2).stride == 4  # 1/4, although the backbone's own is 1/2


def test_groups_of_parameters_are_those_of_the_backbone():
    model = tiny()
    for coarse in (False, True):
        own, groups = model.backbone.group_matcher(coarse), model.group_matcher(coarse)
        assert groups.keys() == own.keys()
        for name in (name for name, _ in model.backbone.named_parameters()):
            assert _groups_of(f"backbone.{name}", groups) == _groups_of(name, own)
    assert _groups_of("backbone.levels.1.blocks.0.norm1.weight", groups) == [("blocks", ("1",))]
    assert _groups_of("blocks.0.norm1.weight", groups) == []


def _groups_of(parameter, groups):
    """The groups that take a parameter, with the numbers that they read in its name."""
    patterns = [(name, each) for name, of in groups.items() for each in ([(of, None)] if isinstance(of, str) else of)]
    found = [(name, re.match(pattern, parameter)) for name, (pattern, _) in patterns]
    return [(name, match.groups()) for name, match in found if match]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(name="gspn_mikro"), ValueError, "gspn_micro"),
        (dict(num_classes=0), ValueError, "num_classes=0"),
        (dict(num_classes=2.0), TypeError, "num_classes has to be a whole number, got 2.0"),
        (dict(decoder_depth=True), TypeError, "depth has to be a whole number, got True"),
        (dict(decoder_width=1), ValueError, "width=1"),
        (dict(decoder_depth=-1), ValueError, "depth=-1"),
        (dict(colour=1), TypeError, "colour"),
        (dict(decoder_widht=96), TypeError, "no argument 'decoder_widht', did you mean 'decoder_width'"),
        (dict(drop_path_rat=0.1), TypeError, "did you mean 'drop_path_rate'"),
        (dict(alignment="released"), ValueError, "square"),
        (dict(drop_rate=0.5), TypeError, "no drop_rate.*head of a classifier: use decoder_drop_rate"),
        (dict(global_pool=""), TypeError, "no global_pool"),
    ],
)
def test_what_does_not_fit(arguments, error, message):
    with pytest.raises(error, match=message):
        gspn.create_segmenter(**{"name": "gspn_micro", "num_classes": 3, **arguments})
    with pytest.raises(ValueError, match=r"\(B,3,H,W\)"):
        tiny()(torch.randn(1, 1, 8, 8))
