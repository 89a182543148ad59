"""The backbones: published sizes, global and local blocks, and the contract that timm's users know."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import gspn
from gspn.layers import GSPNBlock
from gspn.models import context_maps


def small(**options):
    return gspn.create_model(
        "gspn_micro", **({"num_classes": 5, "in_chans": 1, "width": 8, "depths": (1, 2, 1), "proxy_dim": 2} | options)
    )


@pytest.mark.parametrize(
    ("name", "parameters", "gmacs"),
    [("gspn_tiny", 31_510_268, 5.33), ("gspn_small", 50_773_346, 12.1), ("gspn_base", 93_061_108, 15.9)],
)
def test_published_sizes(name, parameters, gmacs):
    with torch.device("meta"):
        model = gspn.create_model(name).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 224, 224))
    assert sum(p.numel() for p in model.parameters()) == parameters
    # published with another way to count scans
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmacs, rel=0.04)


def test_micro_is_micro():
    assert sum(p.numel() for p in gspn.create_model("gspn_micro").parameters()) < 1_000_000


def test_global_blocks_are_where_the_table_says():
    with torch.device("meta"):
        segments = {
            name: [[b.gspn.segment for b in level.blocks] for level in gspn.create_model(name).levels]
            for name in ("gspn_tiny", "gspn_small", "gspn_base")
        }
    assert segments["gspn_tiny"] == [[2] * 2, [2] * 2, [None] * 7, [None] * 2]
    assert segments["gspn_small"] == [[2] * 5, [2] * 5, [2] * 10, [None] * 2]
    assert segments["gspn_base"] == [[2] * 4, [2] * 4, [None] * 7 + [2] * 6 + [None] + [2], [None] * 4]


@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("size", [(1, 1), (8, 8), (13, 30)])
def test_any_size_and_stem_stride(stride, size):
    model = small(stem_stride=stride)
    assert model(torch.randn(2, 1, *size)).shape == (2, 5)
    reduction = model.feature_info[-1]["reduction"]
    assert reduction == 4 * stride
    height, width = (-(-s // reduction) for s in size)
    assert model.forward_features(torch.randn(1, 1, *size)).shape == (1, 32, height, width)


def test_frozen_state_dict():
    for alignment in ("aligned", "released"):
        keys = small(alignment=alignment).state_dict()
        both = ("weight", "bias")
        block = [f"{m}.{p}" for m in ("norm1", "norm", "norm2", "mlp.0", "mlp.2") for p in both]
        block += [f"{m}.weight" for m in ("in_proj", "dwconv", "out_proj", "gspn.proxy_proj")]
        block += [f"gspn.{p}" for p in ("weight_proj", "input_proj", "output_proj", "skip_proj", "merger")]
        block += ["grn.gamma", "grn.beta"]
        expected = {f"{m}.{p}" for m in ("stem.0", "stem.1", "stem.3", "stem.4", "norm", "head") for p in both}
        expected |= {f"levels.{i}.downsample.{j}.{p}" for i in (1, 2) for j in (0, 1) for p in both}
        expected |= {f"levels.{i}.blocks.{j}.{k}" for i, j in ((0, 0), (1, 0), (1, 1), (2, 0)) for k in block}
        assert set(keys) == expected and keys["levels.0.blocks.0.dwconv.weight"].shape == (12, 1, 7, 7)


def test_config_makes_the_same_model_again():
    import json

    model = small(stem_stride=1, drop_path_rate=0.1)
    twin = gspn.create_model(**json.loads(json.dumps(model.config)))
    twin.load_state_dict(model.state_dict())
    x = torch.randn(2, 1, 9, 9)
    assert torch.equal(twin.eval()(x), model.eval()(x)) and twin.config == model.config
    model.reset_classifier(3)
    assert gspn.create_model(**model.config).num_classes == 3
    assert (model.config["activation"], model.config["alignment"]) == ("silu", "aligned")  # said even if not asked for


def test_timm_contract():
    model = small().eval()
    x = torch.randn(2, 1, 20, 16)
    features = model.forward_features(x)
    assert model.num_features == model.head_hidden_size == 32 == features.shape[1]
    assert torch.equal(model.forward_head(features), model(x))
    assert model.forward_head(features, pre_logits=True).shape == (2, 32)
    assert model.get_classifier() is model.head
    model.reset_classifier(0)
    assert model(x).shape == (2, 32) and model.num_classes == 0
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    model.reset_classifier(0, global_pool="")
    assert model(x).shape == features.shape
    model.reset_classifier(7)
    dense = model(x)  # without pooling the head classifies every place
    model.reset_classifier(7, global_pool="avg")
    assert dense.shape == (2, 7, *features.shape[2:]) and model(x).shape == (2, 7)
    assert not model.head.training and model.train().head.training
    assert model.no_weight_decay() == set()
    for coarse in (False, True):
        assert {"stem", "blocks"} == set(model.group_matcher(coarse))


def test_forward_intermediates():
    model = small().eval()
    x = torch.randn(2, 1, 20, 16)
    final, maps = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x))
    assert [m.shape[1] for m in maps] == [i["num_chs"] for i in model.feature_info]
    assert [-(-20 // i["reduction"]) for i in model.feature_info] == [m.shape[2] for m in maps]
    normed = model.forward_intermediates(x, indices=[-1], norm=True, intermediates_only=True)
    assert torch.equal(normed[0], final)
    last_two = model.forward_intermediates(x, indices=2, intermediates_only=True, output_fmt="NHWC")
    assert torch.equal(last_two[0], maps[1].permute(0, 2, 3, 1)) and len(last_two) == 2
    ends = model.forward_intermediates(x, indices=torch.tensor([0, -1]), intermediates_only=True)
    assert len(ends) == 2 and torch.equal(ends[0], maps[0]) and torch.equal(ends[1], maps[2])
    stopped, one = model.forward_intermediates(x, indices=[0], stop_early=True)
    assert torch.equal(stopped, one[0]) and len(one) == 1


@pytest.mark.parametrize("level", range(3))
def test_forward_intermediates_stops_after_any_level(level):
    model, x = small().eval(), torch.randn(2, 1, 20, 16)
    final, maps = model.forward_intermediates(x)
    stopped, (one,) = model.forward_intermediates(x, [level], stop_early=True)
    assert torch.equal(one, maps[level]) and torch.equal(stopped, final if level == 2 else one)


def test_gradient_checkpointing_gives_the_same_gradients():
    model, x = small(), torch.randn(2, 1, 12, 12)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_dense_logits_average_to_the_pooled_ones():
    pooled, x = small().eval(), torch.randn(2, 1, 20, 16)
    dense = small(global_pool="").eval()
    dense.load_state_dict(pooled.state_dict())
    torch.testing.assert_close(dense(x).mean((-2, -1)), pooled(x))


def test_dropout_before_the_head_in_training_only():
    model = small(drop_rate=0.5)
    features = model.forward_features(torch.randn(1, 1, 16, 16))
    assert (model.forward_head(features, pre_logits=True) == 0).any()
    assert (model.eval().forward_head(features, pre_logits=True) != 0).all()


def test_drop_path_grows_with_depth():
    rates = [m.drop_path.rate for m in small(drop_path_rate=0.3).modules() if isinstance(m, GSPNBlock)]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])


def test_it_learns():
    """A few steps on a task that needs context: on which side of the image lies the brighter of two spots?"""
    torch.manual_seed(1)
    model = small(num_classes=2, stem_stride=1)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        x, side = 0.1 * torch.randn(32, 1, 8, 8), torch.randint(2, (32,))
        x[torch.arange(32), 0, torch.randint(8, (32,)), torch.where(side == 0, 0, 7)] += 3
        loss = nn.functional.cross_entropy(model(x), side)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 0.1 < losses[0]


def test_context_maps():
    model = small(stem_stride=1)
    maps = context_maps(model, torch.randn(1, 8, 8), (3, 4), block=0)
    assert maps["image size"] == (8, 8) and maps["place"] == (3, 4) and maps["block"] == "levels.0.blocks.0"
    for name in (*gspn.DIRECTIONS, "merged"):
        assert maps[name].shape == (8, 8) and (maps[name] >= 0).all()
    assert maps["right"][:, 5:].sum() == 0 and maps["up"][:3].sum() == 0
    assert maps["right"][:, :5].sum(0).allclose(torch.ones(5))
    assert model.training
    assert context_maps(model, torch.randn(1, 8, 8), (7, 7))["place"] == (1, 1)
    released = context_maps(small(stem_stride=1, alignment="released"), torch.randn(1, 8, 8), (3, 4), block=0)
    assert released["down"][4, 3] > 0 and released["down"][5:].sum() == 0  # the place is (3, 4) as each direction reads
    assert released["left"][3, 3] > 0 and released["left"][:, :3].sum() == 0
    with pytest.raises(ValueError, match=r"\(8, 0\).*8x8"):
        context_maps(model, torch.randn(1, 8, 8), (8, 0))
    with pytest.raises(ValueError, match=r"block.*-4 to 3.*4"):
        context_maps(model, torch.randn(1, 8, 8), (0, 0), block=4)


def test_there_are_no_pretrained_weights():
    """The error says what to do instead."""
    for make, name, instead in (
        (gspn.create_model, "gspn_tiny", ("load_released", "load_run", "gspn train")),
        (gspn.create_generator, "GSPN-micro/2", ("from_pretrained", "load_run", "gspn train-diffusion")),
    ):
        with pytest.raises(RuntimeError, match=f"pretrained.*{name}") as error:
            make(name, pretrained=True)
        assert all(word in str(error.value) for word in instead)
        assert sum(p.numel() for p in make(name, pretrained=False).parameters()) > 1e6
    with pytest.raises(ValueError, match="gspn_huge"):
        gspn.create_model("gspn_huge", pretrained=True)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1)])
def test_every_parameter_has_a_gradient_at_the_smallest_sizes(size, backend):
    """One line, or lines of one place, whose only weight is 1: zeros, and not None, which weight decay passes over."""
    model = gspn.create_model(
        "gspn_micro", num_classes=2, in_chans=1, width=4, depths=(1, 1), global_levels=(0,), backend=backend
    )
    model(torch.randn(2, 1, *size)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert model.levels[1].blocks[0].gspn.weight_proj.grad.abs().max() < 1e-6  # a / a is differentiated there
