"""gspn_mobile, whose blocks have batch norm: what that could change."""

import copy

import pytest
import torch
from helpers.training import same, tiny_options
from torch import nn

import gspn
from gspn.export import export_program
from gspn.layers import InvertedBlock
from gspn.models import context_maps
from gspn.tasks.classify import train_classifier
from gspn.train.loop import TrainingError

TINY = {"width": 8, "depths": (1, 2, 1), "proxy_dim": 2, "scan_dim": 4}
NORMS = ("stem.1", "stem.4", "norm", *(f"levels.{i}.downsample.1" for i in (1, 2)))


def small(**options):
    return gspn.create_model("gspn_mobile", **(TINY | {"num_classes": 5, "in_chans": 1} | options))


def trained_a_little(model, size=(12, 9)):
    """The same model with scans that count and running statistics of its own."""
    for block in (m for m in model.modules() if isinstance(m, InvertedBlock)):
        nn.init.normal_(block.norm.weight)
    model.train()(torch.randn(4, model.in_chans, *size))
    return model.eval()


def test_it_is_small():
    assert sum(p.numel() for p in gspn.create_model("gspn_mobile", num_classes=10).parameters()) == 693_922


def test_block_is_its_formula():
    block = InvertedBlock(8, proxy_dim=3, scan_dim=4, center=True)
    x = torch.randn(3, 8, 5, 6)
    conv, silu = nn.functional.conv2d, nn.functional.silu

    def batch_normed(z):
        return nn.functional.batch_norm(z, None, None, training=True)

    z = silu(batch_normed(conv(x, block.in_proj.weight)))
    z = silu(batch_normed(conv(z, block.dwconv.weight, padding=1, groups=16)))
    expected = x + batch_normed(conv(z, block.out_proj.weight))
    torch.testing.assert_close(block(x), expected)  # as it starts: the scan's norm has the weight 0
    nn.init.normal_(block.norm.weight)
    nn.init.normal_(block.norm.bias)
    scanned = nn.functional.layer_norm(block.gspn(z).permute(0, 2, 3, 1), (16,), block.norm.weight, block.norm.bias)
    z = z + scanned.permute(0, 3, 1, 2)
    torch.testing.assert_close(block(x), x + batch_normed(conv(z, block.out_proj.weight)), rtol=1e-4, atol=1e-5)


def test_frozen_state_dict():
    statistics = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    block = [f"{norm}.{part}" for norm in ("norm1", "norm2", "norm3") for part in statistics]
    block += ["norm.weight", "norm.bias", "in_proj.weight", "dwconv.weight", "out_proj.weight"]
    block += [f"gspn.{p}" for p in ("weight_proj", "input_proj", "output_proj", "skip_proj", "merger")]
    block += [f"gspn.{p}.weight" for p in ("proxy_proj", "reduce", "expand")]
    expected = {f"{norm}.{part}" for norm in NORMS for part in statistics}
    convolutions = ("stem.0", "stem.3", "head", *(f"levels.{i}.downsample.0" for i in (1, 2)))
    expected |= {f"{m}.{p}" for m in convolutions for p in ("weight", "bias")}
    expected |= {f"levels.{i}.blocks.{j}.{k}" for i, j in ((0, 0), (1, 0), (1, 1), (2, 0)) for k in block}
    assert set(small().state_dict()) == expected


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (13, 30)])
def test_any_size(size):
    model = trained_a_little(small())
    y = model(x := torch.randn(3, 1, *size))
    assert y.shape == (3, 5)
    torch.testing.assert_close(model(x[:1]), y[:1], rtol=1e-4, atol=1e-5)  # in evaluation each image is alone


def test_backbones_of_any_name_take_the_block():
    model = gspn.create_model("gspn_tiny", block="inverted", width=8, depths=(1, 1, 1, 1), num_classes=3)
    twin = gspn.create_model(**model.config)
    assert isinstance(twin.levels[3].blocks[0], InvertedBlock) and twin.config["block"] == "inverted"
    assert twin(torch.randn(2, 3, 64, 32)).shape == (2, 3)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"block": "inverse"}, "block.*paper.*inverted.*'inverse'"),
        ({"mlp_ratio": 2.0}, "mlp_ratio .*paper.*expected 4.0, got 2.0"),
        ({"activation": None}, "activation .*expected 'silu', got None"),
        ({"alignment": "released"}, "alignment .*expected 'aligned', got 'released'"),
    ],
)
def test_what_it_does_not_have(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def without_statistics(model):
    """The model with norms that take those of the batch in evaluation, too."""
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.track_running_stats = False
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    return model


@pytest.mark.parametrize(
    "norms",
    [nn.Identity(), nn.SyncBatchNorm.convert_sync_batchnorm, without_statistics],
    ids=["own", "sync", "without"],
)
def test_gradient_checkpointing_counts_a_batch_once(norms):
    model, x = norms(small()), torch.randn(4, 1, 12, 9)
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    for each in (model, twin):
        each(x).square().sum().backward()
    for (name, own), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, msg=name)
    assert same(model.state_dict(), twin.state_dict())
    assert twin.levels[0].blocks[0].norm1.momentum == model.levels[0].blocks[0].norm1.momentum


def test_compiled_gradient_checkpointing():
    model, x = small(), torch.randn(4, 1, 12, 9)
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    compiled = torch.compile(twin, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, model(x), rtol=1e-4, atol=1e-5)
    compiled.sum().backward()
    assert twin.levels[0].blocks[0].norm1.num_batches_tracked == 1
    torch.testing.assert_close(twin.state_dict(), model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype):
    model = trained_a_little(small()).to(dtype)
    x = torch.randn(2, 1, 9, 8, dtype=dtype)
    assert model(x).dtype == dtype
    model.train()(x).sum().backward()
    assert all(p.grad.dtype == dtype for p in model.parameters())


def test_frozen_norms_keep_their_statistics(tmp_path):
    options = tiny_options(model="gspn_mobile", model_args=TINY, epochs=1, freeze=("stem",))
    start = gspn.create_model("gspn_mobile", num_classes=10, in_chans=1, stem_stride=1, **TINY).state_dict()
    run, *_ = train_classifier("digits", tmp_path / "run", options)
    tensors = run.load_checkpoint("last")[0]["model"]
    assert torch.equal(tensors["stem.1.running_mean"], start["stem.1.running_mean"])
    assert not torch.equal(tensors["norm.running_mean"], start["norm.running_mean"])


def test_one_value_a_channel_is_refused(tmp_path):
    """The digits' maps have one pixel in the last level, and a part of a batch one image."""
    args = TINY | {"stem_stride": 2}
    options = tiny_options(model="gspn_mobile", model_args=args, epochs=1, batch_size=8, accumulate=8)
    with pytest.raises(TrainingError, match=r"batch norm .*one value.*--batch-size.*--accumulate"):
        train_classifier("digits", tmp_path / "run", options)


def test_published_weights_are_refused():
    paper = gspn.create_model("gspn_micro", num_classes=5)
    released = {"classifier.head.weight": paper.head.weight}
    with pytest.raises(ValueError, match=r'for block="paper".*gspn_mobile.*gspn_tiny'):
        gspn.load_released(released, "gspn_mobile", alignment="aligned")


def test_context_maps():
    maps = context_maps(trained_a_little(small(stem_stride=1)), torch.randn(1, 8, 8), (3, 4), block=0)
    assert maps["block"] == "levels.0.blocks.0" and maps["right"][:, 5:].sum() == 0
    assert maps["right"][:, :5].sum(0).allclose(torch.ones(5))


def test_it_exports_with_open_sizes():
    model = trained_a_little(small())
    program = export_program(model)
    for shape in ((2, 1, 12, 17), (3, 1, 21, 9)):
        torch.testing.assert_close(program.module()(x := torch.randn(shape)), model(x), rtol=1e-5, atol=1e-5)


def test_a_segmenter():
    model = gspn.create_segmenter("gspn_mobile", num_classes=3, **TINY)
    assert model(torch.randn(2, 3, 13, 22)).shape == (2, 3, 13, 22)
    assert gspn.create_segmenter(**model.config).config == model.config


def test_it_learns_with_averaged_weights(tmp_path):
    options = tiny_options(model="gspn_mobile", model_args=TINY, epochs=4, warmup=1.0, lr=2e-2, ema=0.95)
    run, metrics, _ = train_classifier("digits", tmp_path / "run", options)
    assert metrics["top1"] > 0.85
    tensors = run.load_checkpoint("last")[0]
    assert not torch.equal(tensors["ema"]["norm.running_var"], tensors["model"]["norm.running_var"])
