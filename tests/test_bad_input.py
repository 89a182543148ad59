"""Bad input to the operators, the layer and the models: a clear error that says what was got and what was expected."""

import importlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.problems import random_problem

import gspn
from gspn import registration
from gspn.kernels import cpu

X, PROXY, WEIGHT_PROJ, INPUT_PROJ, OUTPUT_PROJ, SKIP_PROJ = range(6)


def replaced(index, value):
    problem = random_problem(1, 6, 4, 5, 3, dtype=torch.float32)
    problem[index] = value
    return problem


@pytest.mark.parametrize(
    ("index", "value", "error", "message"),
    [
        (X, torch.randn(6, 4, 5), ValueError, r"^x .*4 dimensions \(B,C,H,W\).*3: \(6, 4, 5\)"),
        (X, torch.ones(1, 6, 4, 5, dtype=torch.int64), TypeError, r"^x .*float64.*torch.int64"),
        (X, [[1.0]], TypeError, r"^x .*tensor.*list"),
        (X, torch.randn(1, 5, 4, 5), ValueError, r"weight_proj.*6 groups.*5 channels"),
        (X, torch.randn(1, 6, 0, 5), ValueError, r"H >= 1"),
        (X, torch.randn(1, 0, 4, 5), ValueError, r"x has 0 channels.*at least 1"),
        (X, torch.randn(1, 6, 4, 5).double(), TypeError, r"autocast.*x torch.float64.*proxy torch.float32"),
        (PROXY, torch.randn(1, 3, 5, 4), ValueError, r"proxy.*\(1, any, 4, 5\).*\(1, 3, 5, 4\)"),
        (PROXY, torch.randn(1, 2, 4, 5), ValueError, r"weight_proj.*\(4, 3, any, 2\).*\(4, 3, 6, 3\)"),
        (PROXY, torch.randn(1, 3, 4, 5, device="meta"), ValueError, r"proxy.*cpu.*meta"),
        (WEIGHT_PROJ, torch.randn(4, 3, 4, 3), ValueError, r"4 groups.*6 channels"),
        (WEIGHT_PROJ, torch.randn(3, 3, 6, 3), ValueError, r"weight_proj.*\(4, 3, any, 3\)"),
        (INPUT_PROJ, torch.randn(4, 5, 3), ValueError, r"input_proj \(D,C,S\).*\(4, 6, 3\).*\(4, 5, 3\)"),
        (SKIP_PROJ, torch.randn(4, 6, 3), ValueError, r"skip_proj.*2 dimensions"),
    ],
)
def test_propagate(index, value, error, message):
    with pytest.raises(error, match=message):
        gspn.propagate(*replaced(index, value))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"directions": ("right", "down", "left", "north")}, ValueError, "direction 'north'.*right, down, left, up"),
        ({"directions": ("right", "right", "left", "up")}, ValueError, "different directions.*'right', 'right'"),
        ({"directions": "right"}, TypeError, "sequence.*'right'"),
        ({"directions": ()}, ValueError, r"one to four.*\(\)"),
        ({"segment": 0}, ValueError, "segment.*0"),
        ({"segment": 2.0}, TypeError, r"segment.*2\.0"),
        ({"segment": True}, TypeError, "segment.*True"),
        ({"segment": 2**63}, ValueError, r"segment.*below 2\^63.*9223372036854775808"),
        ({"workspace_mib": 0}, ValueError, "workspace_mib.*0"),
        ({"workspace_mib": 1.5}, TypeError, "workspace_mib has to be a whole number, got 1.5"),
        ({"workspace_mib": 2**43}, ValueError, r"workspace_mib.*below 2\^43.*8796093022208"),
        ({"directions": iter(("up", "up"))}, ValueError, "different directions.*'up', 'up'"),
        ({"backend": "cuda"}, ValueError, "backend 'cuda'.*reference, cpu, triton"),
        ({"backend": "triton"}, ValueError, "'triton'.*cpu"),
    ],
)
def test_options(options, error, message):
    with pytest.raises(error, match=message):
        gspn.propagate(*random_problem(1, 6, 4, 5, 3), **options)


@pytest.mark.parametrize(
    ("center", "error", "message"),
    [
        ([1.0], TypeError, r"center.*tensor \(B,D,C\).*list"),
        (torch.randn(4, 6), ValueError, r"center.*3 dimensions"),
        (torch.randn(1, 3, 6), ValueError, r"center \(B,D,C\).*\(1, 4, 6\).*\(1, 3, 6\)"),
        (torch.randn(1, 4, 6).double(), TypeError, r"center.*torch.float32.*torch.float64"),
        (torch.randn(1, 4, 6, device="meta"), ValueError, r"center.*cpu.*meta"),
    ],
)
def test_center(center, error, message):
    with pytest.raises(error, match=message):
        gspn.propagate(*random_problem(1, 6, 4, 5, 3, dtype=torch.float32), center=center)
    problem = [t.bfloat16() for t in random_problem(1, 6, 4, 5, 3)]
    with pytest.raises(TypeError, match=r"center.*float32 beside x torch.bfloat16.*bfloat16"):
        gspn.propagate(*problem, center=torch.randn(1, 4, 6).bfloat16())


def test_a_proxy_of_no_channels():
    problem = random_problem(1, 6, 4, 5, 0)
    with pytest.raises(ValueError, match=r"S >= 1.*\(1, 0, 4, 5\)"):
        gspn.propagate(*problem)


def test_the_other_operators():
    x = torch.randn(1, 4, 3, 5)
    with pytest.raises(ValueError, match=r"3 in dimension 2.*\(1, 4, 2, 3, 5\)"):
        gspn.line_scan(x, torch.randn(1, 4, 2, 3, 5), direction="up")
    with pytest.raises(ValueError, match=r"input_gate.*\(1, 4, 4, 3, 5\)"):
        gspn.gated_scan(x, torch.randn(1, 4, 3, 3, 5), torch.randn(1, 4, 4, 3, 3, 5))
    nothing, weights = torch.randn(1, 0, 3, 5), torch.randn(1, 2, 3, 3, 5)
    with pytest.raises(ValueError, match="x has 0 channels"):
        gspn.line_scan(nothing, weights, direction="up")
    with pytest.raises(ValueError, match="x has 0 channels"):
        gspn.gated_scan(nothing, nothing[:, None], weights[:, None], directions=("up",))
    with pytest.raises(ValueError, match="x has 0 channels"):
        cpu.line_scan(nothing, weights, 0)
    with pytest.raises(ValueError, match=r"logits.*3 groups"):
        gspn.gated_scan(x, torch.randn(1, 4, 4, 3, 5), torch.randn(1, 4, 3, 3, 3, 5))
    with pytest.raises(TypeError, match=r"logits.*torch\.int32"):
        gspn.normalize_weights(torch.zeros(1, 1, 3, 2, 2, dtype=torch.int32), direction="up")
    with pytest.raises(ValueError, match="direction 'top'"):
        gspn.normalize_weights(torch.zeros(1, 1, 3, 2, 2), direction="top")


def test_numbers_of_numpy_are_numbers():
    x, weights = torch.randn(1, 2, 3, 5), torch.rand(1, 2, 3, 3, 5)
    three = gspn.line_scan(x, weights, direction="left", segment=np.int64(3))
    assert torch.equal(three, gspn.line_scan(x, weights, direction="left", segment=3))
    problem = random_problem(1, 6, 4, 5, 3)
    assert torch.equal(gspn.propagate(*problem, workspace_mib=np.int64(1)), gspn.propagate(*problem, workspace_mib=1))
    sizes = dict(proxy_dim=3, groups=2, scan_dim=4, segment=2)
    layer = gspn.GSPN2d(np.int64(8), **{name: np.int32(size) for name, size in sizes.items()})
    kept = {"channels": 8} | sizes
    assert {name: (type(value), value) for name, value in vars(layer).items() if name in kept} == {
        name: (int, value) for name, value in kept.items()
    }


def test_an_open_size_is_no_segment():
    class Halves(torch.nn.Module):
        def forward(self, x, weights):
            return gspn.line_scan(x, weights, direction="right", segment=x.shape[-1] // 2)

    x, weights, auto = torch.randn(1, 2, 3, 8), torch.rand(1, 2, 3, 3, 8), torch.export.Dim.AUTO
    with pytest.raises(TypeError, match=r"segment.*number of lines.*open size"):
        torch.export.export(Halves(), (x, weights), dynamic_shapes=({3: auto}, {4: auto}), strict=False)


@pytest.mark.parametrize("error", [ImportError("libtriton.so is damaged"), AttributeError("no jit")])
def test_a_backend_that_cannot_be_imported_is_not_available(error, monkeypatch):
    from gspn import dispatch

    def damaged(name):
        if name == "gspn.kernels.triton":
            raise error
        return importlib.import_module(name)

    monkeypatch.setattr(dispatch, "_statuses", {})
    monkeypatch.setattr(dispatch, "importlib", SimpleNamespace(import_module=damaged))
    found = gspn.available_backends()
    assert found["reference"].available and not found["triton"].available
    assert f"cannot be imported: {type(error).__name__}: {error}" in found["triton"].reason


def test_finders_of_the_old_kind_are_passed_over(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [object(), *sys.meta_path])
    assert registration._WithTorch.find_spec("torch").name == "torch"


def test_a_backend_that_is_not_there_is_an_error_when_named(monkeypatch):
    from gspn import dispatch

    monkeypatch.setitem(dispatch._statuses, "cpu", dispatch.BackendStatus(False, "no compiler at installation"))
    problem = random_problem(1, 2, 3, 4, 2)
    with pytest.raises(RuntimeError, match=r"'cpu'.*no compiler at installation"):
        gspn.propagate(*problem, backend="cpu")
    monkeypatch.setattr(dispatch, "_warned", set())
    with pytest.warns(UserWarning, match="reference.*cpu.*no compiler at installation"):
        y = gspn.propagate(*problem)
    torch.testing.assert_close(y, gspn.propagate(*problem, backend="reference"))
    import warnings

    with warnings.catch_warnings():  # once only
        warnings.simplefilter("error")
        gspn.propagate(*problem)


def test_the_layer():
    with pytest.raises(ValueError, match=r"\(B,8,H,W\).*\(1, 6, 4, 4\)"):
        gspn.GSPN2d(8)(torch.randn(1, 6, 4, 4))
    with pytest.raises(ValueError, match=r"\(B,8,H,W\).*\(8, 4, 4\)"):
        gspn.GSPN2d(8)(torch.randn(8, 4, 4))
    with pytest.raises(ValueError, match=r"groups.*8.*3"):
        gspn.GSPN2d(8, groups=3)
    with pytest.raises(ValueError, match=r"merger.*'sum'"):
        gspn.GSPN2d(8, merger="sum")
    with pytest.raises(ValueError, match="direction 'x'"):
        gspn.GSPN2d(8, directions=("x",))
    with pytest.raises(ValueError, match=r"scan_dim.*0"):
        gspn.GSPN2d(8, scan_dim=0)
    with pytest.raises(ValueError, match=r"H, W >= 1.*\(1, 8, 0, 4\)"):
        gspn.GSPN2d(8)(torch.randn(1, 8, 0, 4))
    with pytest.raises(ValueError, match=r"drop path.*1"):
        gspn.layers.DropPath(1.0)
    with pytest.raises(ValueError, match=r"proxy_dim.*0"):
        gspn.GSPN2d(8, proxy_dim=0)
    for name in ("channels", "proxy_dim", "groups", "scan_dim"):
        for value in (True, 8.0, "8"):
            with pytest.raises(TypeError, match=f"{name} has to be a whole number, got {value!r}"):
                gspn.GSPN2d(**{"channels": 8, name: value})
    assert gspn.GSPN2d(8, directions=(d for d in ("left", "up"))).directions == ("left", "up")
    with pytest.raises(ValueError, match="segment"):
        gspn.GSPN2d(8, segment=0)
    with pytest.raises(ValueError, match="backend 'gpu'"):
        gspn.GSPN2d(8, backend="gpu")
    with pytest.raises(ValueError, match=r"\(4, 0\).*4x4"):
        gspn.GSPN2d(8).context(torch.randn(1, 8, 4, 4), 4, 0)


def test_the_models():
    with pytest.raises(ValueError, match=r"'gspn_huge'.*'gspn_base'"):
        gspn.create_model("gspn_huge")
    with pytest.raises(TypeError, match="depth"):
        gspn.create_model("gspn_micro", depth=3)
    with pytest.raises(ValueError, match=r"stem_stride.*3"):
        gspn.create_model("gspn_micro", stem_stride=3)
    with pytest.raises(ValueError, match="global_levels"):
        gspn.create_model("gspn_micro", global_levels=(3,))
    model = gspn.create_model("gspn_micro", num_classes=2, in_chans=1)
    with pytest.raises(ValueError, match=r"images \(B,1,H,W\).*\(1, 3, 8, 8\)"):
        model(torch.randn(1, 3, 8, 8))
    with pytest.raises(ValueError, match="num_classes has to be at least 0, got -1"):
        gspn.create_model("gspn_micro", num_classes=-1)
    with pytest.raises(ValueError, match="num_classes has to be at least 0, got -1"):
        model.reset_classifier(-1)
    with pytest.raises(TypeError, match=r"num_classes has to be a whole number, got 2\.0"):
        model.reset_classifier(2.0)
    assert model.num_classes == model.config["num_classes"] == 2
    for name, value in {"num_classes": 2.0, "in_chans": "3", "width": 32.0, "stem_stride": True}.items():
        with pytest.raises(TypeError, match=f"{name} has to be a whole number, got {value!r}"):
            gspn.create_model("gspn_micro", **{name: value})
    for bad in ("abc", 3):
        with pytest.raises(TypeError, match=rf"depths takes a list of whole numbers such as \[2,2,2\], got {bad!r}"):
            gspn.create_model("gspn_micro", depths=bad)
    with pytest.raises(TypeError, match=r"each of depths has to be a whole number, got 1\.5"):
        gspn.create_model("gspn_micro", depths=(1, 1.5))
    with pytest.raises(ValueError, match=r"global_pool.*'max'"):
        model.reset_classifier(5, global_pool="max")
    with pytest.raises(ValueError, match=r"drop_rate.*1"):
        gspn.create_model("gspn_micro", drop_rate=1)
    for name in ("mlp_ratio", "expansion"):
        for value in ("2", -1, 0, float("nan"), float("inf"), True, None):
            with pytest.raises(ValueError, match=f"{name} has to be a positive number, got {value!r}"):
                gspn.create_model("gspn_micro", **{name: value})
    with pytest.raises(ValueError, match=r"expansion has to be a positive number, got '2'"):
        gspn.create_model("gspn_mobile", expansion="2")
    with pytest.raises(ValueError, match=r"expansion times 8 channels has to be at least 1 channel, got 0\.001"):
        gspn.create_model("gspn_mobile", expansion=0.001, width=8)
    with pytest.raises(ValueError, match=r"block has to be .*, got \[1\]"):
        gspn.create_model("gspn_micro", block=[1])
    with pytest.raises(ValueError, match=r"indices.*3 levels.*\[3\]"):
        model.forward_intermediates(torch.randn(1, 1, 8, 8), indices=[3])
    with pytest.raises(ValueError, match=r"indices.*3 levels.*4"):
        model.forward_intermediates(torch.randn(1, 1, 8, 8), indices=4)


def test_timm_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.delitem(sys.modules, "gspn.models.timm", raising=False)
    with pytest.raises(ImportError, match=r"pip install .*gspn\[timm\]"):
        gspn.register_timm()
