"""Bad input to the operators, the layer and the models: a clear error that says what was got and what was expected."""

import sys

import pytest
import torch
from conftest import random_problem

import gspn

X, PROXY, WEIGHT, ENTRY, EXIT, SKIP = range(6)


def replaced(index, value):
    problem = random_problem(1, 6, 4, 5, 3, dtype=torch.float32)
    problem[index] = value
    return problem


@pytest.mark.parametrize(
    ("index", "value", "error", "message"),
    [
        (X, torch.randn(6, 4, 5), ValueError, r"x has to have 4 dimensions \(B,C,H,W\), got 3: \(6, 4, 5\)"),
        (X, torch.ones(1, 6, 4, 5, dtype=torch.int64), TypeError, r"x has to be float64.*got torch.int64"),
        (X, [[1.0]], TypeError, r"x has to be a tensor .*got list"),
        (X, torch.randn(1, 5, 4, 5), ValueError, r"weight_proj has 6 groups.*divisor of x's 5 channels"),
        (X, torch.randn(1, 6, 0, 5), ValueError, r"H >= 1"),
        (X, torch.randn(1, 6, 4, 5).double(), TypeError, r"have to agree outside autocast, got x torch.float64"),
        (
            PROXY,
            torch.randn(1, 3, 5, 4),
            ValueError,
            r"proxy \(B,S,H,W\) has to be \(1, any, 4, 5\).*got \(1, 3, 5, 4\)",
        ),
        (PROXY, torch.randn(1, 2, 4, 5), ValueError, r"weight_proj .*has to be \(4, 3, any, 2\).*got \(4, 3, 6, 3\)"),
        (PROXY, torch.randn(1, 3, 4, 5, device="meta"), ValueError, r"proxy has to be on x's device cpu, got meta"),
        (WEIGHT, torch.randn(4, 3, 4, 3), ValueError, r"4 groups, which has to be a divisor of x's 6"),
        (WEIGHT, torch.randn(3, 3, 6, 3), ValueError, r"weight_proj .*has to be \(4, 3, any, 3\)"),
        (ENTRY, torch.randn(4, 5, 3), ValueError, r"input_proj \(D,C,S\) has to be \(4, 6, 3\).*got \(4, 5, 3\)"),
        (SKIP, torch.randn(4, 6, 3), ValueError, r"skip_proj has to have 2 dimensions"),
    ],
)
def test_propagate(index, value, error, message):
    with pytest.raises(error, match=message):
        gspn.propagate(*replaced(index, value))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"directions": ("right", "down", "left", "north")}, ValueError, "unknown direction 'north', expected one"),
        ({"directions": ("right", "right", "left", "up")}, ValueError, "different directions"),
        ({"directions": "right"}, TypeError, "sequence of names"),
        ({"directions": ()}, ValueError, "one to four"),
        ({"segment": 0}, ValueError, "at least 1 line, or None for global, got 0"),
        ({"segment": 2.0}, TypeError, "number of lines or None, got 2.0"),
        ({"workspace_mib": 0}, ValueError, "at least 1 MiB, got 0"),
        ({"backend": "cuda"}, ValueError, "unknown backend 'cuda', expected one of reference, cpu, triton"),
        ({"backend": "triton"}, ValueError, "'triton' does not run on cpu"),
    ],
)
def test_options(options, error, message):
    with pytest.raises(error, match=message):
        gspn.propagate(*random_problem(1, 6, 4, 5, 3), **options)


def test_a_proxy_of_no_channels():
    problem = random_problem(1, 6, 4, 5, 0)
    with pytest.raises(ValueError, match=r"S >= 1, got \(1, 0, 4, 5\)"):
        gspn.propagate(*problem)


def test_the_other_operators():
    x = torch.randn(1, 4, 3, 5)
    with pytest.raises(ValueError, match=r"has to have 3 in dimension 2, got \(1, 4, 2, 3, 5\)"):
        gspn.line_scan(x, torch.randn(1, 4, 2, 3, 5), direction="up")
    with pytest.raises(ValueError, match=r"input_gate .*has to be \(1, 4, 4, 3, 5\)"):
        gspn.gated_scan(x, torch.randn(1, 4, 3, 3, 5), torch.randn(1, 4, 4, 3, 3, 5))
    with pytest.raises(ValueError, match=r"logits has 3 groups"):
        gspn.gated_scan(x, torch.randn(1, 4, 4, 3, 5), torch.randn(1, 4, 3, 3, 3, 5))
    with pytest.raises(TypeError, match=r"got torch\.int32"):
        gspn.normalize_weights(torch.zeros(1, 1, 3, 2, 2, dtype=torch.int32), direction="up")
    with pytest.raises(ValueError, match="unknown direction 'top'"):
        gspn.normalize_weights(torch.zeros(1, 1, 3, 2, 2), direction="top")


def test_a_backend_that_is_not_there_is_an_error_when_named(monkeypatch):
    from gspn import dispatch

    monkeypatch.setitem(dispatch._statuses, "cpu", dispatch.BackendStatus(False, "no compiler at installation"))
    problem = random_problem(1, 2, 3, 4, 2)
    with pytest.raises(RuntimeError, match="backend 'cpu' is not available here: no compiler at installation"):
        gspn.propagate(*problem, backend="cpu")
    monkeypatch.setattr(dispatch, "_warned", set())
    with pytest.warns(UserWarning, match="reference backend on cpu.*no compiler at installation"):
        y = gspn.propagate(*problem)
    torch.testing.assert_close(y, gspn.propagate(*problem, backend="reference"))
    import warnings

    with warnings.catch_warnings():  # once only
        warnings.simplefilter("error")
        gspn.propagate(*problem)


def test_the_layer():
    with pytest.raises(ValueError, match=r"expects \(B,8,H,W\) .*got \(1, 6, 4, 4\)"):
        gspn.GSPN2d(8)(torch.randn(1, 6, 4, 4))
    with pytest.raises(ValueError, match=r"expects \(B,8,H,W\) .*got \(8, 4, 4\)"):
        gspn.GSPN2d(8)(torch.randn(8, 4, 4))
    with pytest.raises(ValueError, match="groups has to divide the 8 channels that are scanned, got 3"):
        gspn.GSPN2d(8, groups=3)
    with pytest.raises(ValueError, match='merger has to be "learned" or "mean"'):
        gspn.GSPN2d(8, merger="sum")
    with pytest.raises(ValueError, match="unknown direction 'x'"):
        gspn.GSPN2d(8, directions=("x",))
    with pytest.raises(ValueError, match="scan_dim has to be at least 1, got 0"):
        gspn.GSPN2d(8, scan_dim=0)
    with pytest.raises(ValueError, match=r"with H, W >= 1, got \(1, 8, 0, 4\)"):
        gspn.GSPN2d(8)(torch.randn(1, 8, 0, 4))
    with pytest.raises(ValueError, match="drop path has to be at least 0 and below 1, got 1"):
        gspn.layers.DropPath(1.0)
    with pytest.raises(ValueError, match="proxy_dim has to be at least 1, got 0"):
        gspn.GSPN2d(8, proxy_dim=0)
    with pytest.raises(ValueError, match="segment"):
        gspn.GSPN2d(8, segment=0)
    with pytest.raises(ValueError, match="unknown backend"):
        gspn.GSPN2d(8, backend="gpu")
    with pytest.raises(ValueError, match=r"\(4, 0\).*4x4"):
        gspn.GSPN2d(8).context(torch.randn(1, 8, 4, 4), 4, 0)


def test_the_models():
    with pytest.raises(ValueError, match="there is no model 'gspn_huge', did you mean 'gspn_base'"):
        gspn.create_model("gspn_huge")
    with pytest.raises(TypeError, match="depth"):
        gspn.create_model("gspn_micro", depth=3)
    with pytest.raises(ValueError, match="stem_stride has to be 1, 2 or 4, got 3"):
        gspn.create_model("gspn_micro", stem_stride=3)
    with pytest.raises(ValueError, match="global_levels"):
        gspn.create_model("gspn_micro", global_levels=(3,))
    model = gspn.create_model("gspn_micro", num_classes=2, in_chans=1)
    with pytest.raises(ValueError, match=r"images \(B,1,H,W\) .*got \(1, 3, 8, 8\)"):
        model(torch.randn(1, 3, 8, 8))
    with pytest.raises(ValueError, match='global_pool has to be "avg" or "", got \'max\''):
        model.reset_classifier(5, global_pool="max")
    with pytest.raises(ValueError, match="drop_rate has to be at least 0 and below 1, got 1"):
        gspn.create_model("gspn_micro", drop_rate=1)
    with pytest.raises(ValueError, match="some of 3 levels"):
        model.forward_intermediates(torch.randn(1, 1, 8, 8), indices=[3])
    with pytest.raises(ValueError, match="some of 3 levels"):
        model.forward_intermediates(torch.randn(1, 1, 8, 8), indices=4)


def test_timm_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.delitem(sys.modules, "gspn.models.timm", raising=False)
    with pytest.raises(ImportError, match=r'needs timm, which the extra "timm" installs: pip install "gspn\[timm\]"'):
        gspn.register_timm()
