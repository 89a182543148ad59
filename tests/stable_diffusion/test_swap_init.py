"""The start of swapped layers: closed form, feature maps, layer-wise fit."""

import pytest
import torch
from torch import nn

diffusers = pytest.importorskip("diffusers")
from diffusers.models.attention_processor import Attention  # noqa: E402

from gspn.stable_diffusion import fit, fitting, rank  # noqa: E402
from gspn.stable_diffusion import init as swap_init  # noqa: E402
from gspn.stable_diffusion.feature_maps import FeatureMaps, collect, relative_error  # noqa: E402
from gspn.stable_diffusion.init import initialize, stream_statistics  # noqa: E402
from gspn.stable_diffusion.swap import GSPNAttention, swap  # noqa: E402

C, HEADS = 32, 4


def make_attention(seed=0, bias=False):
    torch.manual_seed(seed)
    return Attention(C, heads=HEADS, dim_head=C // HEADS, bias=bias).eval().requires_grad_(False)


def make_unet(seed=0):
    torch.manual_seed(seed)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(C, 2 * C),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=8,
    ).eval()


def runner(unet, batch=2, sizes=((8, 8),)):
    generator = torch.Generator().manual_seed(1)
    calls = []

    def run():
        height, width = sizes[len(calls) % len(sizes)]
        calls.append((height, width))
        with torch.no_grad():
            unet(
                torch.randn(batch, 4, height, width, generator=generator),
                torch.randint(0, 1000, (batch,), generator=generator),
                torch.randn(batch, 5, 16, generator=generator),
            )

    return run


@pytest.mark.parametrize("segment", [None, 3, 4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [(6, 6), (4, 9)])
def test_qkv_averages_as_attention_does_with_equal_scores(segment, bias, size, monkeypatch):
    monkeypatch.setattr(swap_init, "SLIGHT", 0.0)
    attention = make_attention(bias=bias)
    layer = GSPNAttention(C, form="qkv", segment=segment, qkv_bias=bias, backend="reference")
    initialize(layer, attention, None, size)
    # Of a constant map attention gives W_out W_v x everywhere; the scan gives it on the average over the places, as
    # more lines lead to some places than to others.
    x = torch.randn(2, 1, C).expand(2, size[0] * size[1], C)
    expected = attention(x).mean(1)
    torch.testing.assert_close(layer(x, map_size=size).mean(1), expected, rtol=1e-4, atol=1e-5)
    assert expected.abs().max() > 0.01


@pytest.mark.parametrize("segment", [None, 4])
def test_pure_finds_a_constant_gate_in_what_the_norm_adds(segment, monkeypatch):
    monkeypatch.setattr(swap_init, "SLIGHT", 0.0)
    attention, norm = make_attention(), nn.LayerNorm(C)
    with torch.no_grad():
        norm.weight.fill_(0.02)
        norm.bias.copy_(torch.randn(C))
    layer = GSPNAttention(C, form="pure", segment=segment, backend="reference")
    initialize(layer, attention, norm, (6, 6))
    x = norm(torch.randn(3, 36, C)).detach()
    expected = attention(x).mean(1)
    torch.testing.assert_close(layer(x, map_size=(6, 6)).mean(1), expected, rtol=0.05, atol=0.01)
    # without a constant direction nothing is made up
    layer = GSPNAttention(C, form="pure", segment=segment, backend="reference")
    initialize(layer, attention, None, (6, 6))
    x = torch.randn(3, 36, C)
    bias = attention.to_out[0].bias
    assert (layer(x, map_size=(6, 6)) - bias).abs().mean() < 0.1 * (attention(x) - bias).abs().mean()


@pytest.mark.parametrize("segment", [None, 4])
@pytest.mark.parametrize("form", ["pure", "qkv"])
def test_what_the_gates_read_of_q_and_k_nearly_cancels(form, segment, monkeypatch):
    attention, norm = make_attention(), nn.LayerNorm(C)
    with torch.no_grad():
        norm.weight.fill_(0.5)
        norm.bias.copy_(3 * torch.randn(C))
    x, outputs = norm(torch.randn(4, 144, C)).detach(), {}
    for slight in (swap_init.SLIGHT, 0.0):
        monkeypatch.setattr(swap_init, "SLIGHT", slight)
        layer = GSPNAttention(C, form=form, segment=segment, backend="reference")
        initialize(layer, attention, norm, (12, 12))
        outputs[slight] = layer(x, map_size=(12, 12)).detach()
    plain = outputs.pop(0.0) - attention.to_out[0].bias
    (slight,) = outputs.values()
    assert 0 < (slight - attention.to_out[0].bias - plain).norm() < 0.1 * plain.norm()


def test_pure_finds_a_constant_gate_in_what_the_transformer_adds():
    unet = make_unet()
    transformer = unet.down_blocks[0].attentions[0]
    block = transformer.transformer_blocks[0]
    with torch.no_grad():
        transformer.norm.weight.normal_()
        transformer.norm.bias.normal_()
        block.norm1.weight.uniform_(-1.5, 1.5)
    x = torch.randn(64, C, 16, 16)
    tokens = transformer.proj_in(transformer.norm(x)).flatten(2).mT.detach()
    mean, covariance = stream_statistics(transformer)
    torch.testing.assert_close(mean, tokens.mean((0, 1)), rtol=0.02, atol=0.02)
    torch.testing.assert_close(covariance, tokens.flatten(0, 1).T.cov(), rtol=0.05, atol=0.03)
    # the proxy's first place is nearly 1 everywhere, which the norm alone does not give
    x, gates = block.norm1(tokens).detach(), {}
    for name, before in {"norm": None, "transformer": (mean, covariance)}.items():
        layer = GSPNAttention(C, form="pure", backend="reference")
        initialize(layer, block.attn1, block.norm1, (16, 16), before)
        gates[name] = x @ layer.gspn.proxy_proj.weight[0, :, 0, 0].detach()
    assert (gates["transformer"] - 1).square().mean() < 0.1
    assert (gates["norm"] - 1).square().mean() > 0.3


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_initialised_layers_learn_in_every_parameter(shift):
    attention = make_attention()
    for form in ("pure", "qkv"):
        layer = GSPNAttention(C, form=form, backend="reference")
        norm = nn.LayerNorm(C)
        with torch.no_grad():
            norm.bias.normal_(std=shift)
        initialize(layer, attention, norm, (5, 5))
        optimizer = torch.optim.AdamW(layer.parameters(), 1e-3)
        before = {name: p.detach().clone() for name, p in layer.named_parameters()}
        for _ in range(2):  # behind a projection of zeros, gradients come with the second step
            optimizer.zero_grad()
            layer(norm(torch.randn(2, 25, C)), map_size=(5, 5)).square().mean().backward()
            optimizer.step()
        still = [name for name, p in layer.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
        assert not still, (form, still)
        assert all(not torch.equal(before[name], p) for name, p in layer.named_parameters())


def test_collected_maps_are_what_attention_saw():
    unet = make_unet()
    with swap(unet, init="random", backend="reference") as swapped:
        seen = {name: [] for name in swapped.layers}
        for name, attention in swapped.attentions.items():
            attention.register_forward_pre_hook(
                lambda m, args, kwargs, name=name: seen[name].append((args or (kwargs["hidden_states"],))[0].clone()),
                with_kwargs=True,
            )
        maps = collect(swapped, runner(unet, sizes=((8, 8), (6, 10))), 4)
        assert swapped.active == "gspn"
        for name, of_layer in maps.items():
            assert len(of_layer) == 4
            assert of_layer.sizes == ([(4, 4), (3, 5)] if "mid" in name else [(8, 8), (6, 10)]), name
            assert all(torch.equal(a, b) for a, b in zip(of_layer.tokens, seen[name], strict=True))
        shapes = collect(swapped, runner(unet, sizes=((8, 8), (6, 10))), 4, device="meta")
        for name, of_layer in shapes.items():
            assert all(t.is_meta for t in of_layer.tokens) and of_layer.sizes == maps[name].sizes
            assert [t.shape for t in of_layer.tokens] == [t.shape for t in maps[name].tokens]
        with pytest.raises(ValueError, match="did not run"):
            collect(swapped, lambda: None, 1)
        assert not any(a._forward_pre_hooks for n, a in swapped.attentions.items() if len(a._forward_pre_hooks) > 1)


@pytest.mark.parametrize("form", [pytest.param("pure", marks=pytest.mark.slow), "qkv"])
def test_fit_comes_nearer_to_the_attention(form):
    unet = make_unet()
    swapped = swap(unet, form=form, init="pretrained", backend="reference")
    run = runner(unet, sizes=((8, 8), (6, 10)))
    told = []
    errors = fit(swapped, run, maps=16, steps=20, batch_size=4, progress=lambda *line: told.append(line))
    assert list(errors) == list(swapped.layers) == [line[0] for line in told]
    for name, (before, after) in errors.items():
        assert after < 0.9 * before, name
    fresh = collect(swapped, runner(unet, sizes=((8, 8),)), 4)
    for name, layer in swapped.layers.items():
        assert relative_error(layer, swapped.attentions[name], fresh[name]) < 1.1 * max(errors[name])
        assert all(p.grad is None for p in layer.parameters())


def test_fit_keeps_no_more_maps_than_memory_allows(monkeypatch):
    unet = make_unet()
    swapped = swap(unet, backend="reference")
    names, groups = list(swapped.layers), []

    def collected(swap, run, count, names=None, device="cpu"):
        if device != "meta":
            groups.append(list(names))
        return collect(swap, run, count, names, device)

    monkeypatch.setattr(fitting, "collect", collected)
    maps = collect(swapped, runner(unet), 3)  # a run gives 2, so there are 4
    each = {name: 4 * sum(t.numel() for t in maps[name].tokens) / 2**20 for name in names}
    whole = sum(each.values()) + max(each.values())  # the attention's output on one layer's maps beside the maps of all
    for memory, expected in (
        (0, [[name] for name in names]),
        (whole, [names]),
        (whole - 1e-4, [names[:-1], names[-1:]]),
    ):
        groups.clear()
        fit(swapped, runner(unet), maps=3, steps=1, memory_mib=memory)
        assert groups == expected, memory


def test_fit_keeps_the_dtype_and_never_makes_a_layer_worse():
    unet = make_unet().bfloat16()
    swapped = swap(unet, form="qkv", backend="reference")

    def run():
        with torch.no_grad():
            unet(*(torch.randn(2, 4, 8, 8).bfloat16(), 5, torch.randn(2, 5, 16).bfloat16()))

    with torch.no_grad():
        errors = fit(swapped, run, maps=4, steps=2, lr=1e6)  # a rate that ruins what it touches
    assert all(after <= before for before, after in errors.values())
    fresh = collect(swapped, run, 4)
    for name, (before, _) in errors.items():  # the weights left behind, not only what is told of them
        assert relative_error(swapped.layers[name], swapped.attentions[name], fresh[name]) < 1.2 * before, name
    assert all(
        p.dtype == torch.bfloat16 and p.isfinite().all() for p in swapped.layers[next(iter(errors))].parameters()
    )


def test_fit_inside_autocast_fits_and_is_seen_there():
    """Autocast keeps its casts of weights until its end: neither the fit nor what follows may go by the old ones."""
    unet = make_unet()
    swapped = swap(unet, form="qkv", backend="reference")
    maps = collect(swapped, runner(unet), 4)

    def told():
        return {name: relative_error(layer, swapped.attentions[name], maps[name]) for name, layer in layers.items()}

    layers = swapped.layers
    with torch.autocast("cpu", torch.bfloat16):
        for name, layer in layers.items():
            layer(maps[name].tokens[0], map_size=maps[name].sizes[0])  # with gradients: its weights' casts are kept
        errors = fit(swapped, runner(unet), maps=16, steps=20, batch_size=4)
        inside = told()
    assert inside == pytest.approx(told(), rel=0.05)
    assert all(after < 0.9 * before for before, after in errors.values())


def test_a_fit_that_is_stopped_leaves_the_best_weights(monkeypatch):
    unet = make_unet().bfloat16()
    swapped = swap(unet, form="qkv", backend="reference")
    name, layer = next(iter(swapped.layers.items()))
    layer.requires_grad_(False).to_q.requires_grad_(True)

    def run():
        unet(torch.randn(2, 4, 8, 8).bfloat16(), 5, torch.randn(2, 5, 16).bfloat16())

    def stopped_at(target):
        def stop(*_):
            with torch.no_grad():
                layer.to_out[0].weight.fill_(9.0)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(fitting, target, stop)
            fit(swapped, run, maps=4, steps=3)
        assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
        assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["to_q.weight"]

    before = {key: value.clone() for key, value in layer.state_dict().items()}
    stopped_at("relative_error")
    stopped_at("_solve_out")
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())
    fresh = collect(swapped, run, 4)[name]
    error = relative_error(layer, swapped.attentions[name], fresh)
    stopped_at("_power")  # in AdamW, after the least squares
    assert relative_error(layer, swapped.attentions[name], fresh) < 0.9 * error


def test_what_cannot_be_fitted_is_told_at_once():
    swapped = swap(make_unet())
    for arguments, message in (
        ({"maps": 1}, "maps has to be at least 2, got 1"),
        ({"steps": -1}, "steps has to be at least 0, got -1"),
        ({"batch_size": 0}, "batch_size has to be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(swapped, pytest.fail, **arguments)
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        fit(swapped, pytest.fail)
    for name in ("maps", "steps", "batch_size"):
        with pytest.raises(TypeError, match=f"{name} has to be a whole number, got 2.5"):
            fit(swapped, pytest.fail, **{name: 2.5})
    for call in (fit, rank):
        with pytest.raises(TypeError, match=r"expected a Swap.*got a UNet2DConditionModel"):
            call(swapped.unet, pytest.fail)
        with pytest.raises(TypeError, match=r"run has to be a function that runs the UNet, got 5"):
            call(swapped, 5)


@pytest.mark.parametrize("part", ["attention", "layer"])
def test_what_overflows_is_told_and_its_layer_stays(part):
    unet = make_unet()
    swapped = swap(unet, form="qkv", backend="reference")
    name = list(swapped.layers)[1]
    with torch.no_grad():
        broken = swapped.attentions[name].to_v if part == "attention" else swapped.layers[name].to_out[0]
        broken.weight.fill_(float("inf"))
    before = {key: value.clone() for key, value in swapped.layers[name].state_dict().items()}
    with pytest.raises(ValueError, match=rf"the output of the {part} (for )?{name} is not finite on .*of the UNet$"):
        fit(swapped, runner(unet), maps=4, steps=2)
    assert all(torch.equal(before[key], value) for key, value in swapped.layers[name].state_dict().items())


def test_held_out_maps_are_of_all_calls_with_both_halves_of_guidance():
    calls = [torch.tensor([2.0 * i, 2 * i + 1]).view(2, 1, 1).expand(2, 9, C) for i in range(40)]
    parts = FeatureMaps(calls, [(3, 3)] * 40).split(1 / 8)
    training, held = ([t[0, 0, 0].item() for t in part.tokens] for part in parts)
    assert sorted(training + held) == list(range(80)) and len(training) == 70 and len(parts[1].sizes) == 10
    assert all(b == a + 1 for a, b in zip(held[::2], held[1::2], strict=True))  # both halves of a call in one part
    assert min(held) < 40 <= max(held)  # not the last calls alone, which are those of little noise
    for sizes, wanted in (([3], (2, 1)), ([2], (1, 1)), ([255, 1], (224, 32)), ([32, 32], (56, 8)), ([1, 1], (1, 1))):
        parts = FeatureMaps([torch.randn(n, 9, C) for n in sizes], [(3, 3)] * len(sizes)).split(1 / 8)
        assert tuple(map(len, parts)) == wanted, sizes


def test_relative_error_is_1_for_zero_and_0_for_the_same():
    attention = make_attention()
    maps = FeatureMaps([torch.randn(2, 9, C)], [(3, 3)])

    class Zero(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(factor))

        def forward(self, x, map_size):
            return self.factor * attention(x)

    assert relative_error(Zero(0.0), attention, maps) == pytest.approx(1)
    assert relative_error(Zero(1.0), attention, maps) == pytest.approx(0, abs=1e-6)
    assert relative_error(Zero(-0.5), attention, maps) == pytest.approx(1.5)
    with pytest.raises(ValueError, match="at least two"):
        FeatureMaps([torch.randn(1, 9, C)], [(3, 3)]).split(0.1)


def test_the_shared_directions_do_not_depend_on_the_signs_of_eigenvectors(monkeypatch):
    """The gates read the directions with one sign, so a layer would else start in another way with another LAPACK."""
    q, k, scale = torch.randn(12, 12), torch.randn(12, 12), torch.ones(12)
    directions = swap_init._shared_directions(q, k, scale, 3, 5)
    eigh = torch.linalg.eigh

    def other_signs(matrix):
        values, vectors = eigh(matrix)
        return torch.return_types.linalg_eigh((values, vectors * torch.tensor([1.0, -1, -1, 1])))

    monkeypatch.setattr(torch.linalg, "eigh", other_signs)
    torch.testing.assert_close(swap_init._shared_directions(q, k, scale, 3, 5), directions)


@pytest.mark.parametrize("form", ["pure", "qkv"])
def test_the_default_dtype_changes_nothing(sd, form):
    def states():
        with swap(sd, form=form) as swapped:
            return [{name: p.clone() for name, p in layer.state_dict().items()} for layer in swapped.layers.values()]

    wanted = states()
    try:
        torch.set_default_dtype(torch.float64)
        changed = states()
    finally:
        torch.set_default_dtype(torch.float32)
    for got, want in zip(changed, wanted, strict=True):
        for name, tensor in want.items():
            assert torch.equal(got[name], tensor) or name == "weight_proxy.weight", name  # random, and read by nothing
