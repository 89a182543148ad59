"""What all pipelines share: schedules that end in pure noise, a VAE's scale, values that are not finite."""

import hashlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

import diffusers
from diffusers import DDIMScheduler, DDPMScheduler
from helpers.diffusion import ddpm, generator_run, tiny_generator, tiny_vae
from helpers.encoding import SIZE, make_vae
from helpers.stable_diffusion import ddim, tiny_sd, tiny_sdxl
from typer.testing import CliRunner

from gspn.cli import app
from gspn.data.images import Preprocessing
from gspn.data.latents import make_latent_loader
from gspn.models.latents import NotFiniteError, check_finite, check_scale, scale_latents, unscale_latents
from gspn.models.pipeline import GSPNPipeline
from gspn.options import OptionError
from gspn.options.diffusion import GeneratorOptions
from gspn.options.distill import DistillOptions
from gspn.options.generators import SampleOptions
from gspn.sampling.encode import encode
from gspn.sampling.generators import load_pipeline
from gspn.sampling.sample import sample
from gspn.sampling.vae import check_vae, describe_vae
from gspn.stable_diffusion.highres import HighResPipeline
from gspn.tasks.diffusion import Samples
from gspn.tasks.side_by_side import SideBySide
from gspn.tasks.text_to_image import TextToImage
from gspn.train.loop import TrainingError

STATISTICS = dict(latents_mean=(0.5, -1.0, 0.0, 2.0), latents_std=(1.0, 2.0, 0.5, 3.0), scaling_factor=0.5)


def pipeline(model=None, scheduler=None, vae=None):
    made = GSPNPipeline(model or tiny_generator(), scheduler or ddpm(), vae)
    made.set_progress_bar_config(disable=True)
    return made


def nan_in(module):
    """Makes all that the module, the last of a model, gives NaN."""
    with torch.no_grad():
        module.bias.fill_(float("nan"))


# -- schedules --

TO_NOISE = dict(rescale_betas_zero_snr=True, timestep_spacing="trailing")


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(**TO_NOISE),
        DDPMScheduler(variance_type="learned_range", **TO_NOISE),
        DDIMScheduler(trained_betas=np.linspace(0.1, 1, 10)),
        diffusers.PNDMScheduler(trained_betas=np.linspace(0.1, 1, 10)),
    ],
    ids=["DDIM", "DDPM", "DDIM betas", "PNDM betas"],
)
def test_noise_predicted_at_a_step_of_noise_alone_is_refused_before_any_work(scheduler, monkeypatch):
    refused = pipeline(scheduler=scheduler)
    monkeypatch.setattr(refused.transformer, "forward", lambda *_, **__: pytest.fail("work was done"))
    message = rf"{type(scheduler).__name__}.* 'epsilon'.*alphas_cumprod is 0.*rescale_betas_zero_snr=False"
    with pytest.raises(ValueError, match=message):
        refused([0], num_inference_steps=4)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_other_predictions_may_begin_at_noise_alone(prediction):
    scheduler = DDIMScheduler(prediction_type=prediction, **TO_NOISE)
    allowed = pipeline(tiny_generator(prediction_type=prediction), scheduler)
    images = allowed([0], num_inference_steps=4, output_type="np").images
    assert int(scheduler.timesteps[0]) == 999 and float(scheduler.alphas_cumprod[999]) == 0
    assert np.isfinite(images).all()


def test_such_a_schedule_is_refused_by_the_command_and_by_the_pipelines_of_stable_diffusion(tmp_path):
    run, _ = generator_run(tmp_path / "run", scheduler=ddpm(**TO_NOISE))
    result = CliRunner().invoke(app, ["sample", str(run.path), "--out", str(tmp_path / "a"), "--scheduler", "ddim"])
    assert result.exit_code == 2 and "alphas_cumprod is 0" in result.stderr and not (tmp_path / "a").exists()
    pipe = tiny_sd(scheduler=ddim(**TO_NOISE))
    with pytest.raises(ValueError, match="alphas_cumprod is 0"):
        HighResPipeline(pipe)
    with pytest.raises(OptionError, match=r"here.*alphas_cumprod is 0"):
        TextToImage(pipe, "here")
    HighResPipeline(tiny_sd(scheduler=ddim(prediction_type="v_prediction", **TO_NOISE)))


@pytest.mark.parametrize("eta", [-1, 5, "a", None])
def test_eta_is_from_0_to_1(eta):
    for asked in (lambda: pipeline(scheduler=DDIMScheduler()).check_inputs([0], eta=eta), lambda: high(eta=eta)):
        with pytest.raises(ValueError, match=f"eta has to be a number from 0 to 1, got {eta!r}"):
            asked()


def test_eta_is_for_schedulers_that_take_it():
    takes_none = DDPMScheduler.from_config(ddim().config)
    for asked in (lambda: pipeline().check_inputs([0], eta=0.5), lambda: high(takes_none, eta=np.float32(0.5))):
        with pytest.raises(ValueError, match=r"DDPMScheduler takes no eta, got 0\.5: .*DDIMScheduler"):
            asked()
    pipeline(scheduler=DDIMScheduler()).check_inputs([0], eta=1)
    high(eta=1)


def high(scheduler=None, **options):
    return HighResPipeline(tiny_sd(scheduler=scheduler)).plan(16, 16, **options)


# -- values that are not finite --


def test_values_that_are_not_finite_are_counted():
    values = torch.zeros(3, 2, 4)
    check_finite(values)
    values[1, 0, :3], values[2, 1, 1] = float("nan"), float("-inf")
    for given in (values, values.numpy()):
        with pytest.raises(NotFiniteError, match=r"^4 of 24 .*2 of 3 .*: why$") as told:
            check_finite(given, ": why")
        assert told.value.images == [1, 2]


@pytest.mark.parametrize("kind", ["pil", "np", "pt"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_pipeline_makes_no_images_of_them(kind, value):
    def broken(pipeline, i, t, tensors):
        tensors["latents"][1, 0, :2, 0] = value
        return tensors

    call = dict(class_labels=[0, 1], guidance_scale=1, num_inference_steps=1, callback_on_step_end=broken)
    with pytest.raises(NotFiniteError, match=r"2 of 384 .*1 of 2 "):
        pipeline()(**call, output_type=kind)
    assert not pipeline()(**call, output_type="latent").images.isfinite().all()  # the map is given as it is


def test_a_vae_that_overflows_is_told_of():
    vae = tiny_vae()
    nan_in(vae.decoder.conv_out)
    with pytest.raises(NotFiniteError, match="1536 of 1536 values"):
        pipeline(tiny_generator(in_channels=4), vae=vae)([0, 1], 1, 1)
    pipe = tiny_sd()
    nan_in(pipe.vae.decoder.conv_out)
    with pytest.raises(NotFiniteError, match=r"768 of 768 .*1 of 1 "):
        HighResPipeline(pipe)("fox", 24, 24, native_steps=2, steps=2)


def test_samples_of_a_training_that_are_not_finite_end_it(tmp_path):
    model = tiny_generator(prediction_type="v_prediction")
    nan_in(model.proj_out)
    options = GeneratorOptions(
        size=(8, 8), epochs=1, sample_every=1, sample_steps=2, class_dropout=0.0, guidance=1.0, seed=0
    )
    setup = SimpleNamespace(
        options=options,
        class_names=["a", "b"],
        preprocessing=Preprocessing(3, (8, 8), (0.5,) * 3, (0.5,) * 3),
        scheduler=lambda: ddpm(prediction_type="v_prediction"),
    )
    with pytest.raises(TrainingError, match=r"epoch 1 .*not finite.*--sample-every 0"):
        Samples(setup, tmp_path)(model, 1)
    assert not list(tmp_path.iterdir())


def test_samples_of_a_distillation_that_are_not_finite_end_it(tmp_path):
    pipe = tiny_sd()
    nan_in(pipe.vae.decoder.conv_out)
    student = SimpleNamespace(teacher=SimpleNamespace(pipe=pipe), swap=SimpleNamespace(use=lambda name: pipe.unet))
    student.swap.use = lambda name: torch.no_grad()
    draw = SideBySide(student, [("fox",)], DistillOptions(size=(16, 16), epochs=1, sample_steps=2, seed=0), tmp_path)
    with pytest.raises(TrainingError, match=r"epoch 1 .*768 of 768 .*--sample-every 0"):
        draw(1)
    assert not list(tmp_path.iterdir())


# -- the scale of latents --


def test_latents_are_scaled_as_diffusers_does_it():
    torch.manual_seed(0)
    z = torch.randn(2, 4, 3, 5)
    vae = {**STATISTICS, "latent_channels": 4}
    x = scale_latents(z, vae)
    for channel, (mean, std) in enumerate(zip(STATISTICS["latents_mean"], STATISTICS["latents_std"], strict=True)):
        torch.testing.assert_close(x[:, channel], (z[:, channel] - mean) * 0.5 / std)
    torch.testing.assert_close(unscale_latents(x, vae), z)
    shifted = {"scaling_factor": 0.5, "shift_factor": 0.25}
    assert torch.equal(scale_latents(z, shifted), (z - 0.25) * 0.5)
    assert torch.equal(unscale_latents(z, shifted), z / 0.5 + 0.25)
    assert torch.equal(unscale_latents(z, {"scaling_factor": 0.5, "shift_factor": None}), z / 0.5)


def test_the_pipeline_decodes_with_mean_and_deviation_by_channel(tmp_path):
    made = pipeline(tiny_generator(in_channels=4), vae=tiny_vae(**STATISTICS))
    call = dict(class_labels=[1, 4], guidance_scale=1.0, num_inference_steps=2)
    seeds = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    z = made(**call, generator=seeds, output_type="latent").images
    mean, std = (torch.tensor(STATISTICS[name]).view(1, 4, 1, 1) for name in ("latents_mean", "latents_std"))
    with torch.no_grad():
        expected = (made.vae.decode(z * std / 0.5 + mean).sample / 2 + 0.5).clamp(0, 1)
        ignoring = (made.vae.decode(z / 0.5).sample / 2 + 0.5).clamp(0, 1)
    seeds = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    images = made(**call, generator=seeds, output_type="pt").images
    torch.testing.assert_close(images, expected)
    assert (images - ignoring).abs().max() > 0.01
    made.save_pretrained(tmp_path)
    assert tuple(GSPNPipeline.from_pretrained(tmp_path).vae.config.latents_std) == STATISTICS["latents_std"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(latents_mean=[0.0] * 4), "latents_mean and latents_std.*neither"),
        (dict(latents_std=[1.0] * 4), "latents_mean and latents_std.*neither"),
        (dict(latents_mean=[0.0] * 4, latents_std=[1.0] * 4, shift_factor=0.1), "shift_factor and latents_mean"),
        (dict(latents_mean=[0.0] * 3, latents_std=[1.0] * 4), "4 latent channels"),
        (dict(latents_mean=[0.0] * 4, latents_std=[1.0, 1.0, 0.0, 1.0]), "above 0"),
    ],
)
def test_scales_that_are_not_clear_are_refused(config, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        check_scale({"latent_channels": 4, "scaling_factor": 1.0, **config})
    with pytest.raises(ValueError, match=message):
        pipeline(tiny_generator(in_channels=4), vae=tiny_vae(**config))([0])


def test_encoded_latents_are_trained_on_and_sampled_with_the_statistics(pictures, tmp_path):
    scale = dict(latents_mean=(0.5, -1.0, 2.0), latents_std=(1.0, 2.0, 0.5), shift_factor=None, scaling_factor=0.5)
    vae = make_vae(**scale)
    vae.save_pretrained(tmp_path / "vae")
    latents = encode(pictures, tmp_path / "vae", tmp_path / "latents", **SIZE, splits=["test"])
    split = latents.splits["test"]
    raw, _ = split.posterior(torch.arange(3))
    (batch,) = make_latent_loader(split, 3)
    mean, std = (torch.tensor(scale[name]).view(1, 3, 1, 1) for name in ("latents_mean", "latents_std"))
    torch.testing.assert_close(batch["image"], (raw - mean) * 0.5 / std)
    assert encode(pictures, tmp_path / "vae", tmp_path / "latents", **SIZE, splits=["test"]).vae == latents.vae
    other = make_vae(**scale | {"latents_mean": (0.0,) * 3})
    assert describe_vae(other, "x")["digest"] != latents.vae["digest"]

    run, _ = generator_run(tmp_path / "run", vae=latents.vae, in_channels=3)
    config = load_pipeline(run.path).vae.config
    assert tuple(config.latents_mean) == scale["latents_mean"] and tuple(config.latents_std) == scale["latents_std"]
    made = sample(run.path, tmp_path / "samples", SampleOptions(count=1, steps=2, guidance=1.0))
    assert made["made"] == 1 and Path(made["folder"], "grid.png").exists()


def test_a_vae_without_statistics_is_that_of_older_folders():
    assert set(describe_vae(tiny_vae(), "x")) == {"path", "class", "scaling_factor", "shift_factor", "digest"}
    vae = tiny_vae(scaling_factor=0.5, shift_factor=0.25)
    digest = hashlib.sha256(b'{"scaling_factor": 0.5, "shift_factor": 0.25}')
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    assert check_vae(vae, {"path": "x", "digest": digest.hexdigest()}) is vae  # as folders of latents of 0.1.0 have it


def test_a_teacher_with_statistics_by_channel():
    pipe = tiny_sdxl(vae=STATISTICS)
    teacher, images = TextToImage(pipe, "here"), torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        raw = pipe.vae.encode(images).latent_dist.mean
    torch.testing.assert_close(teacher.latents(images, draw=False)[:, 3], (raw[:, 3] - 2.0) * 0.5 / 3.0)
    with pytest.raises(OptionError, match=r"latents_mean.*StableDiffusionPipeline"):
        TextToImage(tiny_sd(vae=STATISTICS), "here")
