"""torch.export with open sizes, AOTInductor packages, and torch.compile of layers and whole models."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import gspn
from gspn.export import ExportError, export_aoti, export_program
from gspn.export.program import compare
from gspn.layers import GSPNBlock, StridedConv2d

TINY = dict(num_classes=3, in_chans=1, width=8, depths=(1, 1), global_levels=(1,))
SIZES = [(2, 12, 17), (3, 21, 9), (5, 31, 30), (2, 40, 5)]


def gspn_nodes(program):
    return [n.target for n in program.graph.nodes if "gspn" in str(n.target) and n.op == "call_function"]


@pytest.mark.parametrize(
    ("make", "operator"),
    [
        (lambda: gspn.GSPN2d(8, scan_dim=4, backend="reference"), "propagate"),
        (lambda: GSPNBlock(8, segment=3, activation=None), "propagate"),
        (lambda: gspn.GSPN2d(8, alignment="released", segment=3), "line_scan"),
    ],
    ids=["layer", "block", "released"],
)
def test_layers_export_with_open_batch_height_and_width(make, operator):
    layer = make().eval()
    program = export_program(layer, torch.zeros(1, 8, 1, 1))  # from which nothing is fixed
    assert gspn_nodes(program) == [getattr(torch.ops.gspn, operator).default]
    for batch, height, width in SIZES:
        x = torch.randn(batch, 8, height, height if operator == "line_scan" else width)
        torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-5, atol=1e-5)


def test_backbones_export_with_open_batch_height_and_width():
    model = gspn.create_model("gspn_micro", **TINY)
    program = export_program(model)
    assert gspn_nodes(program) == 2 * [torch.ops.gspn.propagate.default] and model.training
    for batch, height, width in SIZES:
        x = torch.randn(batch, 1, height, width)
        torch.testing.assert_close(program.module()(x), model.eval()(x), rtol=1e-5, atol=1e-5)


def test_a_compiled_model_is_exported_as_the_one_inside():
    model = gspn.create_model("gspn_micro", **TINY).eval()
    program, x = export_program(torch.compile(model)), torch.randn(2, 1, 12, 17)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_program_of_one_size_or_one_batch():
    layer = gspn.GSPN2d(8).eval()
    program = export_program(layer, size=(1, 7))
    x = torch.randn(4, 8, 1, 7)
    torch.testing.assert_close(program.module()(x), layer(x))
    one = export_program(layer, size=(1, 7), batch=1)
    torch.testing.assert_close(one.module()(x[:1]), layer(x[:1]))
    with pytest.raises(AssertionError):
        program.module()(torch.randn(4, 8, 7, 1))


def test_what_cannot_be_exported():
    with pytest.raises(TypeError, match=r"model.*function"):
        export_program(lambda x: x)
    with pytest.raises(ExportError, match="cannot follow"):
        export_program(DataDependent(), torch.zeros(2, 1, 4, 4))
    with pytest.raises(ExportError, match=r"one batch.*batch=B"):
        export_program(OneBatch(), torch.zeros(2, 1, 4, 4))


def test_whatever_the_model_raises_is_an_export_error():
    x = torch.zeros(2, 8, 8, 8)
    with pytest.raises(ExportError, match=r"does not take an input of 2x8x8x8.*IndexError"):
        export_program(nn.Sequential(gspn.GSPN2d(8), Channel(9)), x)
    with pytest.raises(ExportError, match=r"does not take an input of 2x8x7x8.*AssertionError: even"):
        export_program(EvenHeight(), torch.zeros(2, 8, 7, 8))
    model = EvenHeight().eval()
    with pytest.raises(ExportError, match=r"does not take 1x8x5x4; size=.*AssertionError: even"):
        compare(model, lambda x: [model(x)], [(1, 8, 4, 4), (1, 8, 5, 4)], 1e-4)


def test_whatever_torch_export_raises_is_an_export_error(monkeypatch):
    def fails(*_, **__):
        raise KeyError("node")

    monkeypatch.setattr(torch.export, "export", fails)
    with pytest.raises(ExportError, match=r"cannot follow the model: KeyError: 'node'"):
        export_program(gspn.GSPN2d(8))


class Channel(nn.Module):
    def __init__(self, number):
        super().__init__()
        self.number = number

    def forward(self, x):
        return x[:, [self.number]]


class EvenHeight(nn.Module):
    def forward(self, x):
        assert x.shape[2] % 2 == 0, "even"
        return x + 1


class DataDependent(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class OneBatch(nn.Module):
    def forward(self, x):
        return x + torch.zeros(2, 1, 1, 1)


@pytest.mark.parametrize("stride", [1, 2])
def test_the_compiled_form_of_a_strided_convolution_is_the_same_convolution(stride):
    convolution = StridedConv2d(3, 4, stride)
    traced = torch.compile(convolution, backend="eager", fullgraph=True, dynamic=True)
    for height, width in ((6, 7), (9, 4), (3, 3)):
        x = torch.randn(2, 3, height, width)
        torch.testing.assert_close(traced(x), convolution(x))  # of another size, so perhaps by another algorithm
        assert convolution(x).shape[2:] == (-(-height // stride), -(-width // stride))


def check_at_many_sizes(module, channels, memory_format, backend, training):
    """Compiled once for all sizes, with the module's own outputs and gradients; compiling again is an error."""
    torch._dynamo.reset()
    compiled = torch.compile(module.train(training), fullgraph=True, dynamic=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, height, width in SIZES:
            x = torch.randn(batch, channels, height, width).to(memory_format=memory_format).requires_grad_(training)
            with torch.set_grad_enabled(training):
                y, expected = compiled(x), module(x)
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
            if training:
                grads = [torch.autograd.grad(out.square().sum(), [x, *module.parameters()]) for out in (y, expected)]
                torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4)


FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("memory_format", FORMATS, ids=["channels first", "channels last"])
def test_one_graph_of_a_layer_serves_every_resolution(memory_format):
    check_at_many_sizes(gspn.GSPN2d(8, segment=3), 8, memory_format, "aot_eager", True)


def test_a_size_that_compiles_again_is_noticed():
    """That the tests here can fail: what depends on a size compiles for each."""
    with pytest.raises(torch._dynamo.exc.RecompileError):
        check_at_many_sizes(EvenOrOdd(), 1, torch.contiguous_format, "eager", False)


class EvenOrOdd(nn.Module):
    def forward(self, x):
        return x + 1 if x.shape[-1] % 2 else x


@pytest.mark.slow
@pytest.mark.parametrize("memory_format", FORMATS, ids=["channels first", "channels last"])
def test_one_graph_of_a_model_serves_every_resolution(memory_format):
    model = gspn.create_model("gspn_micro", **TINY)
    check_at_many_sizes(model, 1, memory_format, "aot_eager", False)


@pytest.mark.slow
@pytest.mark.parametrize("memory_format", FORMATS, ids=["channels first", "channels last"])
def test_inductor_compiles_a_layer_once_in_training(memory_format):
    check_at_many_sizes(gspn.GSPN2d(8, segment=3), 8, memory_format, "inductor", True)


@pytest.mark.slow
@pytest.mark.parametrize("memory_format", FORMATS, ids=["channels first", "channels last"])
def test_inductor_compiles_a_model_once_for_inference(memory_format):
    model = gspn.create_model("gspn_micro", **TINY)
    check_at_many_sizes(model, 1, memory_format, "inductor", False)


@pytest.mark.slow
def test_an_aoti_package_gives_the_model_s_outputs_at_every_size(tmp_path):
    model, path = gspn.create_model("gspn_micro", **TINY).eval(), tmp_path / "model.pt2"
    written = export_aoti(model, path, metadata={"class_names": ["a", "b", "c"]})
    assert written.difference <= 1e-4 and len(written.checked) == 3 and written.size_bytes == path.stat().st_size
    inputs = [torch.randn(batch, 1, height, width) for batch, height, width in [*SIZES, (1, 16, 9)]]
    torch.save([inputs, [model(x).detach() for x in inputs]], tmp_path / "expected.pt")
    code = f"""
import gspn, torch  # in this order or the other, but both before loading
inputs, expected = torch.load({str(tmp_path / "expected.pt")!r})
model = torch._inductor.aoti_load_package({str(path)!r})
assert model.get_metadata()["class_names"] == '["a", "b", "c"]', model.get_metadata()
for x, y in zip(inputs, expected, strict=True):
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    without = code.replace("import gspn, torch", "import torch")
    failed = subprocess.run([sys.executable, "-c", without], capture_output=True, text=True)
    assert failed.returncode != 0 and "gspn" in failed.stderr


def test_bad_places_for_a_package(tmp_path):
    with pytest.raises(ExportError, match=r"\.pt2.*model\.so"):
        export_aoti(gspn.GSPN2d(4), tmp_path / "model.so")
    with pytest.raises(ExportError, match=r"none to write model\.pt2"):
        export_aoti(gspn.GSPN2d(4), tmp_path / "none" / "model.pt2")
