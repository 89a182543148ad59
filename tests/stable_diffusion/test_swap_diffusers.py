"""A swapped UNet among what diffusers, accelerate, torch.compile and peft do to UNets; what a swap refuses."""

import importlib.util
import sys

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module
from diffusers import ControlNetModel, DiTTransformer2DModel, FluxTransformer2DModel, UNet2DModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor
from helpers.stable_diffusion import tiny_sd, tiny_sdxl, tiny_unet
from helpers.swapping import FORMS, assert_same_state, inputs, run, state_of, unet_of

import gspn

# -- what of diffusers it survives --


def ip_adapter(unet):
    """An IP-Adapter's weights for the UNet, as its files have them."""
    rng = torch.Generator().manual_seed(5)
    normal = lambda *shape: torch.randn(*shape, generator=rng)  # noqa: E731
    dim = unet.config.cross_attention_dim
    adapter = {}
    for i, attention in enumerate(m for name, m in unet.named_modules() if name.endswith("attn2")):
        for part in ("k", "v"):
            adapter[f"{2 * i + 1}.to_{part}_ip.weight"] = normal(attention.inner_dim, dim)
    projection = {"proj.weight": normal(4 * dim, 6), "proj.bias": normal(4 * dim)}
    projection |= {"norm.weight": torch.ones(dim), "norm.bias": torch.zeros(dim)}
    return {"image_proj": projection, "ip_adapter": adapter}


def test_ip_adapter_loaded_before_or_after():
    image = {"added_cond_kwargs": {"image_embeds": [torch.ones(2, 1, 6)]}}
    outputs, restored = [], []
    for first in (True, False):
        unet = unet_of()
        if first:
            unet._load_ip_adapter_weights([ip_adapter(unet)])
        torch.manual_seed(6)
        gspn.swap(unet, form="qkv", init="random")
        if not first:
            unet._load_ip_adapter_weights([ip_adapter(unet)])
        outputs.append(run(unet, **image))
        gspn.restore(unet)
        restored.append(run(unet, **image))
    assert torch.equal(*outputs) and torch.equal(*restored) and not torch.equal(outputs[0], restored[0])
    plain = unet_of()
    plain._load_ip_adapter_weights([ip_adapter(plain)])
    assert torch.equal(run(plain, **image), restored[0])


def test_arguments_for_cross_attention_arrive_there_and_nothing_else_does():
    unet, seen = unet_of(), []

    class Recorder(AttnProcessor):
        def __call__(self, attn, hidden_states, *args, mark=None, map_size="none", **kwargs):
            seen.append((mark, map_size, kwargs.keys() - {"encoder_hidden_states", "attention_mask", "temb", "scale"}))
            return super().__call__(attn, hidden_states, *args, **kwargs)

    gspn.swap(unet, form="pure", init="random")
    new = run(unet)
    unet.set_attn_processor({n: AttnProcessor() if "attn1" in n else Recorder() for n in unet.attn_processors})
    given = {"mark": 3}
    torch.testing.assert_close(run(unet, cross_attention_kwargs=given), new, atol=1e-5, rtol=1e-5)
    assert seen == [(3, "none", set())] * len(seen) and len(seen) == len(unet._gspn_swap.layers)
    assert given == {"mark": 3}


def test_residuals_of_controlnet_and_t2i_adapter():
    unet = unet_of()
    control = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8)).eval()
    gspn.swap(unet, form="pure", init="random")
    plain, arguments = run(unet), inputs(unet)
    with torch.no_grad():
        down, mid = control(**arguments, controlnet_cond=torch.ones(2, 3, 16, 16), return_dict=False)
        adapter = [torch.ones(2, 8, 8, 8), torch.ones(2, 16, 4, 4)]
        zero = dict(down_block_additional_residuals=down, mid_block_additional_residual=mid)
        assert torch.equal(run(unet, **zero), plain)  # a ControlNet starts with zero convolutions
        ones = dict(down_block_additional_residuals=[r + 1 for r in down], mid_block_additional_residual=mid + 1)
        assert not torch.allclose(run(unet, **ones), plain)
        assert not torch.allclose(run(unet, down_intrablock_additional_residuals=adapter), plain)


def neutral_slicing(unet):
    unet.set_attention_slice("max")


def neutral_processors(unet):
    unet.set_attn_processor({name: AttnProcessor() for name in unet.attn_processors})


def neutral_chunks(unet):
    for module in unet.modules():
        if isinstance(module, BasicTransformerBlock):
            module.set_chunk_feed_forward(4, 1)


def neutral_fused(unet):
    unet.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"unfuse_qkv_projections\(\)"):
        gspn.restore(unet)
    fused = run(unet)
    unet.unfuse_qkv_projections()
    torch.testing.assert_close(run(unet), fused)


def neutral_channels_last(unet):
    unet.to(memory_format=torch.channels_last)


def neutral_moved_whole(unet):
    cpu_offload_with_hook(unet, torch.device("cpu"))


def neutral_moved_in_parts(unet):
    cpu_offload(unet, torch.device("cpu"))
    assert next(unet.parameters()).is_meta
    moved = run(unet)
    with pytest.raises(ValueError, match=r"device map"):
        gspn.restore(unet)
    with pytest.raises(ValueError, match="meta device"):
        unet._gspn_swap.save("nowhere")
    remove_hook_from_module(unet, recurse=True)
    torch.testing.assert_close(run(unet), moved)


@pytest.mark.parametrize(
    "neutral", [f for name, f in globals().items() if name.startswith("neutral_")], ids=lambda f: f.__name__[8:]
)
def test_what_changes_no_output(neutral):
    unet = unet_of()
    original = run(unet)
    gspn.swap(unet, form="qkv", init="random")
    new = run(unet)
    neutral(unet)
    torch.testing.assert_close(run(unet), new, atol=1e-5, rtol=1e-5)
    gspn.restore(unet)
    torch.testing.assert_close(run(unet), original, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", ["block_level", "leaf_level"])
def test_offloading_in_groups_after_the_swap(how):
    unet = unet_of()
    gspn.swap(unet, form="qkv", init="random")
    new, cpu = run(unet), torch.device("cpu")
    unet.enable_group_offload(
        cpu, cpu, offload_type=how, num_blocks_per_group=1 if how == "block_level" else None, record_stream=False
    )
    torch.testing.assert_close(run(unet), new)
    for act in (gspn.restore, lambda u: u._gspn_swap.use("attention")):
        with pytest.raises(ValueError, match="offloaded in groups"):
            act(unet)
    torch.testing.assert_close(run(unet), new)


def test_layer_wise_casting_after_the_swap(tmp_path):
    unet = unet_of()
    swapped = gspn.swap(unet, form="qkv")
    new = run(unet)
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert next(iter(swapped.layers.values())).to_q.weight.dtype == torch.float8_e4m3fn
    assert (run(unet) - new).norm() < 0.3 * new.norm()
    for act in (swapped.restore, lambda: swapped.save(tmp_path)):
        with pytest.raises(ValueError, match=r"torch\.float8_e4m3fn.*float32"):
            act()
    assert not list(tmp_path.iterdir())


def test_freeu_and_both_pipelines():
    """From the prompt to the picture; with another size than square, and the pictures of before after restoring."""
    for make in (tiny_sd, tiny_sdxl):
        pipe = make()
        draw = lambda height, width, pipe=pipe: pipe(  # noqa: E731
            "a red fox", height=height, width=width, num_inference_steps=2, output_type="np",
            generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip
        before = draw(16, 48)
        swapped = gspn.swap(pipe, form="qkv")
        assert swapped.unet is pipe.unet
        new = draw(16, 48)
        assert new.shape == (1, 16, 48, 3) and abs(new - before).mean() > 1e-4
        pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
        assert draw(16, 48).shape == new.shape
        pipe.disable_freeu()
        assert (draw(16, 48) == new).all()
        with pytest.raises(ValueError, match=r" 8 .* 20 and 16"):
            draw(20, 16)
        gspn.restore(pipe)
        assert (draw(16, 48) == before).all()


@pytest.mark.slow
def test_compiled_after_the_swap_in_one_graph():
    torch._dynamo.reset()
    one_level = dict(down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",))
    unet = unet_of(**one_level, block_out_channels=(8,), mid_block_type=None)  # tracing is what takes the time
    original = run(unet)
    swapped = gspn.swap(unet, form="qkv", init="random")
    new, wide = run(unet), run(unet, 4, 16)
    compiled = torch.compile(unet, backend="eager", fullgraph=True)
    with torch.no_grad():
        graph = lambda *size: compiled(**inputs(unet, *size)).sample  # noqa: E731
        torch.testing.assert_close(graph(), new)
        torch.testing.assert_close(graph(4, 16), wide)
        with swapped.use("attention"):
            torch.testing.assert_close(graph(), original)
        torch.testing.assert_close(graph(), new)
        gspn.restore(compiled)
        torch.testing.assert_close(graph(), original)


# -- LoRA --


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="LoRA needs peft")
@pytest.mark.parametrize("form", FORMS)
def test_lora_before_is_refused_and_after_acts_on_projections_of_the_same_names(form, tmp_path):
    unet = unet_of()
    original = run(unet)
    ends = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q")
    rng = torch.Generator().manual_seed(7)
    lora = {}
    for name, module in unet.named_modules():
        if name.endswith(ends):
            lora[f"unet.{name}.lora_A.weight"] = torch.randn(2, module.in_features, generator=rng)
            lora[f"unet.{name}.lora_B.weight"] = torch.randn(module.out_features, 2, generator=rng)

    unet.load_lora_adapter(dict(lora), prefix="unet")
    adapted = run(unet)
    with pytest.raises(ValueError, match=r"Linear of peft.* unload LoRA adapters"):
        gspn.swap(unet, form=form)
    assert torch.equal(run(unet), adapted)
    unet.unload_lora()
    assert torch.equal(run(unet), original)

    swapped = gspn.swap(unet, form=form)
    new = run(unet)
    unet.load_lora_adapter(dict(lora), prefix="unet")
    changed = {name.rpartition(".lora_A")[0] for name in unet.state_dict() if "lora_A" in name and "attn1" in name}
    taken = ends[:4] if form == "qkv" else ends[3:4]
    assert changed == {f"{name.removesuffix('attn1')}{end}" for name in swapped.layers for end in taken}
    assert not torch.allclose(run(unet), new)
    for act in (swapped.restore, lambda: swapped.use("attention"), lambda: swapped.save(tmp_path)):
        with pytest.raises(ValueError, match=r"Linear of peft.* unload LoRA adapters"):
            act()
    unet.unload_lora()
    assert torch.equal(run(unet), new)
    gspn.restore(unet)
    assert torch.equal(run(unet), original)


# -- what it refuses --


def fused(unet):
    unet.fuse_qkv_projections()


def compiled_in_place(unet):
    unet.compile(backend="eager")


def a_block_compiled(unet):
    unet.compile_repeated_blocks(backend="eager")


def offloaded(unet):
    cpu_offload(unet, torch.device("cpu"))


def offloaded_in_groups(unet):
    unet.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")


def cast(unet):
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def cast_to_bfloat16(unet):
    unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


def swapped(unet):
    gspn.swap(unet, form="pure", init="random")


def replaced(unet):
    unet.mid_block.attentions[0].transformer_blocks[0].attn1 = torch.nn.Identity()


def quantised(unet):
    class Quantised(torch.nn.Linear):
        pass

    unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_k = Quantised(16, 16, bias=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (fused, "unfuse_qkv_projections"),
        (compiled_in_place, "compiled already"),
        (a_block_compiled, "compiled already"),
        (offloaded, "device map"),
        (offloaded_in_groups, "offloaded in groups"),
        (cast, r"torch\.float8_e4m3fn"),
        (cast_to_bfloat16, r"cast layer-wise, from torch\.bfloat16 to torch\.float32: swap"),
        (swapped, r"Swap\(.*form=pure, global, active=gspn\).*gspn\.restore"),
        (replaced, r"mid_block.*attn1 \(Identity in a BasicTransformerBlock\)"),
        (quantised, "mid_block.*attn1 .*Quantised .*Linear"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_unets_that_cannot_be_swapped_stay_as_they_are(change, message):
    unet = unet_of()
    change(unet)
    before = state_of(unet)
    with pytest.raises(ValueError, match=message):
        gspn.swap(unet, form="qkv", init="random")
    assert_same_state(unet, before)


def test_a_compiled_unet_in_a_pipeline_is_refused():
    pipe = tiny_sd()
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    with pytest.raises(ValueError, match="compiled already"):
        gspn.swap(pipe)


def test_only_unets_with_self_attention_are_swapped():
    none = tiny_unet(
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, mid_block_type="UNetMidBlock2D"
    )
    with pytest.raises(ValueError, match=r"no self-attention \(attn1\)"):
        gspn.swap(none)
    # there attn1 looks at the text and is no self-attention
    crossed = tiny_unet(only_cross_attention=(True, False))
    names = list(gspn.swap(crossed, init="random").layers)
    assert names and not any(name.startswith(("down_blocks.0", "up_blocks.1")) for name in names)
    assert run(crossed).isfinite().all()
    with pytest.raises(ValueError, match="not swapped"):
        gspn.restore(unet_of())


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (DiTTransformer2DModel.__new__(DiTTransformer2DModel), "DiTTransformer2DModel.*diffusion transformer"),
        (FluxTransformer2DModel.__new__(FluxTransformer2DModel), "FluxTransformer2DModel.*diffusion transformer"),
        (UNet2DModel.__new__(UNet2DModel), "got a UNet2DModel"),
        ("stable-diffusion", "got a str"),
    ],
)
def test_other_models_are_out_of_scope(target, message):
    class Pipeline:
        transformer = target

    whole = (target, Pipeline()) if "Transformer" in message else (target,)
    for given in whole:
        for act in (gspn.swap, gspn.restore, lambda t: gspn.load_swap(t, "x")):
            with pytest.raises(TypeError, match=message):
                act(given)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(form="linear"), ValueError, "form.*'linear'"),
        (dict(init="zero"), ValueError, "init.*'zero'"),
        (dict(segment=0), ValueError, "segment.*0"),
        (dict(segment=2.5), TypeError, r"segment.*2\.5"),
        (dict(backend="cuda"), ValueError, "backend 'cuda'"),
    ],
)
def test_bad_options_leave_the_unet_as_it_was(options, error, message):
    unet = unet_of()
    before = state_of(unet)
    with pytest.raises(error, match=message):
        gspn.swap(unet, **options)
    assert_same_state(unet, before)


def test_what_was_put_in_the_place_of_a_layer_is_not_lost():
    unet = unet_of()
    gspn.swap(unet, init="random")
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    layer, block.attn1 = block.attn1, torch.nn.Identity()
    with pytest.raises(ValueError, match=r"mid_block.*attn1 .*Identity"):
        gspn.restore(unet)
    block.attn1 = layer
    gspn.restore(unet)


def test_public_names_are_told_and_documented():
    for name in ("swap", "restore", "load_swap", "GSPNAttention"):
        assert name in dir(gspn) and getattr(gspn, name).__doc__


def test_without_diffusers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for module in ("swap", "swappable"):
        monkeypatch.delitem(sys.modules, f"gspn.stable_diffusion.{module}")
    for name in ("swap", "restore", "load_swap", "GSPNAttention"):
        monkeypatch.delattr(gspn, name, raising=False)
        with pytest.raises(ImportError, match=r'pip install "gspn\[diffusion\]"'):
            getattr(gspn, name)
