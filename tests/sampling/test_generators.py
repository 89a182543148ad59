"""Generators from runs and saved pipelines: loading, the VAE, schedulers by name, export."""

import json
import re
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, HeunDiscreteScheduler
from helpers.diffusion import ddpm, generator_run, lively, tiny_vae
from helpers.sampling import options, pixels
from helpers.training import same, tree
from typer.testing import CliRunner

from gspn.cli import app
from gspn.models.dit import create_dit
from gspn.models.pipeline import GSPNPipeline
from gspn.options import OptionError
from gspn.options.generators import SCHEDULERS
from gspn.sampling.generators import load_pipeline, named_scheduler, unclipped
from gspn.sampling.sample import sample
from gspn.sampling.vae import describe_vae
from gspn.train.run import Run, RunError

# -- loading --


def test_the_averaged_weights_are_sampled(tmp_path):
    run, model = generator_run(tmp_path / "run")  # the others are zeros there
    loaded = load_pipeline(run.path)
    assert all(torch.equal(loaded.transformer.state_dict()[name], w) for name, w in model.state_dict().items())
    assert loaded.id2label == dict(enumerate(["one", "two", "three/3", "four", "five"]))
    assert loaded.image_size == (8, 8) and loaded.vae is None and not loaded.transformer.training
    assert loaded.transformer.embed.class_embedder.dropout_prob == loaded.transformer.config.class_dropout_prob == 0.1
    heun = HeunDiscreteScheduler.from_config(loaded.scheduler.config)  # as users do; its own betas are others
    torch.testing.assert_close(heun.alphas_cumprod, loaded.scheduler.alphas_cumprod)
    (tmp_path / "run/checkpoints/last/ema.safetensors").unlink()
    state = tmp_path / "run/checkpoints/last/state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"parts": ["model"]}))
    assert all((weight == 0).all() for weight in load_pipeline(run.path).transformer.state_dict().values())


def test_a_run_with_a_vae_and_a_saved_pipeline_give_the_same(tmp_path):
    tiny_vae(scaling_factor=0.7).save_pretrained(tmp_path / "vae")
    vae = {"path": str(tmp_path / "vae"), "scaling_factor": 0.5, "shift_factor": 0.1}
    run, _ = generator_run(tmp_path / "run", vae=vae, in_channels=4)
    pipeline = load_pipeline(run.path)
    assert pipeline.vae.config.scaling_factor == 0.5 and pipeline.vae.config.shift_factor == 0.1
    pipeline.save_pretrained(tmp_path / "saved")
    for name, source in (("a", run.path), ("b", tmp_path / "saved")):
        sample(source, tmp_path / name, options(count=2))
    assert tree(tmp_path / "a") == tree(tmp_path / "b") and pixels(tmp_path / "a").shape == (2, 16, 16, 3)


def test_a_vae_that_was_moved_since_the_training(run, tmp_path):
    tiny_vae().save_pretrained(tmp_path / "vae")
    tiny_vae(scaling_factor=0.7).save_pretrained(tmp_path / "other")
    generator_run(tmp_path / "run", vae=describe_vae(tiny_vae(), tmp_path / "vae"), in_channels=4)
    command = ["sample", str(tmp_path / "run"), "--steps", "2", "--count", "2", "--out"]
    assert CliRunner().invoke(app, [*command, str(tmp_path / "a")]).exit_code == 0
    (tmp_path / "vae").rename(tmp_path / "moved")
    result = CliRunner().invoke(app, [*command, str(tmp_path / "b")])
    assert result.exit_code == 2 and "--vae" in result.output
    result = CliRunner().invoke(app, [*command, str(tmp_path / "b"), "--vae", str(tmp_path / "other")])
    assert result.exit_code == 2 and "latents" in result.output, result.output
    assert not (tmp_path / "b").exists()
    result = CliRunner().invoke(app, [*command, str(tmp_path / "b"), "--vae", str(tmp_path / "moved")])
    assert result.exit_code == 0 and tree(tmp_path / "b") == tree(tmp_path / "a")
    command = ["export", str(tmp_path / "run"), "--diffusers", "--vae", str(tmp_path / "moved")]
    assert CliRunner().invoke(app, command).exit_code == 0
    with pytest.raises(OptionError, match="saved pipeline"):
        load_pipeline(tmp_path / "run" / "pipeline", vae=tmp_path / "moved")
    with pytest.raises(OptionError, match=r"pixels.*none"):
        load_pipeline(run, vae=tmp_path / "moved")


def test_a_run_of_dit(tmp_path):
    """Its blocks share an embedding while it is trained, which save_pretrained could not write."""
    arguments = dict(num_classes=3, sample_size=8, in_channels=3, num_layers=2)
    torch.manual_seed(0)
    model = lively(create_dit("DiT-micro/2", **arguments))
    config = {"task": "diffusion", "model": {"name": "DiT-micro/2", "arguments": arguments}, "vae": None}
    scheduler = dict(ddpm(prediction_type="v_prediction").config)
    config |= {"scheduler": {"class": "DDPMScheduler", "config": scheduler}, "class_names": ["a", "b", "c"]}
    config |= {"space": {"image_size": [8, 8]}, "options": {"class_dropout": 0.0}}
    run = Run.create(tmp_path / "run", config)
    run.save_checkpoint("last", {"model": dict(model.state_dict())}, {"epoch": 1, "step": 1})
    pipeline = load_pipeline(run.path)
    given = dict(
        hidden_states=torch.randn(2, 3, 8, 8), timestep=torch.tensor([3, 700]), class_labels=torch.tensor([2, 0])
    )
    with torch.no_grad():
        assert torch.equal(pipeline.transformer(**given).sample, model(**given).sample)
    with pytest.raises(ValueError, match="no null class"):
        pipeline([0])
    assert {block.norm1.emb.class_embedder.dropout_prob for block in pipeline.transformer.transformer_blocks} == {0.0}
    pipeline.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(load_pipeline(tmp_path / "saved").transformer(**given).sample, model(**given).sample)


def test_sources_that_are_none(tmp_path, run):
    with pytest.raises(RunError, match="no run"):
        load_pipeline(tmp_path)
    with pytest.raises(RunError, match="classification, expected diffusion"):
        load_pipeline(Run.create(tmp_path / "classifier", {"task": "classification"}).path)
    with pytest.raises(RunError, match="checkpoint 'best'"):
        load_pipeline(run, "best")
    other = shutil.copytree(run, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["model"]["arguments"]["hidden_size"] = 48
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match=r"RuntimeError: .*size mismatch"):
        load_pipeline(other)
    del config["scheduler"]
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match="KeyError: 'scheduler'"):
        load_pipeline(other)
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(RunError, match="StableDiffusionPipeline, expected a GSPNPipeline"):
        load_pipeline(tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(RunError, match="cannot be loaded"):
        load_pipeline(tmp_path)


# -- schedulers --


@pytest.mark.parametrize("more", [{}, dict(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2")])
def test_schedulers_keep_the_noise_and_the_prediction(more):
    own = ddpm(**more)  # the rest is DDPM's default, which is not that of each of the others
    for name in SCHEDULERS:
        made = named_scheduler(name, own)
        assert made.config.prediction_type == own.config.prediction_type
        torch.testing.assert_close(made.alphas_cumprod.float(), own.alphas_cumprod)
        made.set_timesteps(10)
        # DDPM skips by whole steps and ends at 0; the solvers begin with nothing but noise.
        assert int(made.timesteps[0]) == (900 if name in ("ddpm", "ddim") else 999)


@pytest.mark.parametrize("name", ["dpm-solver++", "unipc"])
def test_solvers_clip_where_ddpm_does(name):
    """What an untrained model predicts at the first step is far from an image."""
    predicted = []
    for clip in (True, False):
        scheduler = named_scheduler(name, ddpm(clip_sample=clip))
        scheduler.set_timesteps(5)
        scheduler._init_step_index(scheduler.timesteps[0])
        noise = torch.linspace(-3, 3, 48).view(1, 3, 4, 4)
        predicted.append(scheduler.convert_model_output(-noise, sample=noise))
    clipped, free = predicted
    assert free.abs().max() > 100
    torch.testing.assert_close(clipped, free.clamp(-1, 1))


@pytest.mark.parametrize("name", ["dpm-solver++", "unipc"])
def test_solvers_clip_no_further_and_threshold_as_their_own_scheduler_does(name):
    """They would divide an image by the range that it is clipped to."""
    with pytest.raises(OptionError, match=f"{re.escape(name)} cannot clip images to 2, .*ddim or heun"):
        named_scheduler(name, ddpm(clip_sample=True, clip_sample_range=2.0))
    assert named_scheduler("heun", ddpm(clip_sample=True, clip_sample_range=2.0)).config.clip_sample_range == 2
    own = ddpm(clip_sample=True, thresholding=True, sample_max_value=1.5, clip_sample_range=2.0)
    made = named_scheduler(name, own).config
    assert made.thresholding and made.sample_max_value == 1.5


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_that_do_not_clip_where_the_own_one_does_are_told(name):
    for config in (dict(clip_sample=True), dict(clip_sample=False, thresholding=True), dict(clip_sample=False)):
        own = ddpm(**config)
        note = unclipped(named_scheduler(name, own), own)
        ignores = name.startswith("euler") or (name == "heun" and own.config.thresholding)
        told = note is not None and f"{SCHEDULERS[name]} does not clip" in note and "own DDPMScheduler does" in note
        assert told == (ignores and (own.config.clip_sample or own.config.thresholding)) and (told or note is None)


@pytest.mark.parametrize("name", ["dpm-solver++", "unipc", "euler", "heun"])
def test_as_many_steps_as_timesteps(name):
    """A model that knows that pixels have mean 0.4 and deviation 0.3 leads to such pixels."""
    own = ddpm(num_train_timesteps=25, beta_schedule="squaredcos_cap_v2")
    scheduler, signals = named_scheduler(name, own, 25), own.alphas_cumprod.double().sqrt()
    scheduler.set_timesteps(25)
    x = torch.randn(1, 1, 64, 64) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        signal, noisy = signals[int(t)], scheduler.scale_model_input(x, t)
        noise = (1 - signal**2).sqrt()
        start = 0.4 + signal * 0.09 / (signal**2 * 0.09 + noise**2) * (noisy - signal * 0.4)
        x = scheduler.step(((noisy - signal * start) / noise).float(), t, x).prev_sample
    assert abs(x.mean() - 0.4) < 0.02 and abs(x.std() - 0.3) < 0.06


def test_a_schedule_that_a_scheduler_does_not_know_is_refused():
    own = ddpm(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    for name in SCHEDULERS:
        if name != "heun":
            named_scheduler(name, own)
    with pytest.raises(OptionError, match=r"heun .*DDPMScheduler.*rescale_betas_zero_snr"):
        named_scheduler("heun", own)


def test_a_scheduler_for_another_prediction(tmp_path):
    run, _ = generator_run(tmp_path / "run", scheduler=DDIMScheduler(prediction_type="v_prediction"))
    config = json.loads((run.path / "config.json").read_text())
    config["scheduler"] = {"class": "DDIMScheduler", "config": {"prediction_type": "v_prediction"}}
    (run.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(OptionError, match=r"'epsilon'.*DDIMScheduler"):
        sample(run.path, tmp_path / "a", options())


# -- export --


def test_a_generator_is_exported_as_a_pipeline(tmp_path):
    run, model = generator_run(tmp_path / "run")
    tensors, state = run.load_checkpoint("last")
    run.save_checkpoint("best", {"model": tensors["model"]}, state)  # zeros; `gspn sample` takes the last one too
    arguments = ["export", str(run.path), "--diffusers"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 and "checkpoint last" in result.output
    loaded = GSPNPipeline.from_pretrained(run.path / "pipeline")
    assert same(loaded.transformer.state_dict(), model.state_dict()) and loaded.id2label[2] == "three/3"
    assert loaded.image_size == (8, 8)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and "--overwrite" in result.output
    for more, message in (("--onnx", "--diffusers"), ("--no-check", "--no-check")):
        result = CliRunner().invoke(app, [*arguments, more])
        assert result.exit_code == 2 and message in result.output
