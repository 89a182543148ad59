"""What GSPN is compared with computes what it is called."""

import pytest
import torch
import torch.nn.functional as F

from gspn.bench import contenders
from gspn.bench.contenders import CONTENDERS, OnMaps, on_maps

X = (2, 3, 5, 8)  # B, H, W, C


def written_out(module, phi, heads, eps=0.0):
    """Attention with the matrix of all pairs; phi None is the softmax."""
    x = torch.randn(X, dtype=torch.float64)
    q, k, v = module.qkv(x).flatten(1, 2).unflatten(-1, (3, heads, 8 // heads)).permute(2, 0, 3, 1, 4)
    pairs = (q @ k.mT / (8 // heads) ** 0.5).softmax(-1) if phi is None else phi(q) @ phi(k).mT
    mixed = (pairs @ v) / (pairs.sum(-1, keepdim=True) + eps)
    local = module.local(v.transpose(1, 2).reshape(X))
    return x, module.out(mixed.transpose(1, 2).reshape(X) + (0 if local is None else local))


@pytest.mark.parametrize(
    ("kind", "phi", "eps"),
    [
        (contenders.Attention, None, 0.0),
        (contenders.LinearAttention, lambda t: F.elu(t) + 1, 0.0),
        (contenders.ReluLinearAttention, F.relu, 1e-6),
        (contenders.ReluLinearAttentionConvolution, F.relu, 1e-6),
    ],
)
def test_attention_is_a_weighted_mean_of_all_values(kind, phi, eps):
    module = kind(8).double()
    heads = 2 if phi is F.relu else 1
    assert module.heads == heads
    x, expected = written_out(module, phi, heads, eps)
    torch.testing.assert_close(module(x), expected)


def test_convolutions_stand_between_the_projections():
    x = torch.randn(X)
    module = contenders.Depthwise(8)
    into = module.into(x).permute(0, 3, 1, 2)
    expected = F.conv2d(into, module.convolution.weight, module.convolution.bias, padding=3, groups=8)
    torch.testing.assert_close(module(x), module.out(expected.permute(0, 2, 3, 1)))
    module = contenders.GatedConvolution(8)
    gate, value = module.into(x).chunk(2, -1)
    torch.testing.assert_close(module(x), module.out(F.gelu(gate) * on_maps(module.convolution, value)))


@pytest.mark.parametrize("name", CONTENDERS)
def test_every_contender_is_a_layer_without_a_fixed_size_whose_parameters_all_learn(name):
    layer = CONTENDERS[name].make(64)
    for size in ((4, 7), (1, 1)):
        x = torch.randn(2, 64, *size).to(memory_format=torch.channels_last).requires_grad_()
        y = layer(x)
        assert y.shape == x.shape and y.is_contiguous(memory_format=torch.channels_last)
    layer(torch.randn(2, 64, 4, 7)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


def test_only_depthwise_convolutions_have_a_bias():
    layers = {name: contender.make(64) for name, contender in CONTENDERS.items()}
    found = {(name, each) for name, layer in layers.items() for each, _ in layer.named_parameters() if "bias" in each}
    expected = ("relu attention + 5x5", "depthwise 7x7", "gated convolution")
    assert found == {(name, "module.convolution.bias") for name in expected}


def test_maps_are_not_copied():
    x = torch.randn(2, 6, 3, 5).to(memory_format=torch.channels_last)
    assert OnMaps(torch.nn.Identity())(x).data_ptr() == x.data_ptr()


def test_heads_divide_the_width():
    assert [contenders.heads_of(c) for c in (8, 64, 144, 320, 640, 130)] == [1, 1, 2, 5, 10, 2]
