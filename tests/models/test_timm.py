"""The bridge to timm: what timm's own code and scripts ask of a model (their train.py's steps, one by one)."""

import copy
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

import gspn

timm = pytest.importorskip("timm")
pytestmark = pytest.mark.timm

from test_released import LITTLE, SIZES, WITH_TIMM, full_size, load_little, released_model  # noqa: E402
from timm.data import Mixup, resolve_data_config  # noqa: E402
from timm.loss import SoftTargetCrossEntropy  # noqa: E402
from timm.models import get_model_input_config, group_parameters, load_checkpoint, model_parameters  # noqa: E402
from timm.optim import create_optimizer_v2  # noqa: E402
from timm.scheduler import create_scheduler_v2  # noqa: E402
from timm.utils import ModelEmaV3, dispatch_clip_grad  # noqa: E402

gspn.register_timm()

NAMES = ("gspn_base", "gspn_micro", "gspn_mobile", "gspn_small", "gspn_tiny")
SMALL = {"width": 8, "depths": (1, 2, 1), "proxy_dim": 2, "num_classes": 5}


def small(**options):
    return timm.create_model("gspn_micro", **(SMALL | options))


def test_registered_once():
    gspn.register_timm()
    assert tuple(timm.list_models("gspn_*")) == NAMES and timm.list_pretrained("gspn_*") == []


@pytest.mark.parametrize("name", NAMES)
def test_default_cfg_describes_the_model(name):
    model = timm.create_model(name, device="meta", dtype=torch.bfloat16).eval()
    cfg = model.default_cfg
    if name in SIZES:
        assert sum(p.numel() for p in model.parameters()) == SIZES[name][-1]
    assert model.num_classes == cfg["num_classes"] == 1000
    assert all(p.device.type == "meta" and p.dtype == torch.bfloat16 for p in model.parameters())
    assert isinstance(model.get_submodule(cfg["first_conv"]), nn.Conv2d) and cfg["classifier"] == "head"
    features = model.forward_features(torch.empty(1, *cfg["input_size"], device="meta", dtype=torch.bfloat16))
    assert features.shape == (1, model.num_features, *cfg["pool_size"])
    assert model.forward_head(features, pre_logits=True).shape == (1, model.head_hidden_size)
    data = resolve_data_config(model=model)
    assert data["input_size"] == cfg["input_size"] and data["interpolation"] == "bicubic" and data["crop_pct"] == 0.875


@pytest.mark.parametrize("decoder", ["FPN", "UPerNet", "Unet", "Segformer"])
def test_decoders_of_segmentation_models_pytorch(decoder):
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = getattr(smp, decoder)("tu-gspn_tiny", encoder_weights=None, classes=11)
    model.encoder.eval()  # no block is dropped
    y = model(torch.randn(2, 3, 64, 96))
    assert y.shape == (2, 11, 64, 96)
    y.square().mean().backward()
    scans = [p for name, p in model.encoder.named_parameters() if name.endswith("weight_proj")]
    assert len(scans) == 13 and all(p.grad.abs().sum() > 0 for p in scans)


def test_the_snippet_with_another_decoder_runs():
    pytest.importorskip("segmentation_models_pytorch")
    page = (Path(__file__).parents[2] / "docs/segmentation.md").read_text(encoding="utf-8")
    (snippet,) = [part for part in page.split("```") if "smp." in part and part.startswith("python")]
    names = {}
    exec(snippet.removeprefix("python"), names)
    assert names["logits"].shape == (2, 11, 96, 128)


def test_arguments():
    model = small(in_chans=1, num_classes=0, drop_rate=0.3, drop_path_rate=0.2)
    assert model(torch.randn(2, 1, 24, 16)).shape == (2, 32) and model.drop_rate == 0.3
    assert [round(b.drop_path.rate, 3) for level in model.levels for b in level.blocks] == [0, 0.067, 0.133, 0.2]
    assert small(global_pool="")(torch.randn(2, 3, 24, 16)).shape == (2, 5, 3, 2)
    assert small(drop_path_rate=None).config.get("drop_path_rate") is None
    assert small(activation="none").config["activation"] is None
    with pytest.raises(TypeError, match="not_an_argument"):
        small(not_an_argument=1)
    assert gspn.create_model(**model.config).config == model.config


def test_input_size_is_known_to_timm_and_binds_nothing():
    size_of = lambda model: get_model_input_config(model)["input_size"]  # noqa: E731
    model = small(img_size=48)
    assert size_of(model) == (3, 48, 48) and size_of(small(in_chans=1)) == (1, 64, 64)
    model.set_input_size(img_size=(32, 96))
    assert size_of(model) == (3, 32, 96)
    assert model(torch.randn(1, 3, 20, 28)).shape == (1, 5) and "img_size" not in model.config
    with pytest.raises(ValueError, match=r"square.*img_size=32x48"):
        small(alignment="released", img_size=(32, 48))


def test_features_only():
    x = torch.randn(2, 3, 40, 24)
    whole = small()
    backbone = timm.create_model("gspn_micro", features_only=True, **SMALL)
    assert backbone.feature_info.channels() == [8, 16, 32] and backbone.feature_info.reduction() == [2, 4, 8]
    backbone.model.load_state_dict({k: v for k, v in whole.state_dict().items() if not k.startswith(("norm", "head"))})
    maps = backbone(x)
    for got, expected in zip(maps, whole.forward_intermediates(x, intermediates_only=True), strict=True):
        torch.testing.assert_close(got, expected)
    first_two = timm.create_model("gspn_micro", features_only=True, out_indices=(0, -2), **SMALL)
    sum(m.sum() for m in first_two(x)).backward()
    assert len(first_two(x)) == 2 and first_two.feature_info.channels() == [8, 16]
    assert all(p.grad is not None for p in first_two.parameters())  # what is not used is not there
    for keep_norm in (True, False):
        model = small()
        assert model.prune_intermediate_layers([0, 2], prune_norm=not keep_norm, prune_head=False) == [0, 2]
        assert isinstance(model.norm, nn.LayerNorm if keep_norm else nn.Identity) and model.num_classes == 5


def test_features_by_torch_fx():
    x = torch.randn(1, 3, 24, 16)
    kinds = ("fx", "getter")
    traced, getter = (timm.create_model("gspn_micro", features_only=True, feature_cls=k, **SMALL) for k in kinds)
    traced.load_state_dict({k.replace("model.", "graph_module."): v for k, v in getter.state_dict().items()})
    for got, expected in zip(traced(x), getter(x), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("coarse", [False, True])
def test_group_matcher_sorts_by_depth(coarse):
    model = small()
    groups = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
    assert set(groups) == {name for name, _ in model.named_parameters()}
    order = ["stem.0.weight", "levels.0.blocks.0.gspn.merger", "levels.1.downsample.0.weight"]
    order += [] if coarse else ["levels.1.blocks.1.dwconv.weight"]
    order += ["levels.2.blocks.0.grn.gamma", "head.weight"]
    numbers = [groups[name] for name in order]
    assert numbers == sorted(set(numbers)) and numbers[0] == 0


def test_optimizer_with_layer_decay():
    model = small()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.5)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}
    assert set(found) == set(names.values())
    for name, parameter in model.named_parameters():
        assert found[name]["weight_decay"] == (0 if parameter.ndim <= 1 else 0.05), name
    scales = [found[n]["lr_scale"] for n in ("stem.0.weight", "levels.1.blocks.0.gspn.weight_proj", "head.weight")]
    assert scales[0] < scales[1] < scales[2] == 1


def test_training_as_timm_s_script_does():
    """create_model, optimizer, scheduler, Mixup, soft targets, clipping, gradient checkpointing, EMA, evaluation."""
    torch.manual_seed(0)
    model = small(num_classes=2, drop_path_rate=0.05, drop_rate=0.1)
    model.set_grad_checkpointing(enable=True)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=3e-3, weight_decay=0.05, layer_decay=0.9)
    scheduler, epochs = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=6, warmup_epochs=1, updates_per_epoch=5, step_on_epochs=False
    )
    ema = ModelEmaV3(model, decay=0.8)
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=2)
    loss_of, update = SoftTargetCrossEntropy(), 0
    x, y = torch.rand(16, 3, 16, 16), torch.arange(16) % 2
    x[y == 1, 0] += 1
    for _ in range(epochs):
        model.train()
        for _ in range(5):
            mixed, targets = mixup(x.clone(), y)
            loss = loss_of(model(mixed), targets)
            optimizer.zero_grad()
            loss.backward()
            dispatch_clip_grad(model_parameters(model), value=5.0)
            optimizer.step()
            update += 1
            ema.update(model, step=update)
            scheduler.step_update(num_updates=update)
    with torch.no_grad():
        assert (model.eval()(x).argmax(1) == y).all() and (ema.module.eval()(x).argmax(1) == y).all()


def test_checkpoints_of_timm(tmp_path):
    model, x = small().eval(), torch.randn(1, 3, 16, 16)
    torch.save({"state_dict": model.state_dict(), "arch": "gspn_micro"}, tmp_path / "last.pth.tar")
    again = small(checkpoint_path=str(tmp_path / "last.pth.tar")).eval()
    torch.testing.assert_close(again(x), model(x))
    torch.testing.assert_close(copy.deepcopy(again)(x), model(x))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("released") / "tiny.pth"
    torch.save({"model": released_model(num_classes=11).state_dict()}, path)
    return path


@pytest.mark.filterwarnings("ignore:released weights in alignment")
@pytest.mark.parametrize("alignment", ["released", "aligned"])
def test_released_weights_are_converted_wherever_timm_loads(file, alignment, tmp_path):
    options = LITTLE | {"alignment": alignment, "activation": "none"}
    expected, x = load_little(file, alignment=alignment), torch.randn(2, 3, 64, 64)
    with nullcontext() if alignment == "released" else pytest.warns(UserWarning, match="outputs differ"):
        by_path = timm.create_model("gspn_tiny", checkpoint_path=str(file), num_classes=11, **options).eval()
    torch.testing.assert_close(by_path(x), expected(x))
    later = timm.create_model("gspn_tiny", num_classes=11, **options).eval()
    load_checkpoint(later, str(file))
    torch.testing.assert_close(later(x), expected(x))
    torch.save(expected.state_dict(), tmp_path / "converted.pth")
    converted = timm.create_model("gspn_tiny", checkpoint_path=tmp_path / "converted.pth", num_classes=11, **options)
    torch.testing.assert_close(converted.eval()(x), expected(x))
    pretrained = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(file), "num_classes": 11}}
    gray = timm.create_model("gspn_tiny", in_chans=1, num_classes=3, **pretrained, **options).eval()
    assert gray(x[:, :1]).shape == (2, 3)
    expected_gray = load_little(file, alignment=alignment, in_chans=1)
    torch.testing.assert_close(gray.forward_features(x[:, :1]), expected_gray.forward_features(x[:, :1]))
    five = timm.create_model("gspn_tiny", in_chans=5, **pretrained, **options)
    torch.testing.assert_close(five.stem[0].weight, load_little(file, alignment=alignment, in_chans=5).stem[0].weight)
    maps = timm.create_model("gspn_tiny", features_only=True, **pretrained, **options).eval()(x)
    torch.testing.assert_close(maps[1], expected.forward_intermediates(x, [1], intermediates_only=True)[0])


def test_the_documentation_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(full_size().state_dict(), "tiny.pth")
    found = {}
    exec(WITH_TIMM, found)
    assert found["pyramid"].feature_info.channels() == [192, 384, 768]
    features = found["adapted"].eval().forward_features(torch.ones(1, 1, 32, 32))
    torch.testing.assert_close(features, found["trained"].eval().forward_features(torch.ones(1, 3, 32, 32)))


def test_errors_that_say_how(file):
    with pytest.raises(RuntimeError, match=r"gspn_tiny.*load_run.*pretrained_cfg_overlay.*activation="):
        timm.create_model("gspn_tiny", pretrained=True)
    options = {"checkpoint_path": str(file), "num_classes": 11} | LITTLE
    with pytest.raises(ValueError, match=r'"silu".*activation="none"'):
        timm.create_model("gspn_tiny", **options)
    pruned = small()
    pruned.prune_intermediate_layers([0])
    with pytest.raises(ValueError, match="pruned"):
        load_checkpoint(pruned, str(file))
    with pytest.raises(ValueError, match=r"left over: layers\.2\.blocks\.1\.norm\.weight"):
        timm.create_model("gspn_tiny", **(options | {"depths": (1, 1, 1, 1), "activation": "none"}))
