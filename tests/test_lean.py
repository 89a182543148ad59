"""The layer without gradients on a CPU: one call into the kernel, and the usual result, whatever changes."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import gspn
from gspn.kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.available()[0], reason=cpu.available()[1])

FORMS = [
    {},
    {"segment": 3, "average": True},
    {"average": True, "center": True, "directions": ("up", "left", "right")},
    {"groups": 4, "proxy_dim": 3, "skip": False},
    {"merger": "mean", "proxy_dim": 17},
    {"scan_dim": 4},
    {"skip": False, "merger": "mean", "center": True, "segment": 4, "directions": ("down",)},
]


@pytest.fixture
def lean_calls(monkeypatch):
    """Grows by one with each result of the lean path."""
    calls, real = [], cpu.propagate_unmerged

    def counting(*args, **options):
        result = real(*args, **options)
        calls.extend([None] * (result is not None))
        return result

    monkeypatch.setattr(cpu, "propagate_unmerged", counting)
    return calls


def layer_of(channels=20, **options):
    layer = gspn.GSPN2d(channels, **options).eval()
    if layer.merger is not None:
        nn.init.normal_(layer.merger)
    return layer


def usual(layer, x):
    """What a fresh copy of the layer computes with gradients, which the lean path never does."""
    with torch.inference_mode(False), torch.enable_grad():
        return copy.deepcopy(layer)(x.clone()).detach()


@pytest.mark.parametrize("size", [(2, 1, 1), (1, 1, 9), (2, 7, 3), (1, 13, 22)])
@pytest.mark.parametrize("options", FORMS)
def test_it_is_taken_and_gives_the_usual_result(options, size, lean_calls):
    layer, (batch, height, width) = layer_of(**options), size
    for context in (torch.no_grad, torch.inference_mode):
        x = torch.randn(batch, 20, height, width)
        with context():
            first = layer(x)
            last = layer(x.to(memory_format=torch.channels_last))
            sliced = layer(torch.randn(batch, 25, height, width + 2)[:, 3:23, :, 1:-1].copy_(x))
        assert first.is_contiguous() and last.is_contiguous(memory_format=torch.channels_last)
        for got in (first, last, sliced):
            torch.testing.assert_close(got, usual(layer, x), rtol=1e-5, atol=1e-6)
    assert len(lean_calls) == 6


@pytest.mark.parametrize("isa", cpu.supported_isas() if cpu.available()[0] else ())
@pytest.mark.parametrize("options", FORMS)
def test_error_is_at_most_twice_that_of_the_reference(options, isa, monkeypatch):
    """Against float64, for a layer of each dtype."""
    exact = layer_of(**options, backend="reference").double()
    x = torch.randn(2, 20, 11, 9).double()
    run = cpu.propagate_unmerged
    monkeypatch.setattr(cpu, "propagate_unmerged", lambda *args: run(*args, isa=isa))
    with torch.no_grad():
        want, exact.backend = exact(x), "cpu"
        # far more than another BLAS changes, far less than anything in float32
        torch.testing.assert_close(exact(x), want, rtol=0, atol=1e-11 * float(want.abs().max()))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        layer = copy.deepcopy(exact).to(dtype)
        given, layer.backend = x.to(dtype), "cpu"
        true = copy.deepcopy(layer).double()
        true.backend = "reference"
        with torch.no_grad():
            want = true(given.double())
            got, layer.backend = layer(given), "reference"
            error, allowed = ((y.double() - want).abs().max() for y in (got, layer(given)))
        assert error <= 2 * allowed + want.abs().max() * torch.finfo(dtype).eps, (dtype, error, allowed)


def test_a_model_turned_to_channels_last(lean_calls):
    """Turning a model turns its parameters of four dimensions too."""
    layer = layer_of().to(memory_format=torch.channels_last)
    assert not layer.weight_proj.is_contiguous()
    x = torch.randn(2, 20, 6, 5).to(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), usual(layer, x), rtol=1e-5, atol=1e-6)
    assert len(lean_calls) == 1


def test_float32_projections_beside_16_bit_maps(lean_calls):
    layer = layer_of(average=True)
    layer.proxy_proj.to(torch.bfloat16)
    x = torch.randn(1, 20, 6, 5, dtype=torch.bfloat16)
    want = usual(layer, x)
    allowed = 2 * torch.finfo(x.dtype).eps * float(want.abs().max())  # both are rounded
    with torch.no_grad():
        torch.testing.assert_close(layer(x), want, rtol=0, atol=allowed)
    assert len(lean_calls) == 1


def test_gradients_other_backends_and_the_released_form_go_the_usual_way(lean_calls):
    x = torch.randn(1, 20, 5, 5)
    layer_of()(x).sum().backward()
    with torch.no_grad():
        layer_of(backend="reference")(x)
        layer_of(alignment="released")(x)
    assert not lean_calls


def test_it_runs_on_a_layer_in_training_without_gradients(lean_calls):
    layer, x = layer_of().train(), torch.randn(1, 20, 5, 4)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), usual(layer, x), rtol=1e-5, atol=1e-6)
    assert len(lean_calls) == 1


def test_what_watches_or_rewrites_operators_sees_ours(lean_calls):
    layer, x = layer_of(), torch.randn(2, 20, 5, 4)
    want = usual(layer, x)
    close = lambda got: torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)  # noqa: E731
    with torch.no_grad():
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            close(layer(x))
        assert "gspn.propagate" in map(str, counter.get_flop_counts()["Global"])
        with torch.profiler.profile() as profile:
            close(layer(x))
        assert "gspn::propagate" in {event.key for event in profile.key_averages()}
        close(torch.vmap(layer)(x[:, None]).squeeze(1))
        close(torch.jit.trace(layer, x, check_trace=False)(x))
        close(torch.fx.symbolic_trace(layer)(x))
        program = torch.export.export(layer, (x,))
        assert any("gspn.propagate" in str(node.target) for node in program.graph.nodes)
        close(program.module()(x))
        close(torch.compile(layer, backend="eager", fullgraph=True)(x))
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
            layer(forward_ad.make_dual(x, torch.ones_like(x)))
    assert not lean_calls


def test_tensors_that_are_not_plain_go_the_usual_way(lean_calls):
    x = torch.randn(1, 20, 5, 4)
    layer = layer_of()
    nn.utils.parametrize.register_parametrization(layer, "output_proj", nn.Tanh())
    transposed = layer_of()
    transposed.input_proj.data = transposed.input_proj.data.mT.contiguous().mT
    negative = torch.complex(x, x).conj().imag  # a view whose sign is turned when it is read
    assert negative.is_neg()
    with torch.no_grad():
        for model, given in ((layer, x), (transposed, x), (layer_of(), negative)):
            torch.testing.assert_close(model(given), usual(model, given), rtol=1e-5, atol=1e-6)
    assert not lean_calls


def test_wrong_input_gets_the_usual_errors():
    layer = layer_of()
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"\(B,20,H,W\).*\(1, 19, 5, 4\)"):
            layer(torch.randn(1, 19, 5, 4))
        layer.weight_proj.data = layer.weight_proj.data.double()
        with pytest.raises(TypeError, match="float64"):
            layer(torch.randn(1, 20, 5, 4))
        layer.weight_proj.data = torch.randn(4, 3, 20, 7)
        with pytest.raises(ValueError, match="weight_proj"):
            layer(torch.randn(1, 20, 5, 4))


@pytest.mark.parametrize("segment", [0, -3, True, 2.5, 2**63])
def test_a_wrong_segment_is_an_error_without_gradients_too(segment, lean_calls):
    layer = layer_of()
    layer.segment = segment
    with torch.no_grad(), pytest.raises((ValueError, TypeError), match=f"segment.*{segment}"):
        layer(torch.randn(1, 20, 5, 4))
    layer.segment = np.int64(3)
    with torch.no_grad():
        y = layer(torch.ones(1, 20, 5, 4))
    layer.segment = 3
    torch.testing.assert_close(y, usual(layer, torch.ones(1, 20, 5, 4)))


def changes(layer, rng):
    """What people do to a layer between two calls."""
    parameter = rng.choice([p for p in layer.parameters()])
    noise = torch.randn_like(parameter)
    other = layer_of(**{"proxy_dim": layer.proxy_dim, "average": layer.average})
    return {
        "in place": lambda: parameter.add_(noise),
        "behind autograd's back": lambda: parameter.data.mul_(0.5),
        "other memory": lambda: setattr(parameter, "data", noise),
        "through shared memory": lambda: parameter.detach().view(-1)[::3].zero_(),
        "load": lambda: layer.load_state_dict(other.state_dict()),
        "assign": lambda: layer.load_state_dict(other.to(parameter.dtype).state_dict(), assign=True),
        "double": layer.double,
        "bfloat16": layer.bfloat16,
        "float32": layer.float,
        "train": layer.train,
        "eval": layer.eval,
        "frozen": lambda: layer.requires_grad_(False),
        "a new parameter": lambda: setattr(layer, "merger", nn.Parameter(torch.randn_like(layer.merger))),
        "options": lambda: setattr(layer, "segment", rng.choice([None, 2, 5])),
        "average": lambda: setattr(layer, "average", rng.random() < 0.5),
        "shared memory": layer.share_memory,
    }


def test_whatever_changes_between_calls_the_result_is_that_of_a_fresh_layer(lean_calls):
    rng = random.Random(0)
    torch.manual_seed(0)
    layer, done = layer_of(), set()
    for step in range(150):
        with torch.no_grad():
            name, change = rng.choice(list(changes(layer, rng).items()))
            change()
            x = torch.randn(rng.randint(1, 2), 20, rng.randint(1, 9), rng.randint(1, 9), dtype=layer.merger.dtype)
            got, want = layer(x), usual(layer, x)
        done.add(name)
        limit = 0.05 if x.dtype == torch.bfloat16 else 1e-4  # of the largest output
        assert (got - want).abs().max() <= limit * (want.abs().max() + 1), (step, name)
    assert done == set(changes(layer, rng)) and len(lean_calls) == 150
