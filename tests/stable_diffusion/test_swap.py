"""gspn.swap: what it replaces, that restore undoes it bit for bit, the layer, gradients, copies, the file."""

import copy
import json
import pickle

import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers.stable_diffusion import tiny_sd
from helpers.swapping import FORMS, KINDS, assert_same_state, inputs, run, state_of, unet_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import gspn
from gspn.layers import GSPN2d
from gspn.stable_diffusion.swap import _native_size

# -- what is replaced, and back --


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_self_attention_is_replaced_and_comes_back_bit_for_bit(kind, form):
    unet = unet_of(kind)
    before, output = state_of(unet), run(unet)
    attn1 = {name: m for name, m in unet.named_modules() if name.endswith("attn1")}
    attn2 = {name: m for name, m in unet.named_modules() if name.endswith("attn2")}
    numbered = list(unet.attn_processors)
    swapped = gspn.swap(unet, form=form)
    assert list(swapped.layers) == list(attn1) == list(swapped.attentions) and len(attn1) >= 4
    for name, layer in swapped.layers.items():
        assert unet.get_submodule(name) is layer and isinstance(layer, gspn.GSPNAttention)
        assert layer.form == form and layer.segment is None and not layer.training
        assert layer.proxy_dim == max(1, layer.channels // (8 if form == "pure" else 32))
        assert all(p.requires_grad and p.dtype == torch.float32 for p in layer.parameters())
    assert all(unet.get_submodule(name) is module for name, module in attn2.items())
    assert list(unet.attn_processors) == numbered  # diffusers numbers attentions by their processors
    new = run(unet)
    assert new.isfinite().all() and (new - output).abs().mean() > 1e-3
    gspn.restore(unet)
    assert swapped.active is None
    assert_same_state(unet, before)
    assert torch.equal(run(unet), output)


def test_the_start_is_chosen_and_pretrained_is_the_default():
    torch.manual_seed(1)
    first = gspn.swap(unet_of(), form="qkv")
    torch.manual_seed(2)
    second = gspn.swap(unet_of(), form="qkv", init="pretrained", segment=3)
    drawn = gspn.swap(unet_of(), form="qkv", init="random")
    for name, layer in first.layers.items():
        out = first.attentions[name].to_out[0].weight
        assert torch.equal(layer.to_out[0].weight, out) and not torch.equal(drawn.layers[name].to_out[0].weight, out)
        assert torch.equal(layer.to_q.weight, second.layers[name].to_q.weight)
        assert second.layers[name].segment == 3
    assert "segment=3" in repr(second) and second.segment == 3


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_layers_get_the_height_and_width_of_their_map(kind):
    unet = unet_of(kind)
    swapped = gspn.swap(unet, form="pure", init="random")
    seen = {}
    for name, layer in swapped.layers.items():
        layer.register_forward_pre_hook(
            lambda m, args, kwargs, name=name: seen.__setitem__(name, kwargs["map_size"]), with_kwargs=True
        )
    for size in ((8, 8), (4, 16), (16, 4), (7, 9), (1, 10)):
        assert run(unet, *size).shape[-2:] == size
        halved = tuple(-(-n // 2) for n in size)
        levels = {"down_blocks.0": size, "down_blocks.1": halved, "mid_block": halved}
        levels |= {"up_blocks.0": halved, "up_blocks.1": size}
        assert seen == {name: next(v for k, v in levels.items() if name.startswith(k)) for name in swapped.layers}
        if size == (8, 8):
            assert unet.config.sample_size == 8
            assert seen == {name: _native_size(unet, name) for name in swapped.layers}


def test_both_halves_of_guidance_in_one_batch():
    unet = unet_of()
    gspn.swap(unet, form="qkv", init="random")
    whole = inputs(unet, 6, 10)
    halves = [{k: v if v.ndim == 0 else v[i : i + 1] for k, v in whole.items()} for i in range(2)]
    with torch.no_grad():
        apart = torch.cat([unet(**half).sample for half in halves])
        torch.testing.assert_close(unet(**whole).sample, apart, atol=1e-5, rtol=1e-5)


# -- the layer --


def test_the_pure_form_is_the_unit_and_to_out():
    layer = gspn.GSPNAttention(16, form="pure", segment=2).double()
    x = torch.randn(2, 16, 3, 5, dtype=torch.float64)
    assert isinstance(layer.gspn, GSPN2d) and (layer.gspn.proxy_dim, layer.gspn.segment) == (2, 2)
    expected = layer.to_out[0](layer.gspn(x).flatten(2).mT)
    torch.testing.assert_close(layer(x.flatten(2).mT, map_size=(3, 5)), expected)


@pytest.mark.parametrize("gate_bias", [True, False])
def test_the_qkv_form_is_its_formula(gate_bias):
    torch.manual_seed(3)
    layer = gspn.GSPNAttention(12, form="qkv", proxy_dim=2, segment=4, gate_bias=gate_bias, qkv_bias=True).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    tokens, size = torch.randn(2, 15, 12, dtype=torch.float64), (3, 5)

    def project(name, of):
        gates = torch.einsum("...s,bns->b...n", getattr(layer, f"{name}_proj"), of)
        gates = gates + getattr(layer, f"{name}_bias")[..., None] if gate_bias else gates
        return gates.unflatten(-1, size)

    v = (tokens + layer.to_v(tokens)).mT.unflatten(-1, size)
    own = layer.weight_proxy(tokens)
    logits = project("weight", own).transpose(2, 3)
    of_k, of_q = layer.input_proxy(tokens + layer.to_k(tokens)), layer.output_proxy(tokens + layer.to_q(tokens))
    h = gspn.gated_scan(v, project("input", of_k), logits, segment=4, backend="reference")
    lines = torch.tensor([4, 3, 4, 3]).view(4, 1, 1, 1)  # of a 3x5 map in segments of 4: right, down, left, up
    y = project("output", of_q) * h / lines + project("skip", own) * v[:, None]
    expected = layer.to_out[0]((layer.merger.view(-1, 1, 1, 1) * y).sum(1).flatten(2).mT)
    torch.testing.assert_close(layer(tokens, map_size=size), expected)
    assert (layer.skip_bias is None) != gate_bias


@pytest.mark.parametrize("form", FORMS)
def test_state_dicts_are_frozen(form):
    shapes = {k: tuple(v.shape) for k, v in gspn.GSPNAttention(64, form=form).state_dict().items()}
    out = {"to_out.0.weight": (64, 64), "to_out.0.bias": (64,)}
    if form == "pure":
        gates = {f"gspn.{name}_proj": (4, 64, 8) for name in ("input", "output", "skip")}
        unit = {"gspn.proxy_proj.weight": (8, 64, 1, 1), "gspn.weight_proj": (4, 3, 64, 8), "gspn.merger": (4,)}
        assert shapes == out | gates | unit
        return
    kept = {f"to_{name}.weight": (64, 64) for name in "qkv"}
    proxies = {f"{name}_proxy.weight": (2, 64) for name in ("weight", "input", "output")}
    gates = {f"{name}_proj": (4, 64, 2) for name in ("input", "output", "skip")} | {"weight_proj": (4, 3, 64, 2)}
    biases = {f"{name}_bias": (4, 64) for name in ("input", "output", "skip")} | {"weight_bias": (4, 3, 64)}
    assert shapes == out | kept | proxies | gates | biases | {"merger": (4,)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(), "map_size"),
        (dict(map_size=(4, 4)), "4x4.* 16 .* 15"),
        (dict(map_size=(3, 5), attention_mask=torch.ones(1, 1, 15)), "attention_mask"),
        (dict(map_size=(3, 5), encoder_hidden_states=torch.ones(1, 4, 8)), "encoder_hidden_states"),
        (dict(map_size=(3, 5), hidden_states=torch.ones(1, 15, 9)), r"\(B,N,8\).*\(1, 15, 9\)"),
    ],
)
def test_the_layer_refuses_what_it_cannot_do(arguments, message):
    with pytest.raises(ValueError, match=message):
        gspn.GSPNAttention(8)(**dict(hidden_states=torch.ones(1, 15, 8)) | arguments)


@pytest.mark.parametrize("form", FORMS)
def test_autocast_gives_its_dtype_as_attention_does(form):
    layer, x = gspn.GSPNAttention(8, form=form), torch.randn(1, 15, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, map_size=(3, 5))
        assert y.dtype == torch.bfloat16
        assert layer.double()(x.double(), map_size=(3, 5)).dtype == torch.float64
    torch.testing.assert_close(y.float(), layer.float()(x, map_size=(3, 5)), atol=0.05, rtol=0.05)


# -- gradient checkpointing --


def test_gradient_checkpointing_between_two_shapes_of_equal_size():
    """When a block runs again for the gradients, its map may not be the last one that the UNet has seen."""
    found = []
    for checkpointing in (False, True):
        unet = unet_of().train()
        torch.manual_seed(4)
        swapped = gspn.swap(unet, form="qkv", init="random")
        if checkpointing:
            unet.enable_gradient_checkpointing()
        outputs = [unet(**inputs(unet, *size)).sample for size in ((4, 16), (16, 4))]
        (outputs[0].square().mean() + 3 * outputs[1].square().mean()).backward()
        found.append([p.grad for layer in swapped.layers.values() for p in layer.parameters()])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again)
    assert all(grad.abs().sum() > 0 for grad in found[0][:3])


# -- use, context managers, copies, dtypes --


def test_the_unet_runs_either_and_says_which():
    unet = unet_of()
    before, output = state_of(unet), run(unet)
    with gspn.swap(unet, form="pure") as swapped:
        new = run(unet)
        with swapped.use("attention"):
            assert swapped.active == "attention" and torch.equal(run(unet), output)
            unet.save_pretrained  # noqa: B018
        assert swapped.active == "gspn" and torch.equal(run(unet), new)
        swapped.use("attention")
        swapped.use("attention")
        assert torch.equal(run(unet), output)
        with pytest.raises(ValueError, match="'both'"):
            swapped.use("both")
    assert_same_state(unet, before)
    with pytest.raises(ValueError, match="restored"):
        swapped.use("gspn")
    with pytest.raises(KeyError), gspn.swap(unet):
        raise KeyError
    assert_same_state(unet, before)


def test_copies_are_swapped_by_themselves():
    unet = unet_of()
    output = run(unet)
    swapped = gspn.swap(unet, form="qkv", init="random")
    new = run(unet)
    for other in (copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))):
        assert torch.equal(run(other), new)
        gspn.restore(other)
        assert torch.equal(run(other), output)
        assert not any(m._forward_pre_hooks or isinstance(m, gspn.GSPNAttention) for m in other.modules())
    assert swapped.active == "gspn" and torch.equal(run(unet), new)


def test_what_comes_back_has_followed_the_unet():
    unet = unet_of()
    swapped = gspn.swap(unet, form="qkv")
    expected = unet_of().to(torch.bfloat16).train()
    unet.to(torch.bfloat16).train()
    assert run(unet).dtype == torch.bfloat16
    gspn.restore(unet)
    assert all(m.training for m in unet.modules())
    assert torch.equal(run(unet), run(expected)) and run(unet).dtype == torch.bfloat16
    assert all(m.to_q.weight.dtype == torch.bfloat16 for m in swapped.attentions.values())


def test_layers_trained_in_float32_beside_a_bfloat16_unet_stay_so():
    unet = unet_of().to(torch.bfloat16)
    swapped = gspn.swap(unet, form="pure")
    assert {p.dtype for layer in swapped.layers.values() for p in layer.parameters()} == {torch.bfloat16}
    for layer in swapped.layers.values():
        layer.float()
    before = run_attention = None
    with swapped.use("attention"):
        run_attention = run(unet)
        before = {p.dtype for p in unet.parameters()}
    assert before == {torch.bfloat16} and run_attention.dtype == torch.bfloat16
    assert {p.dtype for layer in swapped.layers.values() for p in layer.parameters()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        assert run(unet).isfinite().all()


# -- the file --


@pytest.mark.parametrize("form", FORMS)
def test_saved_layers_give_the_same_images_elsewhere(tmp_path, form):
    unet = unet_of("sdxl")
    with gspn.swap(unet, form=form, segment=3, init="random") as swapped:
        new = run(unet)
        file = swapped.save(tmp_path / "run")
        named = swapped.save(tmp_path / "layers.safetensors")
    assert file == tmp_path / "run" / "gspn_swap.safetensors" and named.name == "layers.safetensors"
    assert {p.name for p in tmp_path.rglob("*")} == {"run", file.name, named.name}
    (tmp_path / "new").touch()
    assert file.stat().st_mode == (tmp_path / "new").stat().st_mode  # as any file here, not for its owner alone
    assert file.read_bytes() == named.read_bytes()
    with safe_open(file, "pt") as opened:
        config = json.loads(opened.metadata()["gspn_swap"])
    assert (config["form"], config["segment"], len(config["layers"])) == (form, 3, len(swapped.layers))
    assert not any(key.count("attn2") for key in load_file(file))
    for path in (tmp_path / "run", named):
        # a fine-tune at another size is the same base model
        other = unet_of("sdxl", sample_size=16)
        random = torch.random.get_rng_state()
        loaded = gspn.load_swap(other, path)
        assert torch.equal(random, torch.random.get_rng_state())
        assert torch.equal(run(other), new)
        assert all(p.requires_grad and not p.is_meta for m in loaded.layers.values() for p in m.parameters())
        gspn.restore(other)
    half = unet_of("sdxl").to(torch.bfloat16)
    assert {p.dtype for m in gspn.load_swap(half, file).layers.values() for p in m.parameters()} == {torch.bfloat16}


def test_another_width_of_the_proxies_is_kept_in_the_file(tmp_path):
    unet = unet_of()
    with gspn.swap(unet, form="qkv", proxy_dim=3) as swapped:
        assert {layer.proxy_dim for layer in swapped.layers.values()} == {3}
        new, file = run(unet), swapped.save(tmp_path)
    loaded = gspn.load_swap(unet, file)
    assert {layer.proxy_dim for layer in loaded.layers.values()} == {3} and torch.equal(run(unet), new)
    gspn.restore(unet)
    for wrong, error in ((0, ValueError), (1.5, TypeError), (True, TypeError)):
        before = state_of(unet)
        with pytest.raises(error, match=f"proxy_dim has to be .*got {wrong}"):
            gspn.swap(unet, proxy_dim=wrong)
        assert_same_state(unet, before)


def test_layers_made_in_inference_mode_can_be_trained(tmp_path):
    unet = unet_of().bfloat16()
    for make in (lambda: gspn.swap(unet, form="qkv"), lambda: gspn.load_swap(unet, tmp_path)):
        with torch.inference_mode():
            swapped = make()
        layer = next(iter(swapped.layers.values()))
        layer(torch.randn(1, 4, layer.channels).bfloat16(), map_size=(2, 2)).float().sum().backward()
        assert all(p.grad is not None for p in layer.parameters())
        swapped.save(tmp_path)
        swapped.restore()


def test_layers_that_are_not_finite_are_not_saved(tmp_path):
    with gspn.swap(unet_of()) as swapped:
        name, layer = next(iter(swapped.layers.items()))
        with torch.no_grad():
            layer.to_out[0].bias[1] = float("nan")
        with pytest.raises(ValueError, match=rf"{name}\.to_out\.0\.bias is not finite: .*nothing is saved"):
            swapped.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_loaded_layers_do_not_change_with_their_file(tmp_path):
    """Another program may overwrite it in place, which the memory that is mapped to it would show."""
    unet = unet_of()
    with gspn.swap(unet, init="random") as swapped:
        file = swapped.save(tmp_path)
        expected = {key: value.clone() for key, value in load_file(file).items()}
    loaded = gspn.load_swap(unet, file)
    with open(file, "r+b") as opened:
        opened.write(bytes(file.stat().st_size))
    found = {f"{name}.{key}": p for name, layer in loaded.layers.items() for key, p in layer.state_dict().items()}
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


def test_files_that_do_not_fit_are_refused_and_the_unet_stays_as_it_was(tmp_path):
    unet = unet_of()
    with gspn.swap(unet, init="random") as swapped:
        file = swapped.save(tmp_path)
    before, whole = state_of(unet), load_file(file)
    with safe_open(file, "pt") as opened:
        header = opened.metadata()

    def refused(message, target=unet, path=file, error=ValueError):
        before = state_of(target)
        with pytest.raises(error, match=message):
            gspn.load_swap(target, path)
        assert_same_state(target, before)

    refused("another base model: .*cross_attention_dim is .*16, 16.* there and .*24, 24.* here", unet_of("sd2"))
    refused("another base model: block_out_channels", unet_of(block_out_channels=(8, 24)))
    refused("no swapped layers at", path=tmp_path / "none", error=FileNotFoundError)
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(file.read_bytes()[:-100])
    refused("bad.safetensors is damaged or no safetensors file", path=bad)
    save_file(whole, bad)
    refused("holds no swapped layers: it was not written by", path=bad)
    key = next(iter(whole))
    save_file({k: v for k, v in whole.items() if k != key}, bad, metadata=header)
    refused("does not hold the layer .*attn1 of its config", path=bad)
    save_file({k: v.mT.contiguous() if v.ndim == 3 else v for k, v in whole.items()}, bad, metadata=header)
    refused("does not hold the layer .*attn1 of its config", path=bad)
    save_file(whole | {"conv_in.weight": torch.ones(1)}, bad, metadata=header)
    refused("tensor conv_in.weight", path=bad)
    config = json.loads(header["gspn_swap"]) | {"format": 9}
    save_file(whole, bad, metadata={"gspn_swap": json.dumps(config)})
    refused(r"newer gspn \(format 9; this one reads up to 1", path=bad)
    for foreign in ([], {}):
        save_file(whole, bad, metadata={"gspn_swap": json.dumps(foreign)})
        refused("holds no swapped layers: it was not written by", path=bad)
    save_file(whole, bad, metadata={"gspn_swap": json.dumps({"format": 1, "form": "qkv", "layers": {}})})
    refused("is damaged: its config lacks segment, gate_bias, unet", path=bad)
    config = json.loads(header["gspn_swap"]) | {"sample_size": [8, "x"]}
    save_file(whole, bad, metadata={"gspn_swap": json.dumps(config)})
    refused("is damaged: sample_size has to be .height, width.*, got .8, 'x'", path=bad)
    config = json.loads(header["gspn_swap"]) | {"proxy_dim": "8"}
    save_file(whole, bad, metadata={"gspn_swap": json.dumps(config)})
    refused("is damaged: proxy_dim has to be a whole number above 0, got '8'", path=bad)
    gspn.load_swap(unet, file)
    with pytest.raises(ValueError, match="swapped already"):
        gspn.load_swap(unet, file)
    gspn.restore(unet)
    assert_same_state(unet, before)


def test_diffusers_cannot_save_a_swapped_unet(tmp_path):
    pipe = tiny_sd()
    with gspn.swap(pipe):
        for save in (pipe.unet.save_pretrained, pipe.save_pretrained):
            with pytest.raises(ValueError, match=r"Swap\.save"):
                save(tmp_path / "swapped")
    assert not (tmp_path / "swapped" / "unet").exists()
    pipe.unet.save_pretrained(tmp_path / "restored")
    assert torch.equal(run(UNet2DConditionModel.from_pretrained(tmp_path / "restored")), run(pipe.unet))
