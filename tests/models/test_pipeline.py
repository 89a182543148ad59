"""From noise to images: guidance, schedulers, sizes, seeds, what does not fit together, saving and loading."""

import copy

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiTTransformer2DModel, DPMSolverMultistepScheduler
from helpers.diffusion import ddpm, lively, tiny_generator, tiny_vae

from gspn.models.generator import create_generator
from gspn.models.pipeline import GSPNPipeline

SCHEDULERS = (
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
)


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pixels():
    return quiet(GSPNPipeline(tiny_generator(), ddpm(), id2label={0: "red fox, Vulpes", 1: "owl", 2: "crane"}))


@pytest.fixture(scope="module")
def latents():
    return quiet(GSPNPipeline(tiny_generator(in_channels=4), ddpm(), tiny_vae(scaling_factor=0.5, shift_factor=0.25)))


class Recorded:
    """A scheduler's step, and what it was given."""

    def __init__(self, scheduler):
        self.inner, self.outputs, scheduler.step = scheduler.step, [], self

    def __call__(self, output, t, sample, generator=None, **more):
        self.outputs.append(output)
        return self.inner(output, t, sample, generator=generator, **more)


# -- what a call computes --


def test_a_step_is_guided_on_all_channels_with_the_conditional_variance(latents):
    model, classes, noise = latents.transformer, [4, 0], torch.randn(2, 4, 4, 6)
    pipeline = quiet(GSPNPipeline(model, ddpm()))
    step = Recorded(pipeline.scheduler)
    pipeline(classes, 3.0, 1, latents=noise, output_type="latent", generator=seeds(1, 2))
    t = pipeline.scheduler.timesteps[:1].expand(2)
    with torch.no_grad():
        conditional = model(noise, t, torch.tensor(classes)).sample
        free = model(noise, t, torch.tensor([5, 5])).sample
    guided = free[:, :4] + 3.0 * (conditional[:, :4] - free[:, :4])
    torch.testing.assert_close(step.outputs[0], torch.cat([guided, conditional[:, 4:]], 1))
    assert (conditional - free).abs().amax((0, 2, 3)).min() > 1e-3  # each channel would show it


def test_without_guidance_the_model_runs_once(pixels):
    sizes = []
    handle = pixels.transformer.register_forward_pre_hook(
        lambda m, args, kw: sizes.append(len(args[0])), with_kwargs=True
    )
    try:
        for scale, sequential in ((1, False), (2, False), (2, True)):
            pixels([0, 1, 2], scale, 1, generator=seeds(0, 1, 2), output_type="pt", sequential_guidance=sequential)
    finally:
        handle.remove()
    assert sizes == [3, 6, 3, 3]


def test_the_two_ways_of_guidance_agree_and_guidance_counts(pixels):
    images = [
        pixels([0, 1], scale, 4, generator=seeds(3, 4), output_type="pt", sequential_guidance=sequential).images
        for scale, sequential in ((2.5, False), (2.5, True), (1, False))
    ]
    # the first step divides by sqrt(4e-5) what guidance makes, 4 times as uncertain, of predictions good to 3e-7: 2e-4
    torch.testing.assert_close(images[0], images[1], atol=1e-3, rtol=0)
    assert (images[0] - images[2]).abs().max() > 0.05


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(latents, name):
    """Of four latent channels: told of a learned variance, some of them would cut the prediction to three."""
    scheduler = getattr(diffusers, name).from_config(latents.scheduler.config)
    pipeline = quiet(GSPNPipeline(latents.transformer, scheduler))
    images = pipeline([1, 2], 1.5, 4, 8, 12, generator=seeds(0, 1), output_type="latent").images
    other = pipeline([1, 2], 1.5, 4, 8, 12, generator=seeds(0, 2), output_type="latent").images
    assert images.shape == (2, 4, 8, 12) and images.isfinite().all()
    torch.testing.assert_close(images[0], other[0], atol=1e-4, rtol=1e-4)
    assert (images[1] - other[1]).abs().max() > 0.1
    assert pipeline.scheduler is scheduler and scheduler.config.variance_type == "learned_range"  # left as it was


def test_ddpm_takes_the_learned_variance_and_others_the_prediction_alone(latents):
    for scheduler, channels in ((ddpm(), 8), (ddpm(variance_type="fixed_small"), 4), (DDIMScheduler(), 4)):
        pipeline = quiet(GSPNPipeline(latents.transformer, scheduler))
        step = Recorded(pipeline.scheduler)
        pipeline([0], 2.0, 1, output_type="latent")
        assert step.outputs[0].shape[1] == channels


def test_it_does_what_ddim_and_the_model_do_step_by_step(pixels):
    scheduler, noise = DDIMScheduler(clip_sample=False), torch.randn(1, 3, 8, 8)
    pipeline = quiet(GSPNPipeline(pixels.transformer, scheduler))
    result = pipeline([2], 1.0, 5, latents=noise, output_type="latent").images
    x, product = noise.clone(), scheduler.alphas_cumprod
    for t in (800, 600, 400, 200, 0):
        with torch.no_grad():
            epsilon = pixels.transformer(x, torch.tensor([t]), torch.tensor([2])).sample[:, :3]
        start = (x - (1 - product[t]).sqrt() * epsilon) / product[t].sqrt()
        before = product[t - 200] if t else torch.tensor(1.0)
        before = before if t else scheduler.final_alpha_cumprod
        x = before.sqrt() * start + (1 - before).sqrt() * epsilon
    torch.testing.assert_close(result, x, atol=1e-4, rtol=1e-4)


def test_it_does_what_euler_and_the_model_do_step_by_step(pixels):
    """Whose map is scaled: at the beginning, and before it goes into the model."""
    scheduler, noise = diffusers.EulerDiscreteScheduler(), torch.randn(1, 3, 8, 8)
    pipeline = quiet(GSPNPipeline(pixels.transformer, scheduler))
    result = pipeline([2], 1.0, 4, latents=noise, output_type="latent").images
    sigmas = scheduler.sigmas
    x = noise * sigmas[0]
    for t, sigma, following in zip(scheduler.timesteps, sigmas, sigmas[1:], strict=False):
        with torch.no_grad():
            epsilon = pixels.transformer(x / (sigma**2 + 1).sqrt(), t[None], torch.tensor([2])).sample[:, :3]
        x = x + (following - sigma) * epsilon
    assert sigmas[0] > 100 and scheduler.config.timestep_spacing == "linspace"
    torch.testing.assert_close(result, x, atol=1e-3, rtol=1e-4)


def test_from_an_image_it_enlarges_adds_noise_and_runs_the_last_steps(pixels):
    scheduler, small = DDIMScheduler(clip_sample=False), torch.rand(1, 3, 6, 6)
    pipeline, seen = quiet(GSPNPipeline(pixels.transformer, scheduler)), []
    call = dict(num_inference_steps=5, height=8, width=12, output_type="latent", image=small, generator=seeds(3))
    result = pipeline([2], 1.0, **call, strength=0.4, callback_on_step_end=lambda p, i, t, tensors: seen.append(int(t)))
    assert seen == [200, 0]
    product = scheduler.alphas_cumprod
    x = torch.nn.functional.interpolate(small, (8, 12), mode="bicubic", antialias=True)
    noise = torch.randn(1, 3, 8, 12, generator=seeds(3)[0])
    x = product[200].sqrt() * (2 * x.clamp(0, 1) - 1) + (1 - product[200]).sqrt() * noise
    for t, before in ((200, product[0]), (0, scheduler.final_alpha_cumprod)):
        with torch.no_grad():
            epsilon = pixels.transformer(x, torch.tensor([t]), torch.tensor([2])).sample[:, :3]
        x = before.sqrt() * (x - (1 - product[t]).sqrt() * epsilon) / product[t].sqrt() + (1 - before).sqrt() * epsilon
    torch.testing.assert_close(result.images, x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", sorted({*SCHEDULERS} - {"PNDMScheduler", "LMSDiscreteScheduler"}))
def test_schedulers_that_start_from_an_image(latents, name, monkeypatch):
    """A model that knows the image leads back to it."""
    scheduler = getattr(diffusers, name)()
    if "clip_sample" in scheduler.config:
        scheduler.register_to_config(clip_sample=False)
    pipeline = quiet(GSPNPipeline(latents.transformer, scheduler, latents.vae))
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    start, product, steps = pipeline._encode(image, (1, 4, 8, 8)), scheduler.alphas_cumprod, []

    def knows(x, timestep, **more):
        steps.append(int(timestep[0]))
        signal = product[steps[-1]]
        return ((x - signal.sqrt() * start) / (1 - signal).sqrt(),)

    monkeypatch.setattr(latents.transformer, "forward", knows)
    result = pipeline([1], 1.0, 20, height=16, width=16, image=image, strength=0.5, output_type="latent").images
    assert 400 < max(steps) < 600 and len(set(steps)) == 10
    assert (result - start).square().mean().sqrt() < 0.1 * start.std()


def test_an_image_does_not_depend_on_its_batch(pixels):
    together = pixels([3, 0, 1], 2.0, 3, 8, 16, generator=seeds(7, 8, 9), output_type="pt").images
    for place, (label, seed) in enumerate(((3, 7), (0, 8), (1, 9))):
        alone = pixels([label], 2.0, 3, 8, 16, generator=seeds(seed), output_type="pt").images
        torch.testing.assert_close(alone[0], together[place], atol=1e-3, rtol=0)  # as for the two ways of guidance


def test_latents_are_decoded_as_the_vae_wants_them(latents):
    call = dict(class_labels=[1, 4], guidance_scale=1.0, num_inference_steps=2, height=16, width=24)
    z = latents(**call, generator=seeds(0, 1), output_type="latent").images
    images = latents(**call, generator=seeds(0, 1), output_type="pt").images
    with torch.no_grad():
        expected = (latents.vae.decode(z / 0.5 + 0.25).sample / 2 + 0.5).clamp(0, 1)
    assert z.shape == (2, 4, 8, 12) and images.shape == (2, 3, 16, 24)
    torch.testing.assert_close(images, expected)


def test_output_types_and_default_sizes(pixels):
    call = dict(class_labels="owl", guidance_scale=1, num_inference_steps=2)
    tensor = pixels(**call, generator=seeds(5), output_type="pt").images
    array = pixels(**call, generator=seeds(5), output_type="np").images
    (image,) = pixels(**call, generator=seeds(5)).images
    assert tensor.shape == (1, 3, 8, 8) and array.shape == (1, 8, 8, 3) and 0 <= array.min() and array.max() <= 1
    np.testing.assert_array_equal(array[0], tensor[0].permute(1, 2, 0).numpy())
    np.testing.assert_array_equal(np.asarray(image), (array[0] * 255).round().astype(np.uint8))
    assert pixels(**call, generator=seeds(5), return_dict=False)[0][0].tobytes() == image.tobytes()
    grey = quiet(GSPNPipeline(tiny_generator(in_channels=1), ddpm(), image_size=(8, 12)))
    (image,) = grey(**call | {"class_labels": 0}).images
    assert image.mode == "L" and image.size == (12, 8)


def test_labels_are_not_dropped_and_the_mode_of_the_model_stays():
    model = tiny_generator(class_dropout_prob=0.9).train()
    pipeline = quiet(GSPNPipeline(model, ddpm()))
    images = [pipeline([1] * 4, 1.0, 2, generator=seeds(*range(4)), output_type="pt").images for _ in range(2)]
    assert torch.equal(*images) and model.training
    model.blocks[0].eval()  # frozen
    pipeline([1], 1.0, 2, output_type="latent")
    assert model.training and model.blocks[1].training and not any(part.training for part in model.blocks[0].modules())
    model.eval()
    assert torch.equal(images[0], pipeline([1] * 4, 1.0, 2, generator=seeds(*range(4)), output_type="pt").images)
    assert not model.training


def test_a_model_in_bfloat16(pixels):
    pipeline = quiet(GSPNPipeline(copy.deepcopy(pixels.transformer).to(torch.bfloat16), DDIMScheduler()))
    half = pipeline([0], 1.0, 5, generator=seeds(0), output_type="latent").images
    full = quiet(GSPNPipeline(pixels.transformer, DDIMScheduler()))
    full = full([0], 1.0, 5, generator=seeds(0), output_type="latent").images
    assert half.dtype == torch.float32 and 0 < (half - full).abs().max() < 0.1


def test_callback_sees_each_step_and_may_change_the_map(pixels):
    seen = []

    def callback(pipeline, i, t, tensors):
        seen.append((i, int(t), tuple(tensors["latents"].shape)))
        return {"latents": torch.zeros_like(tensors["latents"]) if i == 2 else None}

    images = pixels([0], 1.0, 3, generator=tuple(seeds(0)), output_type="pt", callback_on_step_end=callback).images
    assert seen == [(i, t, (1, 3, 8, 8)) for i, t in enumerate((666, 333, 0))]
    assert torch.equal(images, torch.full_like(images, 0.5))
    pixels([0], 1.0, 1, callback_on_step_end=lambda *told: seen.append(told[3]), callback_on_step_end_tensor_inputs=())
    assert seen[3:] == [{}]


def test_progress_bar(pixels, capsys):
    bar = GSPNPipeline(pixels.transformer, ddpm())
    bar([0], 1.0, 3)
    assert "3/3" in capsys.readouterr().err


# -- classes --


def test_classes_by_number_and_name(pixels):
    assert pixels.get_label_ids(["owl", 4, "Vulpes", "red fox, Vulpes"]) == [1, 4, 0, 0]
    assert pixels.get_label_ids(torch.tensor([3, 2])) == [3, 2] and pixels.get_label_ids(np.int64(3)) == [3]
    twice = GSPNPipeline(pixels.transformer, ddpm(), id2label={0: "crane", 1: "crane, bird", 3: "crane, machine"})
    assert twice.get_label_ids(["crane", "bird"]) == [0, 1]  # the whole name comes first
    twice = GSPNPipeline(pixels.transformer, ddpm(), id2label={1: "crane, bird", 3: "crane, machine"})
    with pytest.raises(ValueError, match=r"\[1, 3\].*'crane'"):
        twice.get_label_ids("crane")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (5, "0 to 4.*5"),
        ([0, -1], "0 to 4.*-1"),
        ("dog", "'dog'.*'red fox, Vulpes', 'owl', 'crane'"),
        ([1.5], r"number.*name.*1\.5"),
        ([True], "number.*name.*True"),
        (None, "number.*name.*None"),
        ([], "at least one class"),
    ],
)
def test_classes_that_are_none(pixels, labels, message):
    with pytest.raises(ValueError, match=message):
        pixels(labels)


# -- arguments that do not fit together: refused before any work --


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(guidance_scale=-1), "guidance_scale.*0.*-1"),
        (dict(guidance_scale=float("nan")), "guidance_scale.*nan"),
        (dict(num_inference_steps=0), "num_inference_steps.*1 to 1000.*0"),
        (dict(num_inference_steps=1001), "num_inference_steps.*1 to 1000.*1001"),
        (dict(num_inference_steps=2.0), r"num_inference_steps.*2\.0"),
        (dict(height=9, width=8), "multiples of 2.*9x8"),
        (dict(height=8, width=0), "8x0"),
        (dict(height=8), "height.*width.*8 and None"),
        (dict(latents=torch.zeros(1, 4, 8, 8)), r"latents.*\(1, 3, 8, 8\).*\(1, 4, 8, 8\)"),
        (dict(latents=torch.zeros(1, 3, 8, 8), height=8, width=10), r"latents.*\(1, 3, 8, 10\)"),
        (dict(output_type="jpeg"), "pil, np, pt, latent.*'jpeg'"),
        (dict(latents=np.zeros((1, 3, 8, 8))), r"latents.*tensor \(1,3,h,w\), got ndarray"),
        (dict(latents=torch.zeros(3, 8, 8)), r"latents.*tensor \(1,3,h,w\), got \(3, 8, 8\)"),
        (dict(generator=tuple(seeds(1, 2))), "generator.*1 image.*2"),
        (dict(generator=[7]), r"generator has to be a torch.Generator, or a list .*got \[7\]"),
        (dict(callback_on_step_end_tensor_inputs=["noise"]), "callback.*latents.*noise"),
        (dict(image=torch.zeros(2, 3, 4, 4)), r"image.*\(1,3,H,W\).*\(2, 3, 4, 4\)"),
        (dict(image="photo.png"), "image.*got str"),
        (dict(image=torch.full((1, 3, 4, 4), 2.0)), "values from 0 to 1"),
        (dict(image=torch.zeros(1, 3, 4, 4), strength=0.0), "strength.*above 0.*0.0"),
        (dict(image=torch.zeros(1, 3, 4, 4), strength=0.1, num_inference_steps=2), "=0.1 of 2 steps is no step"),
        (dict(image=torch.zeros(1, 3, 4, 4), latents=torch.zeros(1, 3, 8, 8)), "image and latents"),
        (dict(timestep_shift=0.5), "timestep_shift.*at least 1, got 0.5"),
        (dict(timestep_shift=float("nan")), "timestep_shift.*nan"),
        (dict(guidance_interval=0.5), "guidance_interval has to be two numbers.*got 0.5"),
        (dict(guidance_interval=(0.8, 0.2)), "the lower first, got .0.8, 0.2."),
        (dict(guidance_interval=(0, 2)), "from 0 to 1.*got .0, 2."),
    ],
)
def test_bad_arguments(pixels, arguments, message, monkeypatch):
    monkeypatch.setattr(pixels.transformer, "forward", lambda *_, **__: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=message):
        pixels([0], **arguments)


def test_guidance_in_an_interval_and_shifted_timesteps(pixels):
    """The model is asked twice only where the timestep lies in the interval; images are those of a loop by hand."""
    pipeline, seen = GSPNPipeline(pixels.transformer, DDPMScheduler()), []
    pipeline.set_progress_bar_config(disable=True)
    call = dict(num_inference_steps=5, latents=torch.randn(1, 3, 8, 8), output_type="latent")
    hook = pixels.transformer.register_forward_pre_hook(
        lambda _, given, named: seen.append((int(named["timestep"][0]), len(given[0]))), with_kwargs=True
    )
    pipeline([1], 3.0, guidance_interval=(0.2, 0.6), **call)
    assert seen == [(800, 1), (600, 2), (400, 2), (200, 2), (0, 1)]
    seen.clear()
    shifted = pipeline([1], 3.0, timestep_shift=2.0, generator=torch.Generator().manual_seed(0), **call).images
    hook.remove()
    timesteps = [t for t, _ in seen]
    assert timesteps[0] == 800 and all(t > own for t, own in zip(timesteps[1:], (600, 400, 200, 0), strict=True))
    scheduler, latents, generator = DDPMScheduler(), call["latents"], torch.Generator().manual_seed(0)
    scheduler.set_timesteps(timesteps=timesteps)
    for t in timesteps:
        with torch.no_grad():
            both = pixels.transformer(
                latents.repeat(2, 1, 1, 1), timestep=torch.tensor([t, t]), class_labels=torch.tensor([1, 5])
            ).sample[:, :3]
        latents = scheduler.step(both[1:] + 3 * (both[:1] - both[1:]), t, latents, generator=generator).prev_sample
    torch.testing.assert_close(shifted, latents)


def test_numbers_of_numpy_and_no_booleans(pixels):
    call = dict(num_inference_steps=np.int64(2), height=np.int32(8), width=np.int64(12), output_type="np")
    call |= dict(guidance_scale=np.float32(2), dilation=np.int64(1), dilate_from=np.float32(0.5))
    assert pixels([np.int64(0)], **call).images.shape == (1, 8, 12, 3)
    for change in (dict(guidance_scale=True), dict(height=True), dict(num_inference_steps=True)):
        with pytest.raises(ValueError, match="True"):
            pixels.check_inputs([0], **dict(height=8, width=8) | change)


def test_a_scheduler_that_has_to_start_at_noise(pixels):
    pipeline = GSPNPipeline(pixels.transformer, diffusers.PNDMScheduler())
    with pytest.raises(ValueError, match="PNDMScheduler cannot start from an image: expected DDPM"):
        pipeline([0], image=torch.zeros(1, 3, 4, 4))


def test_a_size_counts_in_pixels_of_the_image(latents):
    with pytest.raises(ValueError, match=r"multiples of 4.*18x16"):
        latents([0], height=18, width=16)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (DDIMScheduler(prediction_type="v_prediction"), "'epsilon'.*DDIMScheduler.*'v_prediction'"),
        (diffusers.FlowMatchEulerDiscreteScheduler(), "FlowMatchEulerDiscreteScheduler.*timesteps"),
        (DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True), "use_flow_sigmas"),
        (diffusers.EDMEulerScheduler(), "EDMEulerScheduler.*timesteps"),
    ],
)
def test_schedulers_for_something_else(pixels, scheduler, message):
    with pytest.raises(ValueError, match=message):
        GSPNPipeline(pixels.transformer, scheduler)([0], num_inference_steps=2)


@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
def test_schedulers_that_do_not_take_the_prediction_are_refused_before_any_work(monkeypatch, prediction):
    model = tiny_generator(prediction_type=prediction)
    own, refused = ddpm(prediction_type=prediction), set()
    for name in (*SCHEDULERS, "KDPM2DiscreteScheduler"):
        pipeline = quiet(GSPNPipeline(model, getattr(diffusers, name).from_config(own.config)))
        state = torch.get_rng_state()
        try:
            pipeline.check_inputs([0], num_inference_steps=4)
        except ValueError as error:
            assert name in str(error) and repr(prediction) in str(error)
            refused.add(name)
            with monkeypatch.context() as patch, pytest.raises(ValueError, match=f"{name}.*steps.*{prediction!r}"):
                patch.setattr(model, "forward", lambda *_, **__: pytest.fail("work was done"))
                pipeline([0], num_inference_steps=4)
        else:
            assert torch.equal(state, torch.get_rng_state())
            assert np.isfinite(pipeline([0], num_inference_steps=4, output_type="np").images).all()
    of_sample = {"EulerAncestralDiscreteScheduler", "PNDMScheduler", "KDPM2DiscreteScheduler"}
    assert refused == (of_sample if prediction == "sample" else set())


def test_models_for_something_else():
    v = quiet(GSPNPipeline(tiny_generator(prediction_type="v_prediction"), DDIMScheduler()))
    with pytest.raises(ValueError, match=r"'v_prediction'.*DDIMScheduler.*'epsilon'"):
        v([0])
    v.scheduler = DDIMScheduler.from_config(v.scheduler.config, prediction_type="v_prediction")
    assert np.isfinite(v([0], num_inference_steps=2, output_type="np").images).all()
    plain = quiet(GSPNPipeline(tiny_generator(learn_sigma=False), ddpm()))
    with pytest.raises(ValueError, match=r"learned variance.*fixed_small"):
        plain([0])
    plain.scheduler = DDPMScheduler.from_config(plain.scheduler.config, variance_type="fixed_small")
    assert np.isfinite(plain([0], num_inference_steps=2, output_type="np").images).all()
    unguided = quiet(GSPNPipeline(tiny_generator(class_dropout_prob=0.0), ddpm()))
    with pytest.raises(ValueError, match=r"null class.*guidance_scale.*4\.0"):
        unguided([0])
    assert len(unguided([4], 1.0, 2).images) == 1
    with pytest.raises(ValueError, match=r"VAE.*4.*model.*3"):
        GSPNPipeline(tiny_generator(), ddpm(), tiny_vae())([0])
    with pytest.raises(ValueError, match=r"4 channels.*vae"):
        GSPNPipeline(tiny_generator(in_channels=4), ddpm())([0])
    with pytest.raises(ValueError, match=r"id2label.*7.*0 to 4"):
        GSPNPipeline(tiny_generator(), ddpm(), id2label={7: "seven"})


# -- DiT, saving and loading --


@pytest.fixture(scope="module")
def dit():
    torch.manual_seed(0)
    config = dict(num_attention_heads=2, attention_head_dim=8, num_layers=1, num_embeds_ada_norm=5, sample_size=8)
    model = DiTTransformer2DModel(**config, in_channels=3, out_channels=6)
    for block in model.transformer_blocks:
        torch.nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight)
    return model.eval()


def test_dit(dit):
    pipeline = quiet(GSPNPipeline(dit, ddpm()))
    noise = torch.randn(2, 3, 12, 12)
    call = dict(class_labels=[0, 4], num_inference_steps=3, latents=noise, output_type="pt")
    images = [pipeline(**call, generator=seeds(0, 1), guidance_scale=scale).images for scale in (1.0, 3.0)]
    assert images[0].shape == (2, 3, 12, 12) and (images[0] - images[1]).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"square.*8x12"):
        pipeline([0], height=8, width=12)
    with pytest.raises(ValueError, match=r"0 to 4.*5"):
        pipeline([5])


def test_a_compiled_model_is_known_as_what_it_is(dit):
    with pytest.raises(ValueError, match=r"square.*8x12"):
        GSPNPipeline(torch.compile(dit), ddpm()).check_inputs([0], height=8, width=12)
    with pytest.raises(ValueError, match=r"dilation=2.*got a DiTTransformer2DModel"):
        GSPNPipeline(torch.compile(dit), ddpm()).check_inputs([0], dilation=2)
    ours = create_generator("GSPN-DiT-micro/2", num_classes=5, sample_size=8, in_channels=3)
    GSPNPipeline(torch.compile(ours), ddpm()).check_inputs([0], dilation=2)


def test_a_saved_pipeline_makes_the_same_images(tmp_path, latents):
    names = {number: f"class {number}" for number in range(5)}
    pipeline = quiet(GSPNPipeline(latents.transformer, ddpm(), latents.vae, names, image_size=(16, 24)))
    pipeline.save_pretrained(tmp_path / "all")
    loaded = quiet(GSPNPipeline.from_pretrained(tmp_path / "all"))
    assert loaded.id2label == names and loaded.image_size == (16, 24) and not loaded.transformer.training
    images = [p(["class 3"], 2.0, 2, generator=seeds(0), output_type="pt").images for p in (pipeline, loaded)]
    assert images[0].shape == (1, 3, 16, 24) and torch.equal(*images)
    assert loaded.components.keys() == {"transformer", "scheduler", "vae"}
    quiet(GSPNPipeline(latents.transformer, ddpm())).save_pretrained(tmp_path / "pixels")
    loaded = GSPNPipeline.from_pretrained(tmp_path / "pixels")
    assert loaded.vae is None and loaded.id2label == {} and loaded.image_size is None


def test_it_reads_what_the_pipeline_of_dit_saved(tmp_path):
    model = lively(tiny_generator(in_channels=4))
    diffusers.DiTPipeline(model, tiny_vae(), DDIMScheduler()).save_pretrained(tmp_path)
    loaded = quiet(GSPNPipeline.from_pretrained(tmp_path))
    assert loaded([0], num_inference_steps=2, output_type="pt").images.shape == (1, 3, 16, 16)


def test_offload_order(latents):
    """What enable_model_cpu_offload goes by: all models of the pipeline, in the order of their use."""
    order = latents.model_cpu_offload_seq.split("->")
    models = {name for name, part in latents.components.items() if isinstance(part, torch.nn.Module)}
    assert order == ["transformer", "vae"] and set(order) == models
