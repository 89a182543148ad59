"""GSPN-DiT: its size beside DiT's, its block by hand, any map, positions, sizes, dilation, saving, sampling."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DiTPipeline
from helpers.diffusion import lively, tiny_vae
from torch._dynamo.testing import CompileCounter

import gspn
from gspn.models.dit import create_dit
from gspn.models.generator import create_generator
from gspn.models.gspn_dit import GSPNDiTBlock, GSPNDiTTransformer2DModel


def tiny(**config):
    """A model whose output depends on everything, as that of a trained one."""
    torch.manual_seed(0)
    config = dict(sample_size=8, in_channels=3, num_classes=5, hidden_size=32, depth=2) | config
    model = lively(GSPNDiTTransformer2DModel(**config))
    with torch.no_grad():
        for block in model.blocks:
            block.modulation.weight.normal_(std=0.1)
            block.modulation.bias.normal_(std=0.1)
        if model.size_embed is not None:
            model.size_embed.weight.normal_()
    return model


def inputs(batch=2, channels=3, height=8, width=8):
    steps, labels = torch.arange(batch) * 300 + 7, torch.arange(batch) % 5
    return dict(hidden_states=torch.randn(batch, channels, height, width), timestep=steps, class_labels=labels)


# -- sizes --


@pytest.mark.parametrize("size", ["micro", "S", "B", "L", "XL"])
@pytest.mark.parametrize("patch", [2, 4])
def test_it_is_as_large_as_dit(size, patch):
    with torch.device("meta"):
        ours, dit = gspn.create_generator(f"GSPN-DiT-{size}/{patch}"), create_dit(f"DiT-{size}/{patch}")
    assert isinstance(ours, gspn.GSPNDiTTransformer2DModel) and ours.config.patch_size == patch
    ours, dit = (sum(p.numel() for p in model.parameters()) for model in (ours, dit))
    assert abs(ours / dit - 1) < 0.03
    documented = {"S": 32_717_656, "B": 129_369_688, "L": 452_157_584, "XL": 672_037_796}
    assert patch == 4 or size == "micro" or ours == documented[size]


def test_the_families_take_their_own_arguments():
    with pytest.raises(TypeError, match="segment"):
        create_generator("GSPN-DiT-micro/2", segment=2)
    with pytest.raises(TypeError, match="positions"):
        create_generator("GSPN-micro/2", positions=True)
    with pytest.raises(RuntimeError, match=r"GSPNDiTTransformer2DModel\.from_pretrained"):
        create_generator("GSPN-DiT-S/2", pretrained=True)


# -- the maths --


def test_the_block_by_hand():
    torch.manual_seed(0)
    block = GSPNDiTBlock(16, mlp_ratio=2.0, proxy_dim=4, groups=2, average=True).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.3)
    x, c = torch.randn(2, 3, 5, 16).double(), torch.randn(2, 16).double()
    norm = lambda t: (t - t.mean(-1, keepdim=True)) / (t.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()  # noqa: E731
    m = (c @ block.modulation.weight.T + block.modulation.bias).view(2, 6, 1, 1, 16).unbind(1)
    z, gate = block.in_proj(norm(x) * (1 + m[1]) + m[0]).split(16, -1)
    y = block.gspn(z.movedim(-1, 1)).movedim(1, -1)
    y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * block.norm.weight
    expected = x + m[2] * block.out_proj(y * gate * gate.sigmoid())
    h = block.mlp_in(norm(expected) * (1 + m[4]) + m[3]).movedim(-1, 1)
    h = F.conv2d(h, block.dwconv.weight, block.dwconv.bias, padding=1, groups=32).movedim(1, -1)
    expected = expected + m[5] * block.mlp_out(h * h.sigmoid())
    torch.testing.assert_close(block(x, c), expected)


def test_a_new_block_changes_nothing_and_a_new_model_predicts_nothing():
    torch.manual_seed(0)
    model = create_generator("GSPN-DiT-micro/2", num_classes=3, depth=1, hidden_size=32, in_channels=3)
    x = torch.randn(1, 4, 4, 32)
    assert torch.equal(model.blocks[0](x, torch.randn(1, 32)), x)
    assert model(**inputs(1)).sample.eq(0).all()
    # Xavier's bounds, for the proxy too
    for weight in (model.blocks[0].in_proj.weight, model.blocks[0].gspn.proxy_proj.weight.flatten(1)):
        bound = (6 / sum(weight.shape)) ** 0.5
        assert 0.9 * bound < weight.abs().max() <= bound


@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 14), (2, 2), (2, 6), (22, 26)])
def test_any_size_and_each_place_hears_each_other(height, width):
    model, given = tiny(), inputs(1, height=height, width=width)
    given["hidden_states"].requires_grad_()
    sample = model(**given).sample
    assert sample.shape == (1, 6, height, width)
    sample[0, :, -1, 0].sum().backward()
    assert (given["hidden_states"].grad.abs().sum((0, 1)) > 0).all()


def test_checkpointing_gives_the_same_gradients():
    model, given = tiny(), inputs()
    grads = []
    for on in (False, True):
        model.enable_gradient_checkpointing() if on else model.disable_gradient_checkpointing()
        model.zero_grad()
        model(**given).sample.square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(map(torch.equal, *grads))


def test_autocast_rounds_and_warns_of_nothing(recwarn):
    model, given = tiny(), inputs()
    with torch.no_grad():
        expected = model(**given).sample
        with torch.autocast("cpu", torch.bfloat16):
            found = model(**given).sample
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().max() <= 0.03 * expected.abs().max()
    assert not [str(each.message) for each in recwarn]


# -- positions and sizes --


def test_positions_are_stretched_over_any_map():
    model, plain = tiny(positions=True), tiny()
    assert dict(plain.named_parameters()).keys() == dict(model.named_parameters()).keys()
    embedded = []
    model.blocks[0].register_forward_pre_hook(lambda module, args: embedded.append(args[0]))
    blank = dict(inputs(1), hidden_states=torch.zeros(1, 3, 8, 8))
    model(**blank)
    model(**dict(blank, hidden_states=torch.zeros(1, 3, 16, 24)))
    trained, larger = (x - model.patch_embed.bias for x in embedded)
    assert larger.shape == (1, 8, 12, 32)
    # every second row and third column of the larger map lies where one of the trained map does
    torch.testing.assert_close(larger[:, ::2, ::3], trained, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(trained[:, 1:], trained[:, :-1], atol=0.1)
    with pytest.raises(ValueError, match="multiple of 4, got 30"):
        tiny(positions=True, hidden_size=30, groups=2)


def test_the_size_is_heard():
    model, given = tiny(size_condition=True), inputs(1)
    heard = []
    model.blocks[0].register_forward_pre_hook(lambda module, args: heard.append(args[1]))
    model(**given)
    model(**dict(given, hidden_states=torch.randn(1, 3, 16, 4)))
    with torch.no_grad():
        model.size_embed.weight.zero_()
        model(**given)
    assert torch.equal(heard[0], heard[2])  # the trained size is log 1 = 0
    with torch.no_grad():
        model.size_embed.weight.normal_()
    model(**given, dilation=2)
    size = torch.tensor([[math.log(1 / 2), math.log(1 / 2)]])
    condition = model.embed(given["timestep"], given["class_labels"], hidden_dtype=torch.float32)
    torch.testing.assert_close(heard[3][:1], F.silu(condition + model.size_embed(size)))
    with torch.no_grad():
        model.size_embed.weight.zero_()
    condition = model.embed(given["timestep"], given["class_labels"], hidden_dtype=torch.float32)
    assert not torch.allclose(heard[0], heard[1])
    torch.testing.assert_close(heard[0], F.silu(condition))
    assert tiny().size_embed is None


def test_a_compiled_model_hears_every_size_in_one_graph():
    model, counter = tiny(size_condition=True), CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, dynamic=True)
    with torch.no_grad():
        for height, width in ((12, 16), (16, 20), (24, 12)):
            given = inputs(height=height, width=width)
            torch.testing.assert_close(compiled(**given).sample, model(**given).sample)
    assert counter.frame_count == 1


# -- dilation --


def test_dilation_runs_the_blocks_on_interleaved_maps():
    model = tiny(patch_size=1)
    given = inputs(2, height=12, width=6)
    got = model(**given, dilation=2).sample
    for row in range(2):
        for column in range(2):
            part = given["hidden_states"][..., row::2, column::2]
            torch.testing.assert_close(
                got[..., row::2, column::2], model(**dict(given, hidden_states=part)).sample, atol=1e-5, rtol=1e-5
            )
    assert torch.equal(model(**given, dilation=1).sample, model(**given).sample)
    assert torch.equal(model(**given, dilation=np.int64(2)).sample, got)


@pytest.mark.parametrize(
    ("dilation", "said"), [(0, "positive"), (True, "positive"), (1.5, "positive"), (3, "multiples of 6, got 8x8")]
)
def test_bad_dilations(dilation, said):
    with pytest.raises(ValueError, match=said):
        tiny()(**inputs(1), dilation=dilation)


# -- as a part of diffusers --


def test_it_is_saved_and_loaded(tmp_path):
    model, given = tiny(positions=True, size_condition=True), inputs()
    model.save_pretrained(tmp_path)
    again = GSPNDiTTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(again(**given).sample, model(**given).sample)
    with pytest.raises(
        ValueError, match="config of a GSPNDiTTransformer2DModel, expected that of a GSPNTransformer2DM"
    ):
        gspn.GSPNTransformer2DModel.from_pretrained(tmp_path)


def test_the_pipelines_take_it(tmp_path):
    model, scheduler = tiny(), DDIMScheduler()
    pipeline = gspn.GSPNPipeline(model, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path)
    again = gspn.GSPNPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    call = dict(class_labels=[1, 2], num_inference_steps=3, height=16, width=8, output_type="np")
    images = [p(**call, generator=torch.Generator().manual_seed(1)).images for p in (pipeline, again)]
    assert images[0].shape == (2, 16, 8, 3) and (images[0] == images[1]).all()
    theirs = DiTPipeline(tiny(in_channels=4, num_classes=1000), tiny_vae(), scheduler)
    theirs.set_progress_bar_config(disable=True)
    images = theirs([7], num_inference_steps=2, output_type="pt").images
    assert images.shape == (1, 3, 16, 16) and images.isfinite().all()


def test_noisy_steps_are_dilated():
    model = tiny()
    pipeline = gspn.GSPNPipeline(model, DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    seen, forward = [], model.forward
    model.forward = lambda *args, **kwargs: seen.append(kwargs.get("dilation", 1)) or forward(*args, **kwargs)
    for two in (2, np.int64(2)):
        pipeline([1], num_inference_steps=5, height=16, width=16, dilation=two, dilate_from=0.6)
        assert seen == [2, 2, 1, 1, 1]  # at 800, 600, 400, 200, 0 of 1000
        assert {type(each) for each in seen} == {int}
        seen.clear()
    for wrong, said in (
        (dict(dilation=0), "positive"),
        (dict(dilation=2, dilate_from=2), "from 0 to 1"),
        (dict(dilation=3, height=16, width=16), "multiples of 6, the patch size 2 times the dilation 3"),
    ):
        with pytest.raises(ValueError, match=said):
            pipeline([1], **wrong)
    paper = create_generator("GSPN-micro/2", num_classes=5, in_channels=3, depth=2, hidden_size=32)
    with pytest.raises(ValueError, match="got a GSPNTransformer2DModel"):
        gspn.GSPNPipeline(paper, DDIMScheduler())([1], dilation=2)
