"""Released weights: the same outputs as an independent transcription of the released forward, safe files, and errors
that say what does not fit."""

import io
import pickle
import re
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from helpers.released_transcription import ReleasedModel
from safetensors.torch import save_file

import gspn
from gspn.layers import GSPNBlock
from gspn.models.released import convert_released

SIZES = {  # depths, width, proxy_dim, levels that may be global, published parameters
    "gspn_tiny": ((2, 2, 7, 2), 96, 8, (2, 3), 31_510_268),
    "gspn_small": ((5, 5, 10, 2), 108, 16, (3,), 50_773_346),
    "gspn_base": ((4, 4, 15, 4), 120, 8, (2, 3), 93_061_108),
}
SNIPPETS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs/models.md").read_text(), re.DOTALL)
CREATED, CENTERED, RELEASED, WITH_TIMM = SNIPPETS
LITTLE = {"depths": (1, 1, 2, 1), "width": 12, "proxy_dim": 3}


def released_model(**options):
    """The transcription with random weights, wide enough that every term counts: GRN and mergers start at constants."""
    model = ReleasedModel(**({"depths": (1, 1, 2, 1), "width": 12, "proxy": 3, "global_levels": (2, 3)} | options))
    model.eval()
    for name, parameter in model.named_parameters():
        if "grn" in name or "m_conv" in name or "norm" in name or "bias" in name:
            torch.nn.init.normal_(parameter, std=0.5)
        elif "conv_up" in name or "d_conv" in name:
            torch.nn.init.normal_(parameter, std=1.0)
        elif parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model


def full_size():
    depths, width, proxy, global_levels, _ = SIZES["gspn_tiny"]
    return released_model(depths=depths, width=width, proxy=proxy, global_levels=global_levels)


def load_little(state, **options):
    return gspn.load_released(state, "gspn_tiny", **(LITTLE | options)).eval()


@pytest.fixture(scope="module")
def little():
    torch.manual_seed(1)
    return released_model(num_classes=11)


@pytest.mark.parametrize("name", SIZES)
def test_the_transcription_has_the_released_keys_and_parameters(name):
    depths, width, proxy, global_levels, count = SIZES[name]
    with torch.device("meta"):
        theirs = ReleasedModel(depths=depths, width=width, proxy=proxy, global_levels=global_levels)
        ours = gspn.create_model(name, alignment="released", activation=None)
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters()) == count
    assert set(convert_released(theirs.state_dict(), ours.config)) == set(ours.state_dict())


# 64 pixels: maps of 16, 8, 4, 2; 448: the third map has two segments of 14 lines; 72: 18, 9, 5, 3, cut off segments
@pytest.mark.parametrize("size", [64, 72, 448])
def test_outputs_are_the_released_ones(little, size, backend):
    ours = load_little(little.state_dict(), backend=backend)
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected, got = little(x), ours(x)
    assert expected.std() > 0.1  # the comparison means something
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_level_as_deep_as_the_base_size_s_has_local_blocks_too():
    """The blocks 7 to 12 and 14 of its third level; on its 4x4 map segments of 2 and of 14 lines differ."""
    theirs = released_model(depths=(1, 1, 15, 1), num_classes=5)
    ours = load_little(theirs.state_dict(), depths=(1, 1, 15, 1))
    assert [b.gspn.segment for b in ours.levels[2].blocks] == [14] * 7 + [2] * 6 + [14, 2]
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = theirs(x)
        torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)
        ours.levels[2].blocks[9].gspn.segment = 14
        assert not torch.allclose(ours(x), expected, atol=1e-3)


def test_outputs_are_the_released_ones_at_full_size_and_the_documentation_runs(tmp_path, monkeypatch):
    torch.manual_seed(2)
    theirs = full_size()
    monkeypatch.chdir(tmp_path)
    torch.save(theirs.state_dict(), "tiny.pth")
    found = {}
    with pytest.warns(UserWarning, match="outputs differ"):
        for snippet in (CREATED, CENTERED, RELEASED):
            exec(snippet, found)
    assert len(found["maps"]) == 3 and found["start"].num_classes == 10
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected, got = theirs(x), found["model"].eval()(x)
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_weights_that_almost_vanish_are_clamped_as_released(backend):
    """Three logits of about -17 give sigmoids whose sum is clamped: the weights no longer sum to 1."""
    theirs = released_model(depths=(1,), global_levels=(), num_classes=3).double()
    block = theirs.layers[0].blocks[0].op
    with torch.no_grad():
        block.w_conv_up.weight.mul_(300)
    proxies = []
    block.x_conv_down.register_forward_hook(lambda *args: proxies.append(args[2]))
    ours = load_little(theirs.state_dict(), depths=(1,), global_levels=(), backend=backend).double()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-9)
    logits = torch.nn.functional.conv2d(proxies[0], block.w_conv_up.weight).unflatten(1, (3, -1))
    assert (logits.sigmoid().sum(1) < 1e-7).any()


def test_gradients_are_the_released_ones(little, backend):
    ours = load_little(little.state_dict(), backend=backend)
    x = torch.randn(1, 3, 64, 64)
    for model in (little, ours):
        model.zero_grad()
        model(x).square().sum().backward()
    expected = convert_released({name: p.grad for name, p in little.named_parameters()}, ours.config)
    for name, parameter in ours.named_parameters():
        size = expected[name].abs().max().item()
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-4 * size, msg=name)


def test_aligned_takes_the_same_weights_at_any_size_and_says_that_outputs_differ(little):
    released = load_little(little.state_dict())
    with pytest.warns(UserWarning, match="outputs differ"):
        aligned = load_little(little.state_dict(), alignment="aligned")
    for (key, a), (other, b) in zip(aligned.state_dict().items(), released.state_dict().items(), strict=True):
        assert key == other and torch.equal(a, b)
    x = torch.randn(1, 3, 64, 64)
    assert not torch.allclose(aligned(x), released(x), atol=1e-2)
    assert aligned(torch.randn(1, 3, 50, 90)).shape == (1, 11)
    segments = [[b.gspn.segment for b in m.levels[2].blocks] for m in (aligned, released)]
    assert segments == [[None, None], [14, 14]] and released.levels[3].blocks[0].gspn.segment == 7


def test_config_makes_the_same_form_again(little):
    for alignment in ("released", "aligned"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = load_little(little.state_dict(), alignment=alignment, drop_path_rate=0.1)
        assert model.config["alignment"] == alignment and model.config["activation"] is None
        twin = gspn.create_model(**model.config).eval()
        twin.load_state_dict(model.state_dict())
        x = torch.randn(1, 3, 32, 32)
        assert torch.equal(twin(x), model(x))
        blocks = [m for m in model.modules() if isinstance(m, GSPNBlock)]
        assert [round(b.drop_path.rate, 3) for b in blocks] == [0, 0.025, 0.05, 0.075, 0.1]


def test_other_heads_and_channels(little):
    state = little.state_dict()
    assert load_little(state).num_classes == 11
    new = load_little(state, num_classes=4)
    assert new(torch.randn(1, 3, 32, 32)).shape == (1, 4) and new.config["num_classes"] == 4
    assert torch.equal(new.norm.weight, load_little(state).norm.weight)
    assert load_little(state, num_classes=0)(torch.randn(1, 3, 32, 32)).shape == (1, 96)
    gray, x = load_little(state, in_chans=1), torch.randn(1, 1, 32, 32)
    torch.testing.assert_close(gray(x), load_little(state)(x.expand(1, 3, 32, 32)))
    stem = load_little(state, in_chans=5).stem[0].weight
    torch.testing.assert_close(stem[:, 3:], stem[:, :2])
    torch.testing.assert_close(stem[:, :3], state["patch_embed.0.weight"] * 3 / 5)


def test_files_and_their_parts(little, tmp_path):
    first, second = little.state_dict(), {k: v + 1 for k, v in little.state_dict().items()}
    norm = lambda source, **options: load_little(source, **options).norm.weight  # noqa: E731
    file = tmp_path / "tiny.pth"
    for contents in (first, {"model": first}, {"model_ema": first, "epoch": 299}):
        torch.save(contents, file)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(norm(file), first["classifier.norm.weight"])
            assert torch.equal(norm(str(file)), first["classifier.norm.weight"])
    torch.save({"model": first, "model_ema": second}, file)
    with pytest.warns(UserWarning, match="model_ema.*part="):
        assert torch.equal(norm(file), second["classifier.norm.weight"])
    assert torch.equal(norm(file, part="model"), first["classifier.norm.weight"])
    with pytest.raises(ValueError, match=r"'ema'.*model_ema, model"):
        norm(file, part="ema")
    save_file(first, tmp_path / "tiny.safetensors")
    assert torch.equal(norm(tmp_path / "tiny.safetensors"), first["classifier.norm.weight"])
    assert torch.equal(norm({f"module.{k}": v for k, v in first.items()}), first["classifier.norm.weight"])
    half = {k: v.half() for k, v in first.items()}
    assert norm(half).dtype == torch.float32


class Hostile:
    """Unpickled, it writes the file whose name it was given."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return exec, (f"open({self.path!r}, 'w').close()",)


@pytest.mark.parametrize("save", [torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing, 2))])
def test_a_hostile_pickle_executes_nothing(tmp_path, save):
    trap, file = tmp_path / "executed", tmp_path / "tiny.pth"
    save({"config": Hostile(trap)}, file)
    with pytest.raises(ValueError, match=r"executed: .*exec"):
        load_little(file)
    assert not trap.exists()
    pickle.loads(pickle.dumps(Hostile(trap)))
    assert trap.exists()  # it would have worked


def test_the_authors_settings_in_a_file_are_read_as_data(little, tmp_path, monkeypatch):
    """Training scripts of this family save their configuration, an object of the package yacs, beside the weights."""
    yacs, config = types.ModuleType("yacs"), types.ModuleType("yacs.config")
    config.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    settings = config.CfgNode(MODEL=config.CfgNode(DROP_PATH_RATE=0.2))
    settings.__dict__["__immutable__"] = True
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yacs", yacs)
        patch.setitem(sys.modules, "yacs.config", config)
        torch.save({"model": little.state_dict(), "config": settings}, tmp_path / "tiny.pth")
    assert load_little(tmp_path / "tiny.pth").num_classes == 11
    with pytest.raises(pickle.UnpicklingError):  # and only here may it be read
        torch.load(tmp_path / "tiny.pth", weights_only=True)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.pth"):
        load_little(tmp_path / "missing.pth")
    whole = io.BytesIO()
    torch.save({"model": {"norm.bias": torch.zeros(3)}}, whole, _use_new_zipfile_serialization=False)
    damaged = [whole.getvalue()[:size] for size in (0, 1, 20, 90, -1)]
    for contents in (b"not weights at all", *damaged):
        for name in ("a.pth", "a.safetensors"):
            (tmp_path / name).write_bytes(contents)
            with pytest.raises(ValueError, match=rf"{name} (cannot be read|holds more than tensors)") as caught:
                load_little(tmp_path / name)
            assert type(caught.value) is ValueError
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="list, expected a state dict"):
        load_little(tmp_path / "list.pth")
    with pytest.raises(TypeError, match=r"path.*state dict.*int"):
        load_little(3)


def test_what_does_not_fit_is_listed(little):
    state = little.state_dict()
    del state["classifier.norm.bias"], state["layers.0.blocks.0.op.grn.beta"]
    state["layers.0.extra"] = torch.zeros(1)
    state["patch_embed.0.bias"] = "a string"
    state["patch_embed.5.weight"] = torch.tensor(1.0)
    state["layers.1.blocks.0.op.m_conv.weight"] = torch.zeros(4)
    with pytest.raises(ValueError) as caught:
        load_little(state)
    message = str(caught.value)
    assert "missing: layers.0.blocks.0.op.grn.beta, classifier.norm.bias" in message
    assert "left over: layers.0.extra" in message
    assert "not a tensor: patch_embed.0.bias" in message
    assert "layers.1.blocks.0.op.m_conv.weight (4,) instead of (1, 4, 1, 1)" in message
    assert "patch_embed.5.weight () instead of (12, 6, 3, 3)" in message
    with pytest.raises(ValueError, match=r"missing: patch_embed.0.weight, .* and \d+ more"):
        load_little({})
    with pytest.raises(ValueError, match=r"left over: stem\.0\.weight"):
        load_little(load_little(little.state_dict()).state_dict())


def test_another_size_is_named():
    depths, width, proxy, global_levels, _ = SIZES["gspn_small"]
    with torch.device("meta"):
        state = ReleasedModel(depths=depths, width=width, proxy=proxy, global_levels=global_levels).state_dict()
    with pytest.raises(ValueError, match="gspn_small, not of gspn_tiny"):
        gspn.load_released(state, "gspn_tiny")
    with pytest.raises(ValueError, match=r"'gspn_huge'.*'gspn_base'"):
        gspn.load_released(state, "gspn_huge")


def test_the_released_alignment_takes_square_images_only(little):
    model = load_little(little.state_dict())
    with pytest.raises(ValueError, match=r"square.*32x48"):
        model(torch.randn(1, 3, 32, 48))
    with pytest.raises(ValueError, match=r"alignment.*'wrong'"):
        load_little(little.state_dict(), alignment="wrong")
    with pytest.raises(TypeError, match="activation"):
        gspn.load_released(little.state_dict(), "gspn_tiny", activation="silu")


@pytest.mark.slow
def test_it_can_be_fine_tuned(little):
    """A head for two classes of noise learns them, with gradient checkpointing and drop path."""
    torch.manual_seed(0)
    model = load_little(little.state_dict(), num_classes=2, drop_path_rate=0.1).train()
    model.set_grad_checkpointing()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8) % 2
    losses = []
    for _ in range(25):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 < losses[0]
