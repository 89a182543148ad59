"""The operators inside torch: opcheck, compile, export, vmap, autocast, meta tensors, FLOP counting, memory formats."""

import pytest
import torch
from helpers.problems import random_problem
from torch import nn
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import gspn
from gspn.layers import DropPath

EVERY = [0, 1, 2, 3]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("skip", "centered"), [(True, False), (False, True)])
def test_opcheck_propagate(layout, skip, centered):
    problem = random_problem(2, 4, 5, 7, 3, dtype=torch.float32, skip=skip)
    center = torch.randn(2, 4, 4, requires_grad=True) if centered else None
    x, proxy = (t.to(memory_format=layout) for t in problem[:2])
    arguments = [None if t is None else t.requires_grad_() for t in (x, proxy, *problem[2:])]
    opcheck(torch.ops.gspn.propagate, (*arguments, EVERY, 3, 256, center, ""))
    grad = torch.randn(2, 4, 5, 7).to(memory_format=layout)
    detached = [None if t is None else t.detach() for t in arguments]
    center = torch.randn(2, 4, 4) if centered else None
    opcheck(torch.ops.gspn.propagate_backward, (grad, *detached, EVERY, None, 256, center, ""))


def test_opcheck_scans():
    x, weights = torch.randn(2, 4, 5, 3), torch.rand(2, 2, 3, 5, 3)
    gate, logits = torch.randn(2, 4, 4, 5, 3), torch.randn(2, 4, 2, 3, 5, 3)
    for t in (x, weights, gate, logits):
        t.requires_grad_()
    opcheck(torch.ops.gspn.line_scan, (x, weights, 2, 2, ""))
    opcheck(torch.ops.gspn.gated_scan, (x, gate, logits, EVERY, None, ""))
    x, weights, gate, logits = (t.detach() for t in (x, weights, gate, logits))
    opcheck(torch.ops.gspn.line_scan_backward, (x, weights, x, 2, 2, ""))
    opcheck(torch.ops.gspn.gated_scan_backward, (gate, x, gate, logits, gate, EVERY, None, ""))


@pytest.mark.slow
def test_compile_whole_graph_with_dynamic_sizes():
    torch._dynamo.reset()
    layer = gspn.GSPN2d(8, segment=3, center=True)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    counter = torch._dynamo.utils.counters
    counter.clear()  # other tests in this process may have compiled
    for height, width in ((5, 7), (9, 4), (12, 12)):
        x = torch.randn(2, 8, height, width).to(memory_format=torch.channels_last).requires_grad_()
        y = compiled(x)
        y.square().sum().backward()
        got = [x.grad, *(p.grad for p in layer.parameters())]
        x.grad = None
        layer.zero_grad()
        expected = layer(x)
        expected.square().sum().backward()
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        for g, e in zip(got, [x.grad, *(p.grad for p in layer.parameters())], strict=True):
            torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-4)
        layer.zero_grad()
    assert counter["stats"]["unique_graphs"] == 1, "a second size must not compile again"


@pytest.mark.slow
def test_compile_a_whole_model():
    torch._dynamo.reset()
    model = gspn.create_model("gspn_micro", num_classes=3, in_chans=1, width=8, depths=(1, 1), global_levels=(0, 1))
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(2, 1, 12, 10)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_export_with_dynamic_height_and_width():
    layer = gspn.GSPN2d(8, scan_dim=4, center=True)
    auto = torch.export.Dim.AUTO
    exported = torch.export.export(layer, (torch.randn(2, 8, 6, 9),), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    nodes = [n.target for n in exported.graph.nodes if "gspn" in str(n.target)]
    assert nodes == [torch.ops.gspn.propagate.default]
    for size in ((2, 8, 6, 9), (3, 8, 11, 4)):
        x = torch.randn(size)
        torch.testing.assert_close(exported.module()(x), layer(x))


def test_vmap_over_data_and_over_parameters():
    x, proxy, *projections = random_problem(2, 4, 5, 3, 2, dtype=torch.float64)
    many = torch.randn(3, *x.shape, dtype=torch.float64)
    got = torch.vmap(lambda one: gspn.propagate(one, proxy, *projections))(many)
    torch.testing.assert_close(got, torch.stack([gspn.propagate(one, proxy, *projections) for one in many]))
    centers = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    call = lambda one, center: gspn.propagate(one, proxy, *projections, center=center)  # noqa: E731
    expected = torch.stack([call(one, center) for one, center in zip(many, centers, strict=True)])
    torch.testing.assert_close(torch.vmap(call)(many, centers), expected)
    gates = torch.randn(3, *projections[1].shape, dtype=torch.float64)
    call = lambda gate: gspn.propagate(x, proxy, projections[0], gate, *projections[2:])  # noqa: E731
    torch.testing.assert_close(torch.vmap(call)(gates), torch.stack([call(g) for g in gates]))
    weights = torch.rand(3, 2, 4, 3, 5, 3, dtype=torch.float64)
    scan = lambda w: gspn.line_scan(x, w, direction="up", segment=2)  # noqa: E731
    torch.testing.assert_close(torch.vmap(scan)(weights), torch.stack([scan(w) for w in weights]))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_vmap_where_the_map_is_not_mapped(memory_format, backend):
    x = torch.randn(2, 4, 5, 3).to(memory_format=memory_format)
    weights = torch.rand(3, 2, 4, 3, 5, 3)
    scan = lambda w: gspn.line_scan(x, w, direction="right", backend=backend)  # noqa: E731
    torch.testing.assert_close(torch.vmap(scan)(weights), torch.stack([scan(w) for w in weights]))
    gate, logits = torch.randn(2, 4, 4, 5, 3), torch.randn(3, 2, 4, 2, 3, 5, 3)
    gated = lambda a: gspn.gated_scan(x, gate, a, backend=backend)  # noqa: E731
    torch.testing.assert_close(torch.vmap(gated)(logits), torch.stack([gated(a) for a in logits]))


def test_vmap_over_the_backward_pass():
    problem = [t.requires_grad_() for t in random_problem(1, 2, 4, 3, 2)]
    y = gspn.propagate(*problem)
    grads = torch.randn(3, *y.shape, dtype=torch.float64)
    batched = torch.autograd.grad(y, problem, grads, is_grads_batched=True, retain_graph=True)
    for i, grad in enumerate(grads):
        for got, one in zip(batched, torch.autograd.grad(y, problem, grad, retain_graph=True), strict=True):
            torch.testing.assert_close(got[i], one)


def test_functional_transforms_on_the_reference():
    x, proxy, *projections = random_problem(3, 2, 4, 3, 2)

    def loss(gate, one, features):
        rest = (projections[0], gate, *projections[2:])
        return gspn.propagate(one[None], features[None], *rest, backend="reference").square().sum()

    per_sample = torch.vmap(torch.func.grad(loss), (None, 0, 0))(projections[1], x, proxy)
    assert per_sample.shape == (3, *projections[1].shape)
    for i in range(3):
        torch.testing.assert_close(per_sample[i], torch.func.grad(loss)(projections[1], x[i], proxy[i]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_x_s_dtype_and_the_float32_state(dtype, backend):
    problem = random_problem(1, 4, 6, 200, 3, dtype=torch.float32)
    outside = gspn.propagate(*problem, backend=backend)
    with torch.autocast("cpu", dtype=dtype):
        inside = gspn.propagate(*problem, backend=backend)
        mixed = gspn.propagate(problem[0], problem[1].to(dtype), *problem[2:], backend=backend)
    assert inside.dtype == mixed.dtype == torch.float32
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)  # nothing inside was computed in 16 bits
    torch.testing.assert_close(mixed, outside, rtol=0.1, atol=0.5)


def test_a_layer_trains_under_autocast():
    layer = gspn.GSPN2d(16)
    x = torch.randn(2, 16, 9, 6, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x.bfloat16())
        assert y.dtype == torch.bfloat16
    y.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())
    assert x.grad.isfinite().all()


def test_normalised_weights_stay_float32_inside_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights = gspn.normalize_weights(torch.randn(1, 2, 3, 4, 4).bfloat16(), direction="up")
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(2), torch.ones(1, 2, 4, 4))


def test_meta_tensors_have_the_shape_and_format_of_the_real_ones():
    layer = gspn.GSPN2d(8)
    x = torch.randn(2, 8, 6, 5).to(memory_format=torch.channels_last)
    with torch.device("meta"):
        imaginary = gspn.GSPN2d(8)
    y, expected = imaginary(x.to("meta")), layer(x)
    assert (y.shape, y.stride(), y.dtype) == (expected.shape, expected.stride(), expected.dtype)


def test_flops_grow_linearly_with_the_pixels():
    layer = gspn.GSPN2d(8)
    counts = []
    for side in (8, 16, 32):
        with FlopCounterMode(display=False) as counter:
            layer(torch.randn(1, 8, side, side))
        counts.append(counter.get_total_flops())
    assert counts[1] == 4 * counts[0] and counts[2] == 16 * counts[0]
    batch, channels, features = 1, 8, 8
    scans, projections = 4 * 10 * channels + 2 * channels, 2 * features * 21 * channels + 2 * features * channels
    assert counts[0] == batch * 64 * (scans + projections)


def test_forward_mode_is_an_error_where_it_would_be_silently_zero():
    layer, x = gspn.GSPN2d(4), torch.randn(1, 4, 3, 5)
    parameters = {n: p.detach() for n, p in layer.named_parameters()}
    call = lambda t: torch.func.functional_call(layer, parameters, (t,))  # noqa: E731
    with pytest.raises(RuntimeError, match='backend="reference"'):
        torch.func.jvp(call, (x,), (torch.ones_like(x),))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        weights = torch.rand(1, 4, 3, 3, 5)
        with pytest.raises(RuntimeError, match='backend="reference"'):
            gspn.line_scan(dual, weights, direction="up")
        gspn.line_scan(x, weights, direction="up")  # what has no tangent may pass
    layer.backend = "reference"
    _, tangent = torch.func.jvp(call, (x,), (torch.ones_like(x),))
    step = 1e-2
    difference = (call(x + step) - call(x - step)) / (2 * step)
    torch.testing.assert_close(tangent, difference, rtol=1e-2, atol=1e-3)


def small_model(**options):
    return gspn.create_model(
        "gspn_micro", num_classes=2, in_chans=1, width=4, depths=(1, 1), global_levels=(0,), **options
    )


def test_torch_func_gradients_of_native_kernels_name_the_reference():
    layer, x = gspn.GSPN2d(4), torch.randn(2, 4, 3, 5)
    loss = lambda t: layer(t).square().sum()  # noqa: E731
    by_parameter = lambda p: torch.func.functional_call(layer, p, (x,)).sum()  # noqa: E731
    parameters = {n: p.detach() for n, p in layer.named_parameters()}
    calls = {
        "grad": lambda: torch.func.grad(loss)(x),
        "grad by parameters": lambda: torch.func.grad(by_parameter)(parameters)["merger"],
        "vjp": lambda: torch.func.vjp(layer, x)[1](x)[0],
        "jacrev": lambda: torch.func.jacrev(layer)(x[:1]),
        "hessian": lambda: torch.func.hessian(loss)(x[:1, :, :1, :2]),
        "vmap of grad": lambda: torch.vmap(torch.func.grad(lambda t: loss(t[None])))(x),
        "grad of vmap": lambda: torch.func.grad(lambda t: torch.vmap(layer)(t[:, None]).sum())(x),
        "compiled": lambda: torch.compile(torch.func.grad(loss), backend="aot_eager")(x),
    }
    for name, call in calls.items():
        torch._dynamo.reset()
        with pytest.raises(RuntimeError, match='backend="reference"'):
            pytest.fail(f"{name} has no error: {call()}")
    weights = torch.rand(2, 4, 3, 3, 5)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        torch.func.grad(lambda w: gspn.line_scan(x, w, direction="up").sum())(weights)
    # what takes no gradient with respect to the scan may pass
    by_scale = torch.func.grad(lambda scale: (scale * layer(x).detach()).sum())(torch.tensor(1.0))
    torch.testing.assert_close(by_scale, layer(x).detach().sum())
    wanted = torch.autograd.grad(loss(x.requires_grad_()), x)[0]
    layer.backend = "reference"
    torch.testing.assert_close(calls["grad"](), wanted)


@pytest.mark.parametrize("alignment", ["aligned", "released"])
def test_symbolic_trace(alignment, backend):
    """A graph of fx computes what the module does, at other sizes too, and still checks its input."""
    layer = gspn.GSPN2d(4, scan_dim=2, alignment=alignment, average=alignment == "aligned", backend=backend)
    model = small_model(alignment=alignment, backend=backend, drop_path_rate=0.3).train()
    for module, sizes in ((layer, [(2, 4, 3, 3), (1, 4, 6, 6)]), (model, [(2, 1, 16, 16), (1, 1, 24, 24)])):
        traced = torch.fx.symbolic_trace(module)
        for size in sizes:
            x = torch.randn(size)
            results = []
            for each in (traced, module):
                torch.manual_seed(0)  # drop path
                results.append(each(x))
            assert torch.equal(*results)
        with pytest.raises(ValueError, match="got \\(1, 7, 4, 4\\)"):
            traced(torch.randn(1, 7, 4, 4))


def test_a_backbone_of_fake_tensors(backend):
    """Made and run under the mode, and run by fake tensors without it."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode():
        y = small_model(backend=backend)(torch.randn(2, 1, 16, 16))
    assert isinstance(y, FakeTensor) and y.shape == (2, 2)
    mode, real = FakeTensorMode(), small_model(backend=backend)
    state = {name: mode.from_tensor(tensor) for name, tensor in real.state_dict().items()}
    y = torch.func.functional_call(real.eval(), state, (mode.from_tensor(torch.randn(2, 1, 16, 16)),))
    assert isinstance(y, FakeTensor) and y.shape == (2, 2)


@pytest.mark.filterwarnings("ignore")  # sizes that are looked at
def test_torch_script():
    model, x = small_model().eval(), torch.randn(2, 1, 16, 16)
    with pytest.raises(RuntimeError, match=r"torch\.export"):
        torch.jit.script(model)
    traced = torch.jit.trace(model, (x,))
    other = torch.randn(1, 1, 24, 18)
    torch.testing.assert_close(traced(other), model(other))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("size", "segment"), [(8, 10), (16, 10), (8, None)])
def test_a_trace_averages_over_the_lines_of_other_maps(size, segment):
    layer = gspn.GSPN2d(8, average=True, segment=segment)
    traced = torch.jit.trace(layer, torch.randn(1, 8, size, size))
    for height, width in ((5, 24), (24, 5), (size, size)):
        x = torch.randn(2, 8, height, width)
        torch.testing.assert_close(traced(x), layer(x))


@pytest.mark.filterwarnings("ignore")
def test_the_reference_is_traced_at_one_size_and_normalisation_at_any():
    normalize = lambda logits: gspn.normalize_weights(logits, direction="right")  # noqa: E731
    traced = torch.jit.trace(normalize, torch.randn(1, 2, 3, 4, 5))
    for height, width in ((1, 1), (9, 6)):
        logits = torch.randn(2, 2, 3, height, width)
        assert torch.equal(traced(logits), normalize(logits))
    layer, x = gspn.GSPN2d(8, backend="reference"), torch.randn(2, 8, 4, 5)
    torch.testing.assert_close(torch.jit.trace(layer, torch.zeros_like(x))(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_default_dtype_and_device_change_nothing(dtype, backend):
    layer, x = gspn.GSPN2d(4, backend=backend), torch.randn(2, 4, 3, 5)
    model, images = small_model(backend=backend).eval(), torch.randn(2, 1, 16, 16)

    def results():
        problem = [t.float() for t in (x, x)] + [torch.ones(4, 3, 4, 4).float(), *[torch.ones(4, 4, 4).float()] * 2]
        arguments = (x, *problem, None, [0, 1, 2, 3], None, 256, None, backend)
        gradients = torch.ops.gspn.propagate_backward(*arguments)  # the last two are empty: no skip, no center
        return [layer(x), model(images), *layer.context(x, 1, 2), *gradients]

    wanted = results()
    try:
        torch.set_default_dtype(dtype)
        changed = results()
        torch.set_default_dtype(torch.float32)
        torch.set_default_device("meta")
        on_meta = [layer(x), model(images), *layer.context(x, 1, 2)]
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    for got, want in zip(changed + on_meta, wanted + wanted[:5], strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want)


def test_drop_path_keeps_its_rate_under_a_coarse_default_dtype():
    drop = DropPath(1 / 1000)
    try:
        torch.set_default_dtype(torch.bfloat16)
        kept = drop(torch.ones(200_000, dtype=torch.float32)) != 0
    finally:
        torch.set_default_dtype(torch.float32)
    assert 100 < (~kept).sum() < 300  # in bfloat16 781 are 0


@pytest.mark.parametrize("channels_last", [False, True])
def test_vmap_over_the_layer_and_a_model(channels_last):
    layer = gspn.GSPN2d(6, scan_dim=3)
    many = torch.randn(3, 2, 5, 4, 6).movedim(-1, 2) if channels_last else torch.randn(3, 2, 6, 5, 4)
    torch.testing.assert_close(torch.vmap(layer)(many), torch.stack([layer(x) for x in many]))
    model = gspn.create_model("gspn_micro", num_classes=2, in_chans=1, width=4, depths=(1,), global_levels=(0,)).eval()
    images = torch.randn(3, 2, 1, 8, 8)
    torch.testing.assert_close(torch.vmap(model)(images), torch.stack([model(x) for x in images]))


def test_the_whole_graph_is_captured_for_the_layer_on_any_backend(backend):
    torch._dynamo.reset()
    layer = gspn.GSPN2d(4, backend=backend)
    x = torch.randn(2, 4, 3, 5, requires_grad=True)
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, layer(x))
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad(layer(x).sum(), x)[0])


def test_copies_and_state_dicts():
    import copy
    import io

    layer = gspn.GSPN2d(8)
    twin = copy.deepcopy(layer)
    x = torch.randn(1, 8, 4, 4)
    torch.testing.assert_close(twin(x), layer(x))
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    fresh = gspn.GSPN2d(8)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    torch.testing.assert_close(fresh(x), layer(x))


def test_use_as_an_ordinary_module():
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), gspn.GSPN2d(16), nn.Conv2d(16, 2, 1))
    loss = net(torch.randn(2, 3, 13, 8)).square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
