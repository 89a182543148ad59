"""ONNX files: standard operators alone, the same graph at every size, torch's outputs in onnxruntime."""

import copy
import json
import math
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from helpers.fresh import fresh
from torch import nn

import gspn
from gspn.export import ExportError, export_onnx
from gspn.export.onnx import DEFAULT_OPSET, OLDEST_OPSET
from gspn.files import SaveError
from gspn.layers import input_means

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

SIZES = [(2, 6, 9), (1, 1, 1), (3, 1, 7), (1, 8, 1), (2, 13, 5), (1, 31, 40)]


def session_of(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def operators(graph) -> Counter:
    """How many nodes there are of each (domain, operator), bodies of Scans too."""
    found = Counter()
    for node in graph.node:
        found[node.domain, node.op_type] += 1
        for attribute in node.attribute:
            if attribute.HasField("g"):
                found += operators(attribute.g)
    return found


def assert_same_outputs(path, model, channels, sizes=SIZES, atol=1e-4, dtype=torch.float32):
    session = session_of(path)
    for batch, height, width in sizes:
        x = torch.randn(batch, channels, height, width)
        got = session.run(None, {"input": x.to(dtype).numpy()})
        with torch.no_grad():
            wanted = copy.deepcopy(model).eval()(x)
        for g, w in zip(got, wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
            assert g.shape == w.shape
            np.testing.assert_allclose(g, w.numpy(), rtol=0, atol=atol * max(float(w.abs().max()), 1e-3))


class EveryOperator(nn.Module):
    """Each operator in forms that differ in the exported graph: directions, segments, groups, skip."""

    CHANNELS, FEATURES = 6, 4

    def __init__(self):
        super().__init__()
        self.proxy = nn.Conv2d(self.CHANNELS, self.FEATURES, 1)
        self.numbers = nn.Parameter(torch.randn(1000))

    def parameters_of(self, *shape):
        return self.numbers[: math.prod(shape)].view(shape)

    def projected(self, proxy, *shape):
        return torch.einsum("...s,bshw->b...hw", self.parameters_of(*shape, self.FEATURES), proxy)

    def propagate(self, x, directions, segment, groups, skip, centered=False):
        proxy, count, draw = self.proxy(x), len(directions), self.parameters_of
        gates = [draw(count, self.CHANNELS, self.FEATURES), draw(count, self.CHANNELS, self.FEATURES) + 1]
        skip_proj = draw(self.CHANNELS, self.FEATURES) if skip else None
        weights = 40 * draw(count, 3, groups, self.FEATURES)  # logits beyond the floor of -28 too
        center = input_means(x, proxy, gates[0]) if centered else None
        options = dict(center=center, directions=directions, segment=segment)
        return gspn.propagate(x, proxy, weights, *gates, skip_proj, **options)

    def forward(self, x):
        proxy, channels = self.proxy(x), self.CHANNELS
        outputs = [
            self.propagate(x, gspn.DIRECTIONS, None, channels, True),
            self.propagate(x, ("left",), 3, 1, False, centered=True),
            self.propagate(x, ("up", "down"), 2, 2, True, centered=True),
            self.propagate(x, ("down", "right", "up"), 1, 3, False),
        ]
        for directions, segment, groups in ((("up", "right"), 2, 3), (("left",), None, channels), (("down",), 4, 1)):
            count = len(directions)
            gate, logits = self.projected(proxy, count, channels), 9 * self.projected(proxy, count, groups, 3)
            outputs.append(gspn.gated_scan(x, gate, logits, directions=directions, segment=segment))
        for direction, segment, groups in (("right", None, 1), ("down", 3, 2), ("left", 2, channels), ("up", None, 3)):
            weights = gspn.normalize_weights(self.projected(proxy, groups, 3), direction="right")
            outputs.append(gspn.line_scan(x, weights, direction=direction, segment=segment))
        return tuple(outputs)


@pytest.mark.slow
def test_every_operator_in_every_form_at_every_size(tmp_path):
    model, path = EveryOperator(), tmp_path / "every.onnx"
    written = export_onnx(model, path, torch.zeros(1, model.CHANNELS, 1, 1))
    assert written.difference <= 1e-4 and len({shape[2:] for shape in written.checked}) == 3
    assert_same_outputs(path, model, model.CHANNELS)
    proto = onnx.load(path)
    found = operators(proto.graph)
    assert {domain for domain, _ in found} == {""} and [o.domain for o in proto.opset_import] == [""]
    assert found["", "Scan"] == (4 + 1 + 2 + 3) + (2 + 1 + 1) + 4  # one for each direction, however many lines
    assert [o.name for o in proto.graph.output] == [f"output_{i}" for i in range(11)]


@pytest.mark.parametrize(
    "options",
    [
        {"directions": ("up", "left")},
        {"segment": 2, "scan_dim": 4, "skip": False, "merger": "mean"},
        {"center": True},
    ],
)
def test_the_layer(tmp_path, options):
    layer = gspn.GSPN2d(8, groups=None if "scan_dim" in options else 4, **options)
    written = export_onnx(layer, tmp_path / "layer.onnx")
    assert written.size_bytes == (tmp_path / "layer.onnx").stat().st_size
    assert_same_outputs(tmp_path / "layer.onnx", layer, 8)


def test_a_backbone_with_what_it_was_made_of(tmp_path):
    arguments = dict(num_classes=3, in_chans=1, width=8, depths=(1,), global_levels=(0,))
    model, path = gspn.create_model("gspn_micro", backend="reference", **arguments), tmp_path / "model.onnx"
    export_onnx(model, path, metadata={"class_names": ["a", "b", "ü"], "note": "text"})
    assert_same_outputs(path, model, 1, [(1, 1, 1), (2, 28, 28), (1, 33, 17)])
    assert model.training and model.levels[0].blocks[0].gspn.backend == "reference"  # the model stays as it was
    meta = session_of(path).get_modelmeta().custom_metadata_map
    assert json.loads(meta["model"]) == model.config and model.config["activation"] == "silu"
    assert json.loads(meta["class_names"]) == ["a", "b", "ü"] and meta["note"] == "text"
    proto = onnx.load(path)
    assert operators(proto.graph)["", "Scan"] == 4
    assert [d.dim_param for d in proto.graph.input[0].type.tensor_type.shape.dim] == ["batch", "", "height", "width"]
    assert __file__.rpartition("/tests")[0] not in str(proto)  # no paths of the machine that exported


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize("name", ["gspn_micro", "gspn_mobile"])
def test_a_segmenter_at_every_size(tmp_path, name):
    torch.manual_seed(0)
    model = gspn.create_segmenter(name, num_classes=3, width=8, depths=(1, 1), global_levels=(0, 1)).eval()
    for norm in (module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)):
        torch.nn.init.normal_(norm.weight)  # some start at 0
    written = gspn.export_onnx(model, tmp_path / "model.onnx")
    assert written.difference is not None and written.difference < 1e-4
    assert_same_outputs(written.path, model, 3)


def test_the_released_form_is_exported_as_it_is(tmp_path, capfd):
    arguments = dict(in_chans=1, num_classes=3, width=8, depths=(1,), global_levels=(), segment=3, activation=None)
    model = gspn.create_model("gspn_micro", alignment="released", **arguments)
    nn.init.normal_(model.levels[0].blocks[0].out_proj.weight)  # the scans have to be seen in the pooled features
    export_onnx(model, tmp_path / "released.onnx")
    assert "Traceback" not in capfd.readouterr().err  # torch tells of what it cannot simplify
    assert_same_outputs(tmp_path / "released.onnx", model, 1, [(2, 16, 16), (1, 21, 21), (3, 1, 1)])
    twin = gspn.create_model("gspn_micro", **arguments).eval()
    twin.load_state_dict(model.state_dict())
    x = torch.randn(1, 1, 17, 17)
    (got,) = session_of(tmp_path / "released.onnx").run(None, {"input": x.numpy()})
    assert np.abs(got - twin(x).detach().numpy()).max() > 1e-3 * np.abs(got).max()  # which the aligned form is not


def test_a_fixed_size_and_the_newest_opset(tmp_path):
    layer, newest = gspn.GSPN2d(4), onnx.defs.onnx_opset_version()
    export_onnx(layer, tmp_path / "a.onnx", size=(5, 3), opset=newest)
    unchecked = export_onnx(layer, tmp_path / "b.onnx", size=(50, 70), opset=OLDEST_OPSET, check=False)
    assert unchecked.difference is None and unchecked.checked == ()
    assert_same_outputs(tmp_path / "a.onnx", layer, 4, [(1, 5, 3), (4, 5, 3)])
    small, large = (onnx.load(tmp_path / f"{name}.onnx") for name in "ab")
    assert operators(small.graph) == operators(large.graph)  # the graph does not grow with the size
    assert (small.opset_import[0].version, large.opset_import[0].version) == (newest, OLDEST_OPSET)


def test_half_precision_keeps_the_state_in_float32(tmp_path):
    layer = gspn.GSPN2d(4, skip=False, merger="mean", directions=("right",))
    with torch.no_grad():  # logits, gates: all weight on the same place, h counts the lines
        for projection, value in ((layer.weight_proj, -8.0), (layer.input_proj, 1.0), (layer.output_proj, 1.0)):
            projection.fill_(value / layer.proxy_dim)
        layer.weight_proj[:, 1] = 8.0 / layer.proxy_dim
        layer.proxy_proj.weight.fill_(0.25)
    export_onnx(layer, tmp_path / "half.onnx", precision="fp16")
    x = torch.ones(1, 4, 1, 3000, dtype=torch.float16)
    (y,) = session_of(tmp_path / "half.onnx").run(None, {"input": x.numpy()})
    assert y.dtype == np.float16
    np.testing.assert_allclose(y[0, 0, 0, [0, 2047, -1]], [1, 2048, 3000])  # a float16 sum sticks at 2048


def test_a_file_that_differs_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("gspn.export.onnx_scan.LOGIT_FLOOR", 0.5)
    path = tmp_path / "model.onnx"
    path.write_bytes(b"earlier")
    with pytest.raises(ExportError, match="differs"):
        export_onnx(gspn.GSPN2d(4), path)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("model.onnx", b"earlier")]


CIRCULAR: list = []
CIRCULAR.append(CIRCULAR)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"opset": 17}, f"opset.*{OLDEST_OPSET}.*17"),
        ({"opset": 999}, "opset.*999"),
        ({"precision": "bf16"}, "precision.*'bf16'"),
        ({"precision": ["fp32"]}, r"precision.*\['fp32'\]"),
        ({"size": (0, 5)}, r"size.*\(0, 5\)"),
        ({"example": torch.zeros(1, 9, 5, 5)}, "2x9x5x5 float32"),
        ({"opset": "18"}, "opset.*'18'"),
        ({"size": 8}, "size.*8"),
        ({"size": (8.0, 8.0)}, r"size.*\(8.0, 8.0\)"),
        ({"batch": 0}, "batch.*0"),
        ({"metadata": {"a": torch.zeros(1)}}, r"metadata\['a'\].*JSON"),
        ({"metadata": {"a": CIRCULAR}}, r"metadata\['a'\].*JSON: Circular"),
        ({"metadata": {1: "a"}}, "names of metadata.*1"),
        ({"example": np.zeros((1, 4, 5, 5))}, r"example.*\(B,C,H,W\).*ndarray"),
        ({"example": torch.zeros(4, 5, 5)}, r"example.*\(B,C,H,W\).*4x5x5"),
    ],
)
def test_bad_options(tmp_path, arguments, message):
    with pytest.raises(ExportError, match=message):
        export_onnx(gspn.GSPN2d(4), tmp_path / "model.onnx", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_bad_models_and_places(tmp_path, monkeypatch):
    with pytest.raises(ExportError, match=r"Conv2d.*example"):
        export_onnx(nn.Conv2d(3, 4, 1), tmp_path / "model.onnx")
    with pytest.raises(ExportError, match=r"2x4x5x7.*square"):
        export_onnx(gspn.GSPN2d(4, alignment="released"), tmp_path / "model.onnx", size=(5, 7))
    with pytest.raises(ExportError, match=r"size=\(H, W\)"):
        export_onnx(nn.Sequential(gspn.GSPN2d(4), nn.Flatten(), nn.Linear(4 * 36, 2)), tmp_path / "m.onnx", EXAMPLE)
    monkeypatch.setattr("gspn.export.onnx.traced", None)  # a place is refused before the work begins
    with pytest.raises(ExportError, match=r"none to write model\.onnx"):
        export_onnx(gspn.GSPN2d(4), tmp_path / "none" / "model.onnx")
    with pytest.raises(ExportError, match="is a folder"):
        export_onnx(gspn.GSPN2d(4), tmp_path)
    with pytest.raises(SaveError, match="cannot write"):
        export_onnx(gspn.GSPN2d(4), "/proc/model.onnx")


EXAMPLE = torch.zeros(2, 4, 6, 6)


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_the_extra_is_named_where_it_is_missing(tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r'pip install "gspn\[onnx\]"'):
        export_onnx(gspn.GSPN2d(4), tmp_path / "model.onnx")


def test_importing_the_module_imports_nothing_of_the_extra():
    code = "import sys, gspn.export; print(*{m.split('.')[0] for m in sys.modules})"
    modules = fresh(code).stdout.split()
    assert not {"onnx", "onnxscript", "onnx_ir", "onnxruntime"} & set(modules) and "gspn" in modules
    assert OLDEST_OPSET <= DEFAULT_OPSET


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_torch_s_own_exporter_names_ours(dynamo, tmp_path):
    with pytest.raises(Exception, match=r"gspn\.export_onnx"):
        torch.onnx.export(gspn.GSPN2d(4).eval(), (torch.randn(2, 4, 3, 5),), tmp_path / "layer.onnx", dynamo=dynamo)


@pytest.mark.filterwarnings("ignore")
def test_torch_s_own_exporter_takes_a_translation_of_a_program():
    from onnxscript import opset18

    def translation(x, *others):
        return opset18.Identity(x)

    table = {torch.ops.gspn.propagate.default: translation}
    program = gspn.export.export_program(gspn.GSPN2d(4))
    assert torch.onnx.export(program, custom_translation_table=table, verbose=False) is not None
