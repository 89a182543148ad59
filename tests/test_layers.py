"""The GSPN unit and the block: what they compute, their state dict, and where context comes from."""

import copy

import pytest
import torch
from torch import nn

import gspn
from gspn.layers import DropPath, GlobalResponseNorm, GSPNBlock

CENTERED = dict(center=True)


def unit_by_convolutions(layer, x):
    """The unit as the paper draws it: 1x1 convolutions, four gated scans, a merger; no folding of any kind."""
    z, proxy = layer.reduce(x), layer.proxy_proj(x)
    conv = lambda w: nn.functional.conv2d(proxy, w.reshape(-1, layer.proxy_dim, 1, 1))  # noqa: E731
    merger = layer.merger if layer.merger is not None else torch.full((len(layer.directions),), 0.25)
    y = torch.zeros_like(z)
    for i, direction in enumerate(layer.directions):
        logits = conv(layer.weight_proj[i]).unflatten(1, (3, layer.groups)).transpose(1, 2)
        weights = gspn.normalize_weights(logits, direction=direction)
        gated = conv(layer.input_proj[i]) * z
        mean = gated.mean((2, 3), keepdim=True) if layer.center else 0.0
        h = gspn.line_scan(gated - mean, weights, direction=direction, segment=layer.segment, backend="reference")
        h = h + mean
        out = conv(layer.output_proj[i]) * h
        if layer.skip_proj is not None:
            out = out + conv(layer.skip_proj[i]) * z
        y = y + merger[i] * out
    return layer.expand(y)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"segment": 3},
        {"groups": 1},
        {"groups": 4, "proxy_dim": 3},
        {"scan_dim": 4},
        {"skip": False, "merger": "mean"},
        {"merger": "mean"},
        {"center": True},
        {"center": True, "segment": 4, "groups": 3, "skip": False, "directions": ("up", "left", "right")},
        CENTERED | {"scan_dim": 4},
    ],
)
def test_the_unit_is_what_the_paper_draws(options, backend):
    layer = gspn.GSPN2d(12, backend=backend, **options)
    if layer.merger is not None:
        nn.init.normal_(layer.merger)
    x = torch.randn(2, 12, 6, 9)
    torch.testing.assert_close(layer(x), unit_by_convolutions(layer, x), rtol=1e-4, atol=1e-5)


def test_defaults():
    assert gspn.GSPN2d(96).proxy_dim == 8 and gspn.GSPN2d(640).proxy_dim == 40
    layer = gspn.GSPN2d(32, scan_dim=4)
    assert layer.groups == 1 and layer.weight_proj.shape == (4, 3, 1, 8)
    assert gspn.GSPN2d(32).groups == 32
    torch.testing.assert_close(gspn.GSPN2d(8).merger.detach(), torch.full((4,), 0.25))
    assert "segment=2" in repr(gspn.GSPN2d(8, segment=2)) and "global" in repr(gspn.GSPN2d(8))


def test_frozen_state_dict():
    names = lambda **k: {n: tuple(p.shape) for n, p in gspn.GSPN2d(12, proxy_dim=5, **k).state_dict().items()}  # noqa: E731
    assert names() == {
        "proxy_proj.weight": (5, 12, 1, 1),
        "weight_proj": (4, 3, 12, 5),
        "input_proj": (4, 12, 5),
        "output_proj": (4, 12, 5),
        "skip_proj": (4, 12, 5),
        "merger": (4,),
    }
    assert names(scan_dim=6, groups=2, skip=False, merger="mean") == {
        "proxy_proj.weight": (5, 12, 1, 1),
        "weight_proj": (4, 3, 2, 5),
        "input_proj": (4, 6, 5),
        "output_proj": (4, 6, 5),
        "reduce.weight": (6, 12, 1, 1),
        "expand.weight": (12, 6, 1, 1),
    }
    assert names(center=True) == names()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (31, 2)])
@pytest.mark.parametrize("options", [{}, CENTERED])
def test_any_size_and_floating_dtype(dtype, size, options, backend):
    layer = gspn.GSPN2d(8, backend=backend, **options).to(dtype)
    x = torch.randn(2, 8, *size, dtype=dtype, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.shape and y.dtype == dtype and x.grad.isfinite().all()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"segment": 1},
        {"alignment": "released"},
        {"scan_dim": 2},
        {"average": True},
        CENTERED,
        CENTERED | {"scan_dim": 2},
    ],
)
@pytest.mark.parametrize("shape", [(2, 4, 1, 1), (0, 4, 1, 1), (0, 4, 3, 3)])
def test_every_parameter_has_a_gradient_at_every_size(shape, options, backend):
    layer = gspn.GSPN2d(4, proxy_dim=2, backend=backend, **options)
    layer(torch.randn(shape)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    assert (layer.weight_proj.grad == 0).all()


def test_the_narrowest_context_is_that_of_one_channel():
    """Of a channel that goes straight on, beside others that spread."""
    torch.manual_seed(0)
    layer = gspn.GSPN2d(6, proxy_dim=4, groups=3)
    with torch.no_grad():
        layer.weight_proj.zero_()
        layer.proxy_proj.weight.fill_(1.0)
        layer.weight_proj[:, 1, 2] = 100.0  # the neighbour straight before; channels 4 and 5
        layer.weight_proj[:, ::2, 2] = -100.0
    context = layer.context(torch.rand(2, 6, 7, 9) + 0.1, 3, 4)
    right, down, left, up = context.narrowest.unbind(1)
    for straight, row in ((right, right[:, 3, :5]), (left, left[:, 3, 4:]), (down, down[:, :4, 4]), (up, up[:, 3:, 4])):
        torch.testing.assert_close(row, torch.ones_like(row), atol=1e-4, rtol=0)
        assert straight.sum() == pytest.approx(row.sum().item(), rel=1e-3)
    assert (context.directions[:, 0, 2, 3] > 0.1).all()  # the mean over channels spreads


def test_context_inside_inference_mode():
    layer, x = gspn.GSPN2d(4), torch.randn(1, 4, 3, 5)
    with torch.inference_mode():
        inside = layer.context(x + 0, 1, 2)
    for got, want in zip(inside, layer.context(x, 1, 2), strict=True):
        assert torch.equal(got, want) and not want.requires_grad


@pytest.mark.parametrize("options", [{}, CENTERED])
def test_memory_format_is_kept(options, backend):
    layer = gspn.GSPN2d(8, backend=backend, **options)
    x = torch.randn(2, 8, 6, 5)
    last = layer(x.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last) and layer(x).is_contiguous()
    torch.testing.assert_close(last, layer(x))


def test_no_positional_embedding_and_no_fixed_size():
    """Parameters fit any map, and far from the edges a local layer does not see where it is."""
    layer = gspn.GSPN2d(8, segment=2)
    x = torch.randn(1, 8, 12, 12)
    shifted = layer(torch.roll(x, (2, 2), (2, 3)))[..., 4:10, 4:10]
    torch.testing.assert_close(shifted, layer(x)[..., 2:8, 2:8], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, CENTERED])
def test_context_sums_to_one_a_line_and_is_the_jacobian(options):
    layer = gspn.GSPN2d(4, proxy_dim=3, **options).double()
    x = torch.randn(2, 4, 6, 7, dtype=torch.float64)
    context = layer.context(x, 2, 3)
    assert context.directions.shape == (2, 4, 6, 7) and context.merged.shape == (2, 6, 7)
    right, down, left, up = context.directions.unbind(1)
    for lines, count in ((right.sum(1), 4), (left.sum(1).flip(-1), 4), (down.sum(2), 3), (up.sum(2).flip(-1), 4)):
        torch.testing.assert_close(lines[:, :count], torch.ones_like(lines[:, :count]))
        assert (lines[:, count:] == 0).all()
    # merged: with the gates held still, the layer is linear, and this is the size of its Jacobian at the pixel
    proxy = layer.proxy_proj(x[:1])
    frozen = x[:1].clone().requires_grad_()
    y = layer._propagate(frozen, proxy)
    (jacobian,) = torch.autograd.grad(y[..., 2, 3].sum(), frozen)
    torch.testing.assert_close(context.merged[0].double(), jacobian[0].abs().mean(0), rtol=1e-4, atol=1e-6)


def released_unit(**options):
    layer = gspn.GSPN2d(6, proxy_dim=3, alignment="released", **options).double()
    nn.init.normal_(layer.merger)
    return layer


def test_the_released_form_has_the_same_keys_and_keeps_what_the_layer_promises(backend):
    layer = released_unit(backend=backend)
    assert layer.state_dict().keys() == gspn.GSPN2d(6, proxy_dim=3).state_dict().keys()
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    last = layer(x.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last) and layer(x).is_contiguous()
    torch.testing.assert_close(last, layer(x))
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16 and "released" in repr(layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.float()(x.float()).dtype == torch.float32
    assert gspn.GSPN2d(6, alignment="released", groups=2, scan_dim=4, skip=False)(x.float()).shape == x.shape
    with pytest.raises(ValueError, match=r"square.*4x5"):
        layer(torch.randn(1, 6, 4, 5))
    with pytest.raises(ValueError, match=r"alignment.*None"):
        gspn.GSPN2d(6, alignment=None)


@pytest.mark.parametrize("direction", gspn.DIRECTIONS)
def test_released_directions_are_ours(direction):
    """On a map that every flip and transposition leaves as it is, weights and gates are symmetric too: what the
    released form leaves turned is then exactly what the aligned form turns back."""
    released = released_unit()
    with torch.no_grad():
        released.merger.copy_(torch.tensor([float(d == direction) for d in gspn.DIRECTIONS]))
    aligned = gspn.GSPN2d(6, proxy_dim=3).double()
    aligned.load_state_dict(released.state_dict())
    x = torch.randn(2, 6, 7, 7, dtype=torch.float64)
    x = x + x.flip(-1)
    x = x + x.flip(-2)
    x = x + x.mT
    turn_back = {
        "right": lambda t: t,
        "down": lambda t: t.mT,
        "left": lambda t: t.flip(-1),
        "up": lambda t: t.mT.flip(-2),
    }
    torch.testing.assert_close(aligned(x), turn_back[direction](released(x)))
    assert not torch.allclose(aligned(x), released(x)) or direction == "right"


def test_released_context_is_the_jacobian():
    layer = released_unit(segment=3)
    x = torch.randn(1, 6, 5, 5, dtype=torch.float64)
    context = layer.context(x, 1, 3)
    proxy = layer.proxy_proj(x).detach()
    frozen = x.clone().requires_grad_()
    (jacobian,) = torch.autograd.grad(layer._propagate(frozen, proxy)[..., 1, 3].sum(), frozen)
    torch.testing.assert_close(context.merged[0].double(), jacobian[0].abs().mean(0), rtol=1e-4, atol=1e-6)
    sums = context.directions.flatten(2).sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums))  # column 3 starts a segment: one pixel a direction


def test_block_is_the_paper_s():
    block = GSPNBlock(8, proxy_dim=3, segment=2).eval()
    for p in block.grn.parameters():
        nn.init.normal_(p)
    x = torch.randn(2, 8, 5, 6)
    channels = lambda f, t: f(t.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # noqa: E731
    z = channels(block.in_proj, channels(block.norm1, x))
    z = nn.functional.silu(nn.functional.conv2d(z, block.dwconv.weight, padding=3, groups=12))
    z = channels(block.norm, block.gspn(z))
    size = z.norm(dim=(2, 3), keepdim=True)
    relative = size / (size.mean(1, keepdim=True) + 1e-6)
    z = block.grn.gamma.view(-1, 1, 1) * (z * relative) + block.grn.beta.view(-1, 1, 1) + z
    expected = x + channels(block.out_proj, z)
    expected = expected + channels(block.mlp, channels(block.norm2, expected))
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)
    plain = GSPNBlock(8, activation=None)
    assert isinstance(plain.activation, nn.Identity)
    with pytest.raises(ValueError, match=r"activation.*'relu'"):
        GSPNBlock(8, activation="relu")


def test_grn_starts_as_identity_and_survives_a_channel_of_zeros():
    x = torch.randn(2, 5, 6, 8)
    grn = GlobalResponseNorm(8)
    torch.testing.assert_close(grn(x), x)
    nn.init.ones_(grn.gamma)
    x[..., 3] = 0
    x.requires_grad_()
    grn(x).sum().backward()
    assert x.grad.isfinite().all() and (grn(x)[..., 3] == 0).all()


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    drop = DropPath(0.25)
    x = torch.ones(4000, 2, 3)
    y = drop(x)
    torch.testing.assert_close(y.unique(), torch.tensor([0.0, 4 / 3]))
    assert (y.amax((1, 2)) == y.amin((1, 2))).all()
    assert abs(y.mean().item() - 1) < 0.05
    assert torch.equal(drop.eval()(x), x)


@pytest.mark.parametrize("segment", [None, 3])
def test_average_divides_each_direction_by_its_lines(segment):
    torch.manual_seed(0)
    options = dict(segment=segment, skip=False, backend="reference")
    x = torch.randn(2, 6, 4, 7)
    for directions, lines in ((("right", "left"), 7), (("down", "up"), 4)):
        plain = gspn.GSPN2d(6, directions=directions, **options)
        averaged = gspn.GSPN2d(6, directions=directions, average=True, **options)
        averaged.load_state_dict(plain.state_dict())
        torch.testing.assert_close(averaged(x) * min(lines, segment or lines), plain(x))
        merged, whole = (layer.context(x, 1, 2).merged for layer in (averaged, plain))
        torch.testing.assert_close(merged * min(lines, segment or lines), whole)
        assert merged.shape == (2, 4, 7) and (merged > 0).any()
        assert averaged.extra_repr() == f"{plain.extra_repr()}, average"


@pytest.mark.parametrize("option", ["skip", "average", "center"])
def test_switches_are_true_or_false(option):
    with pytest.raises(TypeError, match=f"{option}.*'False'"):
        gspn.GSPN2d(6, **{option: "False"})


@pytest.mark.parametrize("option", ["average", "center"])
def test_the_released_form_has_no_such_part(option):
    with pytest.raises(ValueError, match=f"{option}.*aligned"):
        gspn.GSPN2d(6, alignment="released", **{option: True})


@pytest.mark.parametrize("option", ["average", "center"])
def test_a_constant_map_gives_no_more_at_larger_sizes(option):
    torch.manual_seed(0)
    layer = gspn.GSPN2d(6, skip=False, backend="reference", **{option: True})
    pixel = torch.randn(1, 6, 1, 1)
    small, large = (layer(pixel.expand(1, 6, n, n)).mean((2, 3)) for n in (8, 64))
    torch.testing.assert_close(large, small, rtol=0.15, atol=0)
    plain = gspn.GSPN2d(6, skip=False, backend="reference")
    small, large = (plain(pixel.expand(1, 6, n, n)).mean((2, 3)).abs() for n in (8, 64))
    assert (large > 5 * small).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_centered_16_bit_data_keep_their_accuracy_on_long_maps(dtype):
    """The scan's sum is large beside what is left of it, so it is taken in float32."""
    layer = gspn.GSPN2d(8, center=True).to(dtype)
    x = (torch.randn(1, 8, 2, 500) + 1).to(dtype)
    exact = copy.deepcopy(layer).double()(x.double())
    # proxy and output are rounded to 16 bits, the state is not
    error = (layer(x).double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < 4 * torch.finfo(dtype).eps


def test_centered_in_autocast():
    layer = gspn.GSPN2d(8, center=True)
    x = torch.randn(2, 8, 5, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        y.sum().backward()
    assert y.dtype == torch.float32 and all(p.grad.isfinite().all() for p in layer.parameters())
    torch.testing.assert_close(y, layer(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("options", [{}, {"average": True}, {"center": True}, {"alignment": "released"}])
def test_16_bit_data_of_another_dtype_than_autocast_s(options, backend):
    layer = gspn.GSPN2d(8, backend=backend, **options).half()
    x = torch.randn(1, 8, 5, 5).half()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == x.dtype
    torch.testing.assert_close(y, layer(x), rtol=0.05, atol=0.05)


def test_context_is_exact_in_autocast_and_float64():
    layer, x = gspn.GSPN2d(8, center=True, average=True), torch.randn(2, 8, 5, 6)
    outside = layer.context(x, 2, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = layer.context(x, 2, 3)
        layer.context(x.bfloat16(), 2, 3)
    exact = copy.deepcopy(layer).double().context(x.double(), 2, 3)
    for got, want, double in zip(inside, outside, exact, strict=True):
        assert got.dtype == torch.float32 and torch.equal(got, want)
        assert double.dtype == torch.float64 and not torch.equal(double, want.double())
