"""Muon: which parameters it moves, and how."""

import copy

import pytest
import torch
from torch import nn

import gspn
from gspn.options import LoopOptions, OptionError
from gspn.stable_diffusion.layer import GSPNAttention
from gspn.train.muon import as_matrices, matrices_of, orthogonalised
from gspn.train.optim import make_optimizer

MODELS = {
    "classifier": lambda: gspn.create_model("gspn_micro", depths=[1, 1], global_levels=[0], num_classes=3),
    "mobile": lambda: gspn.create_model("gspn_mobile", depths=[1, 1], global_levels=[0], num_classes=3),
    "segmenter": lambda: gspn.create_segmenter("gspn_mobile", num_classes=3),
    "GSPN": lambda: gspn.create_generator("GSPN-micro/2", num_classes=3, sample_size=8, in_channels=3),
    "compact": lambda: gspn.GSPN2d(16, groups=1, scan_dim=8),
    "pure": lambda: GSPNAttention(64, form="pure"),
    "qkv": lambda: GSPNAttention(64, form="qkv"),
    "GSPN-DiT": lambda: gspn.create_generator("GSPN-DiT-micro/2", num_classes=3, sample_size=8, in_channels=3),
}


@pytest.mark.parametrize("shape", [(8, 8), (40, 8), (3, 8, 40), (2, 1, 5)])
def test_singular_values_become_about_one(shape):
    matrices = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrices.double(), full_matrices=False)
    found = orthogonalised(matrices)
    within = u.mT @ found.double() @ v.mT  # diagonal, if the singular vectors are the same
    values = within.diagonal(dim1=-2, dim2=-1)
    assert found.dtype == torch.float32 and found.shape == matrices.shape
    assert (within - torch.diag_embed(values)).abs().max() < 1e-4
    assert values[..., :-1].numel() == 0 or 0.6 < values[..., :-1].min()
    assert values.max() < 1.25


@pytest.mark.parametrize("seed", range(5))
def test_coarse_products_do_no_harm(monkeypatch, seed):
    """Of a matrix that is nearly of low rank, as momentum is: with the products of TF32, and inside autocast."""
    source = torch.Generator().manual_seed(seed)
    low = torch.randn(16, 2, generator=source) @ torch.randn(2, 64, generator=source)
    matrix = low + 1e-3 * torch.randn(16, 64, generator=source)
    with torch.autocast("cpu", torch.bfloat16):
        inside = orthogonalised(matrix)
    assert torch.equal(inside, orthogonalised(matrix))
    product = torch.Tensor.__matmul__
    cut = lambda x: ((x.view(torch.int32) >> 13) << 13).view(torch.float32)  # noqa: E731  10 bits of the fraction
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: product(cut(a), cut(b)))
    found = orthogonalised(matrix)
    monkeypatch.undo()
    assert torch.linalg.matrix_norm(found, 2) < 1.25


def test_zeros_stay_zeros():
    assert not orthogonalised(torch.zeros(4, 3)).any()


@pytest.mark.parametrize("name", MODELS)
def test_what_moves_as_a_matrix(name):
    model = MODELS[name]()
    found = matrices_of(model)
    names = {parameter: path for path, parameter in model.named_parameters()}
    assert set(found) <= set(names)
    layers = [module for module in model.modules() if hasattr(module, "weight_proj")]
    assert layers
    for layer in layers:  # one matrix for each direction, and for the weights all three neighbours in it
        directions, neighbours, groups, features = layer.weight_proj.shape
        weights, gates = (as_matrices(each, found[each]) for each in (layer.weight_proj, layer.input_proj))
        assert weights.shape == (directions, neighbours * groups, features) == (4, 3 * groups, features)
        assert gates.shape == layer.input_proj.shape
    for parameter, kind in found.items():
        shape = as_matrices(parameter, kind).shape
        assert len(shape) == 2 + (kind == "each") and shape.numel() == parameter.numel(), names[parameter]
    left = {path for parameter, path in names.items() if parameter not in found and parameter.ndim > 1}
    ends = {"stem", "patch_embed", "head", "classifier", "proj_out", "embedding_table", "dwconv"}
    ends |= {"weight_bias", "input_bias", "output_bias", "skip_bias"}
    assert all(ends & set(path.split(".")) for path in left), left


def test_a_step_is_the_formula():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 4, 1), nn.Flatten(), nn.Linear(4, 3))
    twin = nn.Sequential(nn.Conv2d(6, 4, 1), nn.Flatten(), nn.Linear(4, 3))
    twin.load_state_dict(model.state_dict())
    options = LoopOptions(lr=0.1, weight_decay=0.5, optimizer="muon").resolved()
    optimizer, other = make_optimizer(model, options), make_optimizer(twin, LoopOptions(lr=0.1).resolved())
    momentum, expected = 0.0, model[0].weight.detach().clone()
    for _ in range(3):
        gradients = [torch.randn_like(p) for p in model.parameters()]
        for each in (model, twin):
            for p, gradient in zip(each.parameters(), gradients, strict=True):
                p.grad = gradient.clone()
        optimizer.step()
        other.step()
        momentum = 0.95 * momentum + gradients[0]
        update = orthogonalised((gradients[0] + 0.95 * momentum).flatten(1)).reshape(4, 6, 1, 1)
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * 0.2 * 6**0.5 * update
        assert torch.allclose(model[0].weight, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(model[0].bias, twin[0].bias)  # AdamW's, without decay


def test_its_state_is_kept_and_copied():
    def stepped(model, optimizer):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        return {name: value.clone() for name, value in model.state_dict().items()}

    options = LoopOptions(lr=0.1, optimizer="muon").resolved()
    model = nn.Sequential(nn.Linear(3, 4), gspn.GSPN2d(4))
    optimizer = make_optimizer(model, options)
    before = stepped(model, optimizer)
    twin, copied = copy.deepcopy((model, optimizer))
    loaded = make_optimizer(model, options)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    found = [stepped(model, optimizer), stepped(twin, copied)]
    model.load_state_dict(before)
    found.append(stepped(model, loaded))
    assert all(torch.equal(found[0][name], each[name]) for each in found[1:] for name in before)


def test_it_does_not_shard():
    with pytest.raises(OptionError, match="muon needs whole matrices"):
        LoopOptions(lr=0.1, optimizer="muon", fsdp=True).resolved()
