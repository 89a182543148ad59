"""The operators as standard ONNX operators: one Scan over the lines for each direction, so that the graph has the same
few nodes at every size.

torch leaves each operator as one node of the domain "gspn" (`symbols`), and `expand` replaces the node by standard
ones. Inside, maps are held line by line with channels last, (T,B,P,C): T lines, P places in a line. `propagate`
projects weights and gates from the proxy in the body of the Scan, a line at a time, so that memory never holds a map of
the weights. The state is float32 (float64 for float64), as everywhere.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir import DataType, Value
from torch import Tensor

from gspn.kernels.reference import LOGIT_FLOOR

DOMAIN = "gspn"
_TO_LINES = ((3, 0, 2, 1), (2, 0, 3, 1))  # (B,C,H,W) to (T,B,P,C), lines being columns (right, left) or rows
_FROM_LINES = ((1, 3, 2, 0), (1, 3, 0, 2))
_END = np.iinfo(np.int64).max


# In torch: an operator becomes one node of our domain


def symbols() -> dict:
    """With it, `ExportedProgram.run_decompositions` leaves each operator as one node of the domain "gspn"."""
    return {
        torch.ops.gspn.propagate.default: _propagate_symbol,
        torch.ops.gspn.gated_scan.default: _gated_scan_symbol,
        torch.ops.gspn.line_scan.default: _line_scan_symbol,
    }


def _propagate_symbol(x, proxy, weight_proj, input_proj, output_proj, skip_proj, directions, segment, _, center, *__):
    inputs = (x, proxy, weight_proj, input_proj, output_proj, skip_proj, center)
    return _symbol("propagate", inputs, directions, segment, like=x)


def _gated_scan_symbol(x, input_gate, logits, directions, segment, *_):
    return _symbol("gated_scan", (x, input_gate, logits), directions, segment, like=input_gate)


def _line_scan_symbol(x, weights, direction, segment, *_):
    return _symbol("line_scan", (x, weights), [direction], segment, like=x)


def _symbol(name: str, inputs: Sequence[Tensor | None], directions: list[int], segment: int | None, like: Tensor):
    attributes = {"directions": list(directions), "segment": segment or 0}
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{name}", inputs, attributes, dtype=like.dtype, shape=like.shape, version=1
    )


# In ONNX: the node becomes Scans


def expand(model: ir.Model) -> None:
    """Replaces every node of the domain "gspn" by standard operators, in place."""
    for node in list(model.graph):
        if node.domain == DOMAIN:
            (old,) = node.outputs
            nodes = _Nodes(str(old.name))
            new = getattr(_Expansion(nodes, node), node.op_type)()
            ir.convenience.replace_nodes_and_values(model.graph, node, [node], nodes, [old], [new])
    model.graph.opset_imports.pop(DOMAIN, None)


class _Nodes(list):
    """Collects nodes; each value has a unique name that starts with the name of the value that the nodes replace.

    The constants of a body are collected outside it, each once.
    """

    def __init__(self, prefix: str, outside: "_Nodes | None" = None):
        super().__init__()
        self.prefix, self.outside = prefix, outside
        self.constants: dict[tuple, Value] = {}

    def add(self, op: str, *inputs: Value | None, count: int = 1, **attributes):
        name = f"{self.prefix}/{op}_{len(self)}"
        outputs = [Value(name=f"{name}:{i}") for i in range(count)]
        self.append(ir.node(op, inputs, attributes, outputs=outputs, name=name))
        return outputs[0] if count == 1 else outputs

    def constant(self, value, dtype: DataType = DataType.INT64) -> Value:
        if self.outside is not None:
            return self.outside.constant(value, dtype)
        array = np.asarray(value)
        key = (array.tobytes(), array.shape, dtype)
        if key not in self.constants:
            self.constants[key] = self.add("Constant", value=ir.tensor(array.tolist(), dtype=dtype))
        return self.constants[key]

    def sum(self, values: Sequence[Value]) -> Value:
        total, *rest = values
        for value in rest:
            total = self.add("Add", total, value)
        return total


class _Expansion:
    """The expansion of one node of our domain: a method for each operator."""

    def __init__(self, nodes: _Nodes, node: ir.Node):
        self.nodes, self.inputs, self.x = nodes, node.inputs, node.inputs[0]
        self.directions = list(node.attributes["directions"].as_ints())
        self.segment = node.attributes["segment"].as_int()
        self.dtype, self.channels = self.x.dtype, self.x.shape[1]
        self.state = DataType.DOUBLE if self.dtype == DataType.DOUBLE else DataType.FLOAT
        self.frames: dict[int, dict[str, Value]] = {}

    def propagate(self) -> Value:
        _, proxy, weight_proj, *gate_projs, skip_proj, center = [*self.inputs, None, None][:7]
        groups, features = weight_proj.shape[2:]
        proxy_lines, merged = {}, {}
        for i, direction in enumerate(self.directions):
            axis = direction % 2
            if axis not in proxy_lines:
                proxy_lines[axis] = self.lines(proxy, axis)
            parts = [self.entry(p, i) for p in (weight_proj, *gate_projs)] + ([] if skip_proj is None else [skip_proj])
            rows = [self.cast(self.reshape(part, -1, features), self.state) for part in parts]
            matrix = self.nodes.add("Transpose", self.nodes.add("Concat", *rows, axis=0), perm=[1, 0])
            taken = None
            if center is not None:  # (B,C) to (B,1,C), beside lines (B,P,C)
                taken = self.nodes.add("Unsqueeze", self.entry(center, i, axis=1), self.nodes.constant([1]))
            skips = skip_proj is not None
            h = self.scan(direction, groups, [proxy_lines[axis]], matrix=matrix, skip=skips, center=taken)
            merged.setdefault(axis, []).append(h)
            skip_proj = None  # only the first direction adds it
        return self.nodes.sum([self.from_lines(self.nodes.sum(maps), axis) for axis, maps in merged.items()])

    def gated_scan(self) -> Value:
        _, input_gate, logits = self.inputs
        states = []
        for i, direction in enumerate(self.directions):
            axis = direction % 2
            gate = self.lines(self.entry(input_gate, i, axis=1), axis)
            h = self.scan(direction, logits.shape[2], [self.weight_lines(self.entry(logits, i, axis=1), axis), gate])
            states.append(self.nodes.add("Unsqueeze", self.from_lines(h, axis), self.nodes.constant([1])))
        return self.nodes.add("Concat", *states, axis=1) if len(states) > 1 else states[0]

    def line_scan(self) -> Value:
        _, weights = self.inputs
        (direction,) = self.directions
        lines = self.weight_lines(weights, direction % 2)
        return self.from_lines(self.scan(direction, weights.shape[1], [lines], normalize=False), direction % 2)

    # Maps and lines

    def lines(self, t: Value, axis: int) -> Value:
        """(B,C,H,W) to (T,B,P,C)."""
        return self.nodes.add("Transpose", t, perm=_TO_LINES[axis])

    def weight_lines(self, t: Value, axis: int) -> Value:
        """(B,G,3,H,W) to (T,B,P,3G), all groups of the previous place first."""
        t = self.nodes.add("Transpose", t, perm=(4, 0, 3, 2, 1) if axis == 0 else (3, 0, 4, 2, 1))
        return self.nodes.add("Reshape", t, self.nodes.constant([0, 0, 0, -1]))

    def from_lines(self, t: Value, axis: int) -> Value:
        return self.cast(self.nodes.add("Transpose", t, perm=_FROM_LINES[axis]), self.dtype)

    def entry(self, t: Value, number: int, axis: int = 0) -> Value:
        return self.nodes.add("Gather", t, self.nodes.constant(number), axis=axis)

    def reshape(self, t: Value, *shape: int) -> Value:
        return self.nodes.add("Reshape", t, self.nodes.constant(shape))

    def cast(self, t: Value, dtype: DataType, nodes: _Nodes | None = None) -> Value:
        nodes = self.nodes if nodes is None else nodes
        return t if self.state == self.dtype else nodes.add("Cast", t, to=dtype)

    def frame(self, axis: int) -> dict[str, Value]:
        """Shared by the scans of one axis: x's lines, the state before the first line, which neighbours exist (P,1),
        and whether each line continues from the state of the line before."""
        if axis not in self.frames:
            nodes, x = self.nodes, self.lines(self.x, axis)
            count, places = (nodes.add("Squeeze", nodes.add("Shape", x, start=i, end=i + 1)) for i in (0, 2))
            zero, one = nodes.constant(0), nodes.constant(1)
            place = nodes.add("Unsqueeze", nodes.add("Range", zero, places, one), nodes.constant([1]))
            frame = {
                "x": x,
                "start": nodes.add(
                    "ConstantOfShape", nodes.add("Shape", x, start=1), value=ir.tensor([0], dtype=self.state)
                ),
                "has_previous": nodes.add("Greater", place, zero),
                "has_next": nodes.add("Less", place, nodes.add("Sub", places, one)),
                "zero": nodes.constant(0.0, self.state),
                "one": nodes.constant(1.0, self.state),
                "floor": nodes.constant(LOGIT_FLOOR, self.state),
            }
            line = nodes.add("Range", zero, count, one)
            line = nodes.add("Mod", line, nodes.constant(self.segment)) if self.segment else line
            frame["continues"] = nodes.add("Cast", line, to=DataType.BOOL)
            self.frames[axis] = frame
        return self.frames[axis]

    # The scan

    def scan(
        self,
        direction: int,
        groups: int,
        others: list[Value],
        *,
        matrix: Value | None = None,
        skip: bool = False,
        center: Value | None = None,
        normalize: bool = True,
    ) -> Value:
        """One direction: h (T,B,P,C), or with a matrix the output gate times h.

        ``others`` are the inputs by lines beside x: the proxy, which the ``matrix`` (S,N) projects to logits, input
        gate, output gate and, with ``skip``, skip gate; or the logits and the input gate; or only the weights.
        ``center`` (B,1,C) is taken from the gated input of each line that continues from the one before.
        """
        axis, body = direction % 2, _Nodes(f"{self.nodes.prefix}/{direction}", outside=self.nodes)
        frame, h = self.frame(axis), Value(name=f"{body.prefix}/h")
        marked = bool(self.segment) or center is not None
        by_line = [frame["x"], *others] + ([frame["continues"]] if marked else [])
        lines = [Value(name=f"{body.prefix}/line_{i}") for i in range(len(by_line))]
        x, *rest = (self.cast(line, self.state, body) for line in lines[: 1 + len(others)])
        if matrix is not None:
            widths = [3 * groups, *[self.channels] * (2 + skip)]
            projected = body.add("MatMul", rest[0], matrix)
            rest = body.add("Split", projected, body.constant(widths), count=len(widths), axis=-1)
        weights, *gates = rest
        before = body.add("Where", lines[-1], h, frame["zero"]) if self.segment else h
        entering = body.add("Mul", gates[0], x) if gates else x
        if center is not None:
            entering = body.add("Sub", entering, body.add("Where", lines[-1], center, frame["zero"]))
        after = self.step(body, frame, before, entering, weights, groups, normalize)
        y = body.add("Mul", gates[1], after) if matrix is not None else body.add("Identity", after)
        if skip:
            y = body.add("Add", y, body.add("Mul", gates[2], x))
        graph = ir.Graph([h, *lines], [after, y], nodes=body, name=f"{body.prefix}/body")
        ways = [int(direction >= 2)] * (1 + len(others)) + [0] * marked  # segments count from the start
        outputs = self.nodes.add(
            "Scan",
            frame["start"],
            *by_line,
            count=2,
            body=graph,
            num_scan_inputs=len(by_line),
            scan_input_directions=ways,
            scan_output_directions=ways[:1],
        )
        return outputs[1]

    def step(
        self, body: _Nodes, frame: dict[str, Value], h: Value, b: Value, weights: Value, groups: int, normalize: bool
    ) -> Value:
        """The next state (B,P,C) of state h, gated input b and weights or logits (B,P,3G)."""
        if normalize:
            # 1 / (1 + e^-a): onnxruntime's Sigmoid is 0 below about -18, where the weights would be 0 / 0
            powers = body.add("Exp", body.add("Neg", body.add("Max", weights, frame["floor"])))
            weights = body.add("Reciprocal", body.add("Add", powers, frame["one"]))
        if 1 < groups < self.channels:
            group = np.arange(self.channels) * groups // self.channels
            columns = np.concatenate([group + k * groups for k in range(3)])
            weights = body.add("Gather", weights, body.constant(columns), axis=-1)
        previous, same, following = body.add("Split", weights, count=3, axis=-1, num_outputs=3)
        previous = body.add("Where", frame["has_previous"], previous, frame["zero"])
        following = body.add("Where", frame["has_next"], following, frame["zero"])
        padded = body.add("Pad", h, body.constant([0, 1, 0, 0, 1, 0]))
        axes = body.constant([1])
        h_previous = body.add("Slice", padded, body.constant([0]), body.constant([-2]), axes)
        h_following = body.add("Slice", padded, body.constant([2]), body.constant([_END]), axes)
        terms = ((previous, h_previous), (same, h), (following, h_following))
        mixed = body.sum([body.add("Mul", weight, state) for weight, state in terms])
        if normalize:
            mixed = body.add("Div", mixed, body.sum([previous, same, following]))
        return body.add("Add", b, mixed)
