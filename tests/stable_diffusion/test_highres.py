"""High resolution: stages, what a stage computes, bad input."""

import copy
import math
from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline
from helpers.high_resolution import FEW, PLAIN, latents_of
from helpers.stable_diffusion import ddim, tiny_ip_adapter, tiny_sd, tiny_sdxl
from torch import nn

import gspn
from gspn.stable_diffusion.highres import HighResPipeline, Savers
from gspn.stable_diffusion.highres.images import decode, encode, rematched, resize
from gspn.stable_diffusion.highres.passes import Guidance, cosine_share, dilated
from gspn.stable_diffusion.highres.plan import SCHEDULERS, native_size, stage_sizes

pytestmark = pytest.mark.usefixtures("no_estimates")


# -- stages --


def test_sides_double_from_the_trained_size_and_keep_the_aspect():
    assert stage_sizes(1024, 1024, 64**2, 8) == [(64, 64), (128, 128), (256, 256), (512, 512), (1024, 1024)]
    assert stage_sizes(8192, 16384, 512**2, 8)[-1] == (8192, 16384) and len(stage_sizes(8192, 16384, 512**2, 8)) == 6
    assert stage_sizes(48, 64, 64**2, 8) == [(48, 64)]  # no larger than the trained size
    for height, width, area, unit in ((1536, 640, 512**2, 8), (4096, 1032, 1024**2, 8), (96, 64, 64**2, 16)):
        sizes = stage_sizes(height, width, area, unit)
        assert sizes[-1] == (height, width) and all(side % unit == 0 for size in sizes for side in size)
        assert abs(math.log(math.prod(sizes[0]) / area)) < 0.35
        for (h, w), (high, wide) in pairwise(sizes):
            assert h < high <= 2.2 * h and w <= wide <= 2.2 * w
            assert abs(math.log(h / w * width / height)) < 0.15
    assert native_size(8192, 16384, 512**2, 8) in ((360, 720), (368, 736), (352, 704))


def test_a_plan_takes_what_a_call_takes(sd, tmp_path):
    call = dict(height=24, width=24, steps=5, guidance_scale=3.0, eta=0.5)
    more = dict(prompt="owl", negative_prompt="fox", seed=1, blend=None, rematch=False, workdir=tmp_path / "owl")
    more |= dict(output_type="np", callback_on_step_end=print)
    assert HighResPipeline(sd).plan(**call, **more) == HighResPipeline(sd).plan(**call)
    assert not (tmp_path / "owl").exists()


def test_the_schedule_of_steps(sd):
    plan = HighResPipeline(sd).plan(256, 512)
    assert [stage.taken for stage in plan] == [50, 21, 16, 10, 9, 9][: len(plan)] and len(plan) == 6
    assert plan[0].dilation == 1 and plan[-1].dilation == round(math.sqrt(256 * 512 / 256))
    assert all(stage.savers == Savers() and stage.memory_mib > 0 for stage in plan)
    assert plan[-1].memory_mib > 3 * plan[-2].memory_mib
    own = HighResPipeline(sd).plan(stages=[(16, 16), (24, 32), (32, 32)], steps=[10, 20], strengths=[0.5, 1.0])
    assert [(stage.size, stage.taken) for stage in own[1:]] == [((24, 32), 5), ((32, 32), 20)]


# -- what a stage computes --


def test_the_first_stage_is_the_pipelines_own_image(pipe):
    call = dict(negative_prompt="house", guidance_scale=5.0)
    first = HighResPipeline(pipe)("red owl", 16, 16, native_steps=3, seed=9, **call)
    generator = torch.Generator().manual_seed(9)
    own = pipe("red owl", height=16, width=16, num_inference_steps=3, generator=generator, **call).images[0]
    assert np.array_equal(np.asarray(first.images[0]), np.asarray(own)) and len(first.stages) == 1 and first.seed == 9


def test_layers_are_adapted_to_each_stage():
    """Around it gspn.adapt says only that they are, at whatever size."""
    pipe = tiny_sd()
    swapped = gspn.swap(pipe, segment=2, init="random")
    own, seen = latents_of(pipe, stages=[(16, 16)])[0], []
    hook = pipe.unet.register_forward_pre_hook(
        lambda unet, args: seen.append((tuple(args[0].shape[2:]), next(iter(swapped.layers.values())).apart))
    )
    with gspn.adapt(pipe, (64, 64)):
        first = latents_of(pipe, stages=[(16, 16), (32, 32)])[0]
        with pytest.raises(ValueError, match=r"24x40 .* cannot be divided"):
            HighResPipeline(pipe).plan(stages=[(16, 16), (24, 40)])
        assert {layer.apart for layer in swapped.layers.values()} == {(4, 4)}
    assert torch.equal(first, own) and set(seen) == {((8, 8), (1, 1)), ((16, 16), (2, 2))}
    seen.clear()
    with gspn.adapt(pipe, (20, 20)):  # where nothing changes, as the ratio rounds to 1
        latents_of(pipe, stages=[(16, 16), (32, 32)])
    hook.remove()
    assert set(seen) == {((8, 8), (1, 1)), ((16, 16), (2, 2))}


def test_a_workdir_is_not_continued_with_layers_adapted_otherwise(tmp_path):
    pipe = tiny_sd()
    gspn.swap(pipe, segment=2, init="random")
    call = dict(stages=[(16, 16), (32, 32)], seed=1, workdir=tmp_path)
    latents_of(pipe, **call)
    for size in ((20, 20), (32, 32)):
        with gspn.adapt(pipe, size), pytest.raises(ValueError, match="unet"):
            latents_of(pipe, **call)


def test_stages_begin_at_the_size_that_what_runs_was_trained_for():
    pipe = tiny_sd()  # for 16x16
    swapped = gspn.swap(pipe, segment=2, init="random")
    swapped.sample_size = (16, 16)  # latents of 32x32
    sizes = lambda: [stage.size for stage in HighResPipeline(pipe).plan(64, 64)]  # noqa: E731
    assert sizes() == [(32, 32), (64, 64)]
    with swapped.use("attention"):
        assert sizes() == [(16, 16), (32, 32), (64, 64)]
    pipe.unet = torch.compile(pipe.unet)  # nothing runs
    assert sizes() == [(32, 32), (64, 64)]
    swapped.sample_size = 16
    with pytest.raises(ValueError, match="sample_size of the Swap"):
        sizes()


# diffusers' image to image with the other two takes steps as if those before the first had been taken (see below).
@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name not in ("LMSDiscreteScheduler", "PNDMScheduler")])
def test_a_plain_stage_is_image_to_image(sd, name):
    check_image_to_image(sd, StableDiffusionImg2ImgPipeline, name, requires_safety_checker=False)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_plain_stage_is_image_to_image_with_sdxl(sdxl, prediction):
    native = dict(original_size=(16, 16), target_size=(16, 16))
    check_image_to_image(
        sdxl, StableDiffusionXLImg2ImgPipeline, "EulerDiscreteScheduler", prediction, native, add_watermarker=False
    )


def test_a_plain_stage_is_image_to_image_with_an_ip_adapter():
    pipe, options = tiny_sd(), dict(ip_adapter_image_embeds=[torch.randn(2, 1, 6)])
    without = latents_of(pipe, **PLAIN)
    pipe.unet._load_ip_adapter_weights([tiny_ip_adapter(pipe.unet)])
    kind = StableDiffusionImg2ImgPipeline
    both = check_image_to_image(pipe, kind, "DDIMScheduler", options=options, requires_safety_checker=False)
    assert not any(torch.equal(*pair) for pair in zip(both, without, strict=True))


def check_image_to_image(pipe, kind, name, prediction="epsilon", told=None, options=None, **components):
    scheduler = getattr(diffusers, name).from_config(ddim().config, prediction_type=prediction)
    pipe = type(pipe)(**pipe.components | {"scheduler": scheduler}, **components)
    pipe.set_progress_bar_config(disable=True)
    call = dict(negative_prompt="house", guidance_scale=4.0) | (options or {})
    first, second = latents_of(pipe, **call, **PLAIN)
    start = encode(pipe, resize(decode(pipe, first), (24, 32)))
    words = np.random.SeedSequence([3, 1]).generate_state(2)
    generator = torch.Generator().manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)
    other = kind(**pipe.components, **components)
    other.set_progress_bar_config(disable=True)
    call |= dict(image=start, strength=0.76, num_inference_steps=4, generator=generator, output_type="latent")
    expected = other("a red fox", **call, **(told or {})).images
    torch.testing.assert_close(second, expected, atol=1e-4, rtol=1e-4)
    assert (second - start).abs().max() > 0.05
    return first, second


@pytest.mark.parametrize("blend", [None, 1.0])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_each_step_finds_the_noise_of_its_timestep(sd, name, blend, monkeypatch):
    """Of a prediction that is right, all steps lead to the image; those of an ODE along one and the same noise."""
    told_of = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    scheduler = getattr(diffusers, name).from_config(ddim().config, **told_of)
    pipe = type(sd)(**sd.components | {"scheduler": scheduler}, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    seen = []

    def right(self, maps, t, **how):
        seen.append((float(t), (maps - product(t).sqrt() * start) / (1 - product(t)).sqrt()))
        return seen[-1][1]

    def product(t):
        """Between whole timesteps, as Euler and LMS have it: the noise beside the image, linearly."""
        products = ddim().alphas_cumprod.numpy()
        noise = np.interp(float(t), range(1000), np.sqrt((1 - products) / products))
        return torch.tensor(1 / (1 + noise**2))

    start = encode(pipe, resize(decode(pipe, latents_of(pipe)[0]), (24, 32)))
    monkeypatch.setattr(Guidance, "predict", right)
    last = latents_of(pipe, steps=20, strengths=0.4, dilation=None, rematch=False, blend=blend)[1]
    assert len(seen) == 8 + (name == "PNDMScheduler") and seen[0][0] == max(t for t, _ in seen)
    assert (last - start).std() < 0.05
    if name not in ("DDPMScheduler", "DDPMParallelScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler"):
        for t, noise in seen[1:]:
            torch.testing.assert_close(noise, seen[0][1], atol=0.02, rtol=0.02, msg=f"at {t}")


def test_blending_the_dilated_pass_and_the_statistics_by_hand(sd):
    """DDIM from first principles, the dilated UNet a copy whose convolutions were made anew."""
    first, second = latents_of(
        sd, stages=[(16, 16), (32, 48)], guidance_scale=3.0, blend=0.5, dilation=0.25, strengths=1.0
    )
    scheduler, far = copy.deepcopy(sd.scheduler), copy.deepcopy(sd.unet)
    for name, conv in [*far.named_modules()]:
        if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3):
            new = nn.Conv2d(conv.in_channels, conv.out_channels, 3, conv.stride, padding=2, dilation=2)
            new.load_state_dict(conv.state_dict())
            far.set_submodule(name, new)
    start = encode(sd, resize(decode(sd, first), (32, 48)))
    words = np.random.SeedSequence([3, 1]).generate_state(2)
    noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(int(words[0]) << 31 | int(words[1]) >> 1))
    text, null = sd.encode_prompt("a red fox", "cpu", 1, True)
    product, x = scheduler.alphas_cumprod, None
    for t in (751, 501, 251, 1):
        noised = product[t].sqrt() * start + (1 - product[t]).sqrt() * noise
        c = (1 - math.cos(math.pi * t / 1000)) / 2
        x = noised if x is None else c**0.5 * noised + (1 - c**0.5) * x
        share = c**0.25
        epsilon = 0
        for unet, part in ((sd.unet, 1 - share), (far, share)):
            if part == share and share < 0.01:
                continue
            with torch.no_grad():
                free, prompted = (unet(x, t, condition).sample for condition in (null, text))
            epsilon = epsilon + part * (free + 3.0 * (prompted - free))
        before = product[t - 250] if t > 250 else scheduler.final_alpha_cumprod
        clean = (x - (1 - product[t]).sqrt() * epsilon) / product[t].sqrt()
        x = before.sqrt() * clean + (1 - before).sqrt() * epsilon
    torch.testing.assert_close(second, rematched(x, start), atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(second.mean((2, 3)), start.mean((2, 3)), atol=1e-5, rtol=0)
    torch.testing.assert_close(second.std((2, 3)), start.std((2, 3)), atol=1e-5, rtol=0)
    assert (second - rematched(x.flip(3), start)).abs().max() > 0.1


def test_each_of_the_three_counts_and_shares_fall_with_the_noise(sd):
    ways = [PLAIN | {name: value} for name, value in (("blend", 1.0), ("dilation", 0.5), ("rematch", True))]
    results = [latents_of(sd, stages=[(16, 16), (32, 48)], **way)[1] for way in (PLAIN, *ways)]
    for i, one in enumerate(results):
        assert all((one - other).abs().max() > 1e-3 for other in results[:i])
    shares = [cosine_share(t, 1000, 1.0) for t in (1000, 500, 250, 0)]
    assert shares == pytest.approx([1, 0.5, (1 - math.sqrt(0.5)) / 2, 0])


def test_dilation_reaches_further_and_leaves_no_trace(sd):
    unet, x = sd.unet, torch.randn(1, 4, 11, 13)
    text = torch.randn(1, 8, 16)
    described = {name: repr(module) for name, module in unet.named_modules()}
    with torch.no_grad():
        before = unet(x, 7, text).sample
        with dilated(unet, 3):
            inside = unet(x, 7, text).sample
            conv = unet.conv_in(x)
            # a dilated convolution is the plain one on each of the interleaved maps
            plain = nn.functional.conv2d(x[..., 1::3, 2::3], unet.conv_in.weight, unet.conv_in.bias, padding=1)
            torch.testing.assert_close(conv[..., 1::3, 2::3], plain, atol=1e-5, rtol=1e-4)
        with dilated(unet, (2, 3), ("down_blocks", "mid_block")):
            wide = {name.split(".")[0] for name, conv in unet.named_modules() if getattr(conv, "dilation", 0) == (2, 3)}
            assert wide == {"down_blocks", "mid_block"} and unet(x, 7, text).sample.shape == before.shape
        with pytest.raises(KeyError), dilated(unet, 2):
            raise KeyError
        after = unet(x, 7, text).sample
    assert torch.equal(before, after) and inside.shape == before.shape and (inside - before).abs().max() > 1e-3
    assert described == {name: repr(module) for name, module in unet.named_modules()}
    strange = nn.ModuleList([nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 2, stride=2), nn.Conv2d(2, 2, 1)])
    with dilated(strange, 2):  # which would change the size of the map
        assert all(conv.dilation == (1, 1) for conv in strange)


@pytest.mark.parametrize("factor, channels", [(1, 4), (4, 8), (8, 4)])
def test_other_vaes(factor, channels):
    pipe = tiny_sd(factor=factor, vae=dict(latent_channels=channels), in_channels=channels, out_channels=channels)
    side = 8 * factor
    result = HighResPipeline(pipe)("blue house", 2 * side, 3 * side, **FEW, output_type="pt")
    assert result.images.shape == (1, 3, 2 * side, 3 * side) and result.images.isfinite().all()
    assert result.stages[0].shape[-2] < 2 * side and len(result.stages) == len(result.plan) >= 2


@pytest.mark.estimates
def test_latents_with_statistics_by_channel_and_a_vae_in_float16():
    pipe = tiny_sdxl(vae=dict(latents_mean=(0.5, -1.0, 0.0, 2.0), latents_std=(1.0, 2.0, 0.5, 3.0)))
    image = torch.rand(1, 3, 16, 24) * 2 - 1
    with torch.no_grad():
        raw = pipe.vae.encode(image).latent_dist.mode()
        z = encode(pipe, image)
        torch.testing.assert_close(z[:, 3], (raw[:, 3] - 2.0) / 3.0 * 0.5)
        torch.testing.assert_close(decode(pipe, z), pipe.vae.decode(raw).sample, atol=1e-5, rtol=1e-4)
        pipe.vae.half()
        torch.testing.assert_close(encode(pipe, image), z, atol=0.05, rtol=0.05)
    assert pipe.vae.dtype == torch.float16 and HighResPipeline(pipe).plan(24, 24)[-1].memory_mib > 0


@pytest.mark.parametrize("form", ["pure", "qkv"])
def test_a_swapped_pipeline(form):
    pipe = tiny_sd()
    plain = latents_of(pipe, **FEW)
    with gspn.swap(pipe, form=form, init="random"):
        result = HighResPipeline(pipe)("red fox", 32, 48, **FEW, output_type="latent")
        assert result.images.shape == (1, 4, 16, 24) and result.images.isfinite().all()
    assert all(torch.equal(*pair) for pair in zip(plain, latents_of(pipe, **FEW), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_unet_that_is_conditioned_on_guidance(dtype):
    pipe = tiny_sd(scheduler=diffusers.LCMScheduler(), time_cond_proj_dim=8).to(dtype)
    first, second = (latents_of(pipe, guidance_scale=scale)[1] for scale in (2.0, 9.0))
    assert first.isfinite().all() and not torch.equal(first, second)


def test_what_the_safety_checker_blackens_is_shown_alone(monkeypatch):
    pipe = tiny_sd()
    call = dict(stages=[(16, 16), (24, 24), (24, 32)], **FEW)
    plain = HighResPipeline(pipe)("owl", **call, output_type="np").stages
    found = iter([True, False, True])
    monkeypatch.setattr(pipe, "safety_checker", object())

    def check(image, device, dtype):
        flagged = [next(found)]
        return image.zero_() if flagged[0] else image, flagged

    monkeypatch.setattr(pipe, "run_safety_checker", check, raising=False)
    result = HighResPipeline(pipe)("owl", **call, output_type="np")
    np.testing.assert_array_equal(result.stages[1], plain[1])
    assert result.nsfw_content_detected == [True] and not result.stages[0].any() and not result.images.any()


def test_options_reach_every_stage(sdxl):
    plain = latents_of(sdxl, **PLAIN)
    for option in (
        dict(prompt_2="owl"),
        dict(guidance_rescale=0.7),
        dict(original_size=(64, 64)),
        dict(negative_prompt="green", negative_prompt_2="house"),
    ):
        first, second = latents_of(sdxl, **option, **PLAIN)
        assert not torch.equal(first, plain[0]) and not torch.equal(second, plain[1]), option
    embeds = dict(zip(("prompt_embeds", "negative_prompt_embeds"), sdxl.encode_prompt("a red fox")[:2], strict=True))
    pooled = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    embeds |= dict(zip(pooled, sdxl.encode_prompt("a red fox")[2:], strict=True))
    result = HighResPipeline(sdxl)(stages=[(16, 16), (24, 32)], output_type="latent", **FEW, **PLAIN, **embeds)
    torch.testing.assert_close(result.stages[1], plain[1])


def test_callbacks_progress_and_output(sd, capsys):
    told, done = [], []

    def step_end(pipe, step, t, given):
        told.append((given["stage"], step))
        return {"latents": given["latents"] * 0 if given["stage"] == 1 and step == 1 else None}

    sd.set_progress_bar_config(desc="mine")
    try:
        result = HighResPipeline(sd)(
            "red fox",
            stages=[(16, 16), (24, 32)],
            **FEW | PLAIN,
            callback_on_step_end=step_end,
            callback_on_stage_end=lambda pipe, i, images: done.append((i, images[0].size)),
        )
        assert sd._progress_bar_config == {"desc": "mine"}
    finally:
        sd.set_progress_bar_config(disable=True)
    assert told == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)] and done == [(0, (16, 16)), (1, (32, 24))]
    assert [image[0].size for image in result.stages] == [(16, 16), (32, 24)] and result.images is result.stages[-1]
    array = HighResPipeline(sd)("red fox", stages=[(16, 16), (24, 32)], **FEW | PLAIN, output_type="np")
    assert array.images.shape == (1, 24, 32, 3) and 0 <= array.images.min() and array.images.max() <= 1
    assert not np.array_equal((array.images[0] * 255).round().astype(np.uint8), np.asarray(result.images[0]))


def test_a_callers_generator_decides_and_moves_on(sd):
    one = [torch.Generator().manual_seed(5) for _ in range(2)]
    call = dict(stages=[(16, 16), (24, 24)], seed=None)
    assert torch.equal(latents_of(sd, **call, generator=one[0])[1], latents_of(sd, **call, generator=one[1])[1])
    assert not torch.equal(latents_of(sd, **call, generator=one[0])[0], latents_of(sd, **call | {"seed": 5})[0])


# -- what does not fit together --


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(height=60), "multiples of 8, got 60x32"),
        (dict(height=0), "multiples of 8, got 0x32"),
        (dict(height=None), "height and width"),
        (dict(stages=[]), "stages is empty"),
        (dict(stages=[(16, 16), (24, 24)]), "stages.* 24x24.* 64x32"),
        (dict(stages=[(64, 64), (64, 32)]), "stages.* 64x64 before 64x32"),
        (dict(stages=[16, 32]), r"stage.*\(height, width\).* 16"),
        (dict(steps=0), "^steps.* 1000.* 0"),
        (dict(steps=[]), "^steps.*empty"),
        (dict(native_steps=2.5), "native_steps"),
        (dict(strengths=[0.4, 1.5]), r"strengths.* 1\.5"),
        (dict(guidance_scale=-1), "guidance_scale"),
        (dict(guidance_scale=0.5), "guidance_scale.*at least 1.* 0.5"),
        (dict(guidance_scale=True), "guidance_scale.* True"),
        (dict(blend=-1), "blend.*-1"),
        (dict(seed=-1), "seed.*-1"),
        (dict(seed=1, generator=torch.Generator()), "pass one of them"),
        (dict(generator=[torch.Generator()]), r"generator has to be one torch\.Generator, .* got \["),
        (dict(memory_mib=0), "memory_mib"),
        (dict(output_type="jpg"), "output_type.*'jpg'"),
        (dict(offload=True), "offload.*CPU"),
        (dict(prompt_embeds=torch.zeros(1, 8, 16)), "prompt and prompt_embeds"),
        (
            dict(prompt=None, prompt_embeds=torch.zeros(2, 8, 16)),
            r"prompt_embeds.* \(2, 8, 16\)",
        ),
    ],
)
def test_bad_values(sd, change, message):
    with pytest.raises(ValueError, match=message):
        HighResPipeline(sd)(**dict(prompt="fox", height=64, width=32, native_steps=1, steps=1) | change)


@pytest.mark.parametrize(
    "name, config, steps, message",
    [
        ("DPMSolverMultistepScheduler", dict(num_train_timesteps=20), 20, "NaN in 20 steps"),
        ("DEISMultistepScheduler", dict(num_train_timesteps=20), 20, "NaN in 20 steps"),
        ("LCMScheduler", {}, 60, "LCMScheduler cannot make 60 steps"),
    ],
)
def test_steps_of_a_later_stage_that_cannot_be_made(sd, monkeypatch, name, config, steps, message):
    scheduler = getattr(diffusers, name).from_config(sd.scheduler.config, **config)
    pipe = type(sd)(**sd.components | {"scheduler": scheduler}, requires_safety_checker=False)
    monkeypatch.setattr(pipe.unet, "forward", lambda *_, **__: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=message):
        HighResPipeline(pipe)("fox", 24, 24, native_steps=2, steps=steps)


def test_numbers_of_numpy(sd, tmp_path):
    call = dict(native_steps=np.int64(2), steps=np.int32(4), strengths=np.float32(0.5), seed=np.int64(3))
    call |= dict(guidance_scale=np.float32(2), blend=np.float64(3), dilation=np.float32(1), memory_mib=np.int64(4096))
    result = HighResPipeline(sd)("fox", np.int64(24), np.int32(24), **call, workdir=tmp_path, output_type="np")
    assert result.images.shape == (1, 24, 24, 3) and result.seed == 3


def test_bad_kinds(sd):
    high = HighResPipeline(sd)
    for change, message in (
        (dict(prompt=["fox", "owl"]), "one text"),
        (dict(prompt=None), "one text"),
        (dict(negative_prompt=["owl"]), "negative_prompt"),
        (dict(image="x"), r"option image"),
        (dict(vae_tiling="auto"), "vae_tiling.*'auto'"),
    ):
        with pytest.raises(TypeError, match=message):
            high(**dict(prompt="fox", height=64, width=32) | change)
    with pytest.raises(TypeError, match=r"StableDiffusionPipeline .*UNet2DConditionModel"):
        HighResPipeline(sd.unet)
    with pytest.raises(ValueError, match=r"UNet.* 9 .*VAE.* 4"):
        HighResPipeline(tiny_sd(in_channels=9))
    with pytest.raises(ValueError, match="no sample_size"):
        HighResPipeline(tiny_sd(sample_size=None))
    with pytest.raises(TypeError, match="option image"):
        high.plan(64, 32, image="x")


@pytest.mark.parametrize(
    "name", ["HeunDiscreteScheduler", "UniPCMultistepScheduler", "PNDMScheduler", "FlowMatchEulerDiscreteScheduler"]
)
def test_schedulers_that_cannot_run_stages(sd, name):
    kind = getattr(diffusers, name)
    scheduler = kind() if name.startswith("Flow") else kind.from_config(sd.scheduler.config)
    pipe = diffusers.StableDiffusionPipeline(**sd.components | {"scheduler": scheduler}, requires_safety_checker=False)
    with pytest.raises(ValueError, match=f"{name} cannot run"):
        HighResPipeline(pipe)


def test_a_scheduler_for_flow_matching_by_its_settings(sd):
    kind = diffusers.DPMSolverMultistepScheduler
    scheduler = kind.from_config(sd.scheduler.config, use_flow_sigmas=True)
    pipe = type(sd)(**sd.components | {"scheduler": scheduler}, requires_safety_checker=False)
    with pytest.raises(ValueError, match="use_flow_sigmas"):
        HighResPipeline(pipe)


def test_latents_that_are_not_finite_are_told_of():
    pipe = tiny_sd()
    with torch.no_grad():
        pipe.unet.conv_out.bias[0] = float("nan")
    with pytest.raises(RuntimeError, match=r"finite.*stage 1 \(16x16\)"):
        HighResPipeline(pipe)("fox", 24, 24, **FEW)
