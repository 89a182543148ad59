"""The objective of diffusion and its training: what the loss is, that a run goes on exactly, what it leaves behind."""

import json

import pytest
import torch
from helpers.encoding import SIZE
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from gspn.cli import app
from gspn.data.images import DataError, Split
from gspn.data.unreadable import Unreadable
from gspn.models.dit import create_dit
from gspn.models.generator import config_of
from gspn.options import OptionError
from gspn.options.diffusion import GeneratorOptions
from gspn.sampling.encode import encode
from gspn.sampling.generators import build_generator, load_pipeline
from gspn.tasks import base
from gspn.tasks.diffusion import Diffusion, Setup, resume_generator, train_generator
from gspn.tasks.objective import Objective, make_scheduler, negative_log_likelihood
from gspn.train.run import Run, RunError

TINY = dict(model_args={"hidden_size": 16, "depth": 2}, batch_size=128, epochs=2, sample_steps=2, eval_images=50)
PREDICTIONS = ("epsilon", "v_prediction", "sample")


def options(**changes):
    return GeneratorOptions(**(TINY | changes))


# -- the objective --


def case(prediction, timestep):
    torch.manual_seed(0)
    objective = Objective(make_scheduler(prediction))
    start, noise = torch.rand(3, 2, 4, 5) * 2 - 1, torch.randn(3, 2, 4, 5)
    t = torch.full((3,), timestep)
    signal, spread = (objective.table(name, t, start) for name in ("signal", "noise"))
    perfect = {"epsilon": noise, "v_prediction": signal * noise - spread * start, "sample": start}[prediction]
    return objective, start, noise, t, perfect


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("timestep", [1, 500, 999])
def test_a_perfect_prediction_with_the_true_variance_costs_nothing(prediction, timestep):
    objective, start, noise, t, perfect = case(prediction, timestep)
    error, bound = objective.losses(torch.cat([perfect, -torch.ones_like(start)], 1), start, noise, t)
    assert error.abs().max() < 1e-12 and bound.abs().max() < 2e-3
    error, wrong = objective.losses(torch.cat([perfect + 0.3, -torch.ones_like(start)], 1), start, noise, t)
    torch.testing.assert_close(error, torch.full((3,), 0.09))
    assert (wrong > bound).all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_step_is_that_of_the_scheduler(prediction):
    """Mean and variance that the bound judges are those with which DDPMScheduler samples."""
    objective, start, noise, t, perfect = case(prediction, 300)
    output, variance = perfect + 0.1, torch.linspace(-1, 1, start.numel()).view_as(start)
    x = objective.noisy(start, noise, t)
    scheduler = objective.scheduler

    # what `step` adds is the standard deviation, where the noise is 1
    ones = lambda shape, **_: torch.ones(shape)  # noqa: E731
    zeros = lambda shape, **_: torch.zeros(shape)  # noqa: E731
    from diffusers.schedulers import scheduling_ddpm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduling_ddpm, "randn_tensor", zeros)
        mean = scheduler.step(torch.cat([output, variance], 1), 300, x).prev_sample
        patch.setattr(scheduling_ddpm, "randn_tensor", ones)
        std = scheduler.step(torch.cat([output, variance], 1), 300, x).prev_sample - mean
    patched = {}
    import gspn.tasks.objective as module

    def divergence(true, step):
        patched["step"] = step
        return torch.zeros_like(step.mean)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "kl_divergence", divergence)
        objective.bound(output, variance, start, noise, t)
    torch.testing.assert_close(patched["step"].mean, mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(patched["step"].stddev, std, atol=1e-5, rtol=1e-4)


def test_the_likelihood_is_a_probability():
    """Over the 256 values of an 8-bit image it sums to 1."""
    values = torch.arange(256).double() / 127.5 - 1
    for mean, deviation in ((0.0, 0.1), (0.9, 0.3), (-1.2, 0.05)):
        normal = torch.distributions.Normal(torch.full((256,), mean).double(), torch.tensor(deviation).double())
        assert abs((-negative_log_likelihood(values, normal)).exp().sum() - 1) < 1e-6


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("steps", [25, 250, 1000, 20_000])
def test_at_the_last_step_an_image_is_noise(schedule, steps):
    """However many steps there are: samples begin with nothing but noise."""
    objective = Objective(make_scheduler(num_train_timesteps=steps, beta_schedule=schedule))
    assert 0 < objective.tables["signal"][-1] < 0.05 and (objective.scheduler.betas < 1).all()
    start, t = torch.rand(2, 1, 2, 2) * 2 - 1, torch.tensor([0, steps - 1])
    error, bound = objective.losses(torch.zeros(2, 2, 2, 2), start, torch.randn_like(start), t)
    assert error.isfinite().all() and bound.isfinite().all()


def test_the_bound_teaches_the_variance_only():
    objective, start, noise, t, perfect = case("epsilon", 400)
    output = torch.cat([perfect + 0.2, torch.zeros_like(start)], 1).requires_grad_()
    error, bound = objective.losses(output, start, noise, t)
    (of_bound,) = torch.autograd.grad(bound.sum(), output, retain_graph=True)
    (of_error,) = torch.autograd.grad(error.sum(), output)
    assert not of_bound[:, :2].any() and of_bound[:, 2:].any() and not of_error[:, 2:].any()
    with pytest.raises(ValueError, match=r"2 channels.* 4, got 3"):
        objective.losses(output[:, :3], start, noise, t)
    error, bound = objective.losses(output[:, :2], start, noise, t)
    assert not bound.any()


def test_classes_are_dropped_and_unreadable_images_do_not_count():
    task = Diffusion(Objective(make_scheduler()), lambda image: image, 10, None, 0.3, Unreadable({}))
    batch = {"image": torch.zeros(4000, 1, 2, 2), "label": torch.arange(4000) % 10, "index": torch.arange(4000)}
    batch["label"][:100] = -100
    torch.manual_seed(0)
    prepared = task.prepare(batch)
    label = prepared["label"]
    assert (label[:100] == -100).all() and task.count(prepared) == 3900
    dropped = (label == 10).float()[100:].mean()
    assert 0.26 < dropped < 0.34 and ((label == batch["label"]) | (label == 10)).all()
    seen = []

    def model(x, timestep, class_labels, return_dict):
        seen.append(class_labels)
        return (x.repeat(1, 2, 1, 1),)

    error, _ = task.losses(model, prepared)
    assert (error[:100] == 0).all() and (error[100:] != 0).all() and seen[0].min() == 0


# -- training --


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing stopped."""
    path = tmp_path_factory.mktemp("diffusion") / "run"
    train_generator("digits", path, options(tensorboard=True, flip=True))
    return path


def test_the_training_drops_classes_and_the_model_does_not():
    """In training mode the model would drop some of them once more."""
    setup = Setup.of("digits", options(class_dropout=0.5))
    model = setup.model(torch.device("cpu"))
    assert model.config.class_dropout_prob == 0.5 and model.embed.class_embedder.dropout_prob == 0


def test_what_a_run_leaves_behind(whole):
    config = json.loads((whole / "config.json").read_text())
    assert config["task"] == "diffusion" and config["space"]["size"] == [8, 8] and config["space"]["channels"] == 1
    assert config["scheduler"]["config"]["variance_type"] == "learned_range" and len(config["class_names"]) == 10
    rows = Run.open(whole).metrics
    assert [row["epoch"] for row in rows] == [1, 2] and rows[1]["val_loss"] < rows[0]["val_loss"]
    for row in rows:
        assert abs(row["val_error"] + row["val_bound"] - row["val_loss"]) < 1e-9 and row["images"] == 50
    assert {file.name for file in (whole / "samples").iterdir()} == {"epoch-0001.png", "epoch-0002.png"}
    for file in (whole / "samples" / "epoch-0001.png", whole / "curves.png"):
        with Image.open(file) as picture:
            assert min(picture.size) > 100
    model = build_generator(config["model"])
    model.load_state_dict(load_file(whole / "checkpoints/last/ema.safetensors"))
    # What the name stood for is written out: the run's model does not change with what the name comes to stand for.
    assert set(config_of(config["model"]["name"])) <= set(config["model"]["arguments"])


def test_tensorboard_shows_losses_and_samples(whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(whole / "tensorboard")).Reload()
    steps = [event.step for event in events.Scalars("step/loss")]
    assert steps == list(range(1, 23)), steps
    rows = Run.open(whole).metrics
    assert [e.value for e in events.Scalars("epoch/val_loss")] == pytest.approx([row["val_loss"] for row in rows])
    assert [event.step for event in events.Images("samples")] == [11, 22]


@pytest.mark.parametrize("stopped_at", [5, 15])
def test_a_stopped_run_goes_on_exactly(whole, tmp_path, monkeypatch, stopped_at):
    prepare, steps = Diffusion.prepare, []

    def stops(task, batch):
        if len(steps) == stopped_at:
            raise KeyboardInterrupt
        steps.append(1)
        return prepare(task, batch)

    monkeypatch.setattr(Diffusion, "prepare", stops)
    with pytest.raises(KeyboardInterrupt):
        train_generator("digits", tmp_path / "run", options(tensorboard=True, flip=True, save_every="2"))
    monkeypatch.undo()
    resume_generator(tmp_path / "run", {"workers": 1})
    for part in ("model", "ema", "optimizer"):
        ours, theirs = (load_file(each / f"checkpoints/last/{part}.safetensors") for each in (tmp_path / "run", whole))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours), part
    names = ("epoch", "step", "train_loss", "val_loss", "val_error", "val_bound", "lr")
    ours, theirs = (Run.open(each).metrics for each in (tmp_path / "run", whole))
    assert [[row[n] for n in names] for row in ours] == [[row[n] for n in names] for row in theirs]
    for epoch in (1, 2):
        pictures = [(each / f"samples/epoch-{epoch:04}.png").read_bytes() for each in (tmp_path / "run", whole)]
        assert pictures[0] == pictures[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"prediction": "v_prediction", "learn_sigma": False, "class_dropout": 0.0},
        {"prediction": "sample", "precision": "bf16", "gradient_checkpointing": True, "accumulate": 2},
        {"model": "DiT-micro/2", "model_args": {"num_layers": 1}, "schedule": "squaredcos_cap_v2"},
        {"size": (8, 12), "channels": 3, "ema": 0.0, "sample_every": 0},
        {"timesteps": 25, "sample_steps": 25},
        {"model": "GSPN-DiT-micro/2", "sizes": (0.5, 1.5), "accumulate": 2, "sample_every": 0},
        {"model": "DiT-micro/2", "model_args": {"num_layers": 1}, "sizes": (0.5, 1.5), "sample_every": 0},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_what_can_be_trained(tmp_path, changes):
    train_generator("digits", tmp_path / "run", options(**{"epochs": 1} | changes))
    run = Run.open(tmp_path / "run")
    assert 0 < run.metrics[0]["val_error"] < 1.2
    assert (tmp_path / "run/samples").exists() == (changes.get("sample_every") != 0)
    pipeline = load_pipeline(tmp_path / "run")
    guidance = 1.0 if changes.get("class_dropout") == 0 else 3.0
    height, width = changes.get("size", (8, 8))
    image = pipeline([3], guidance, 2, output_type="pt", height=height, width=width).images
    assert image.shape == (1, changes.get("channels", 1), height, width) and image.isfinite().all()


def test_the_size_is_a_condition_where_the_model_takes_one(tmp_path):
    changes = dict(model="GSPN-DiT-micro/2", epochs=1, sample_every=0, eval_images=10)
    for sizes in (None, (0.5, 1.5)):
        train_generator("digits", tmp_path / str(sizes), options(**changes, sizes=sizes))
        model = load_pipeline(tmp_path / str(sizes)).transformer
        assert model.config.size_condition == bool(sizes)
    # it has learned from the sizes
    assert model.size_embed.weight.abs().max() > 0


def test_unreadable_images_are_left_out_named_and_counted(colours, tmp_path):
    """One of the training images and, in its own split, one of the held-out ones."""
    for name in ("red", "green", "blue"):
        (colours / "train").mkdir(exist_ok=True)
        (colours / name).rename(colours / "train" / name)
        (colours / "val" / name).mkdir(parents=True)
        for i in (7, 8):
            (colours / "train" / name / f"{i}.png").rename(colours / "val" / name / f"{i}.png")
    (colours / "val" / "blue" / "8.png").write_bytes(b"no image")
    arguments = ["train-diffusion", str(colours), "--size", "8", "--batch-size", "10", "--workers", "0"]
    arguments += ["--model-arg", "hidden_size=16", "--model-arg", "depth=2", "--sample-every", "0", "--epochs", "1"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "run")])
    assert result.exit_code == 0 and "2 unreadable images" in result.stderr, result.output
    assert "red/3.png" in result.stderr and "blue/8.png" in result.stderr
    (row,) = Run.open(tmp_path / "run").metrics
    assert (row["images"], row["unreadable"], row["unreadable_in_training"]) == (5, 1, 1)
    # the warning outlives a stop, as the checkpoint keeps it
    warnings = resume_generator(tmp_path / "run")[1]
    assert len(warnings) == 1 and "red/3.png" in warnings[0] and "blue/8.png" in warnings[0]
    with pytest.raises(DataError, match=r"\(--strict\): .*red/3\.png"):
        train_generator(colours, tmp_path / "strict", options(size=(8, 8), strict=True, epochs=1, sample_every=0))
    (colours / "train" / "red" / "3.png").unlink()
    with pytest.raises(DataError, match=r"\(--strict\): .*blue/8\.png"):
        train_generator(colours, tmp_path / "held", options(size=(8, 8), strict=True, epochs=1, sample_every=0))


def test_dit_starts_as_published():
    """One embedding for all blocks; what modulates and predicts is 0, so the output is 0 too."""
    model = create_dit("DiT-micro/2", num_classes=10, sample_size=8, in_channels=1, num_layers=3)
    first, *others = (block.norm1.emb for block in model.transformer_blocks)
    assert all(each is first for each in others)
    output = model(torch.randn(2, 1, 8, 8), timestep=torch.tensor([3, 9]), class_labels=torch.tensor([0, 10])).sample
    assert output.shape == (2, 2, 8, 8) and not output.any()
    with pytest.raises(ValueError, match=r"'DiT-Q/2'.*'DiT-S/2'"):
        create_dit("DiT-Q/2")


# -- what cannot be --


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": "GSPN-Q/2"}, "'GSPN-Q/2'.*'GSPN-S/2'"),
        ({"size": (9, 9)}, "sample_size.* 2, got 9"),
        ({"size": (8, 9)}, "patch of 2.* 8x9"),
        (
            {"model": "DiT-micro/2", "model_args": {"num_layers": 1}, "size": (8, 12)},
            "DiT takes square images only, got 8x12: choose a square --size, or choose a model of GSPN",
        ),
        ({"model_args": {"num_classes": 3}}, "num_classes.*data"),
        ({"model": "GSPN-micro/2", "model_args": {"depth": 3}}, "depth.*even"),
        ({"sizes": (2, 1)}, "sizes.*the smaller one first.* 1"),
        ({"sizes": "0.5"}, r"sizes.*0\.75,1\.5, got '0\.5'"),
        ({"timesteps": 30, "sample_steps": 31}, "sample_steps .* 30, got 31"),
        ({"model": "DiT-micro/2", "model_args": {}, "fsdp": True}, "fsdp.*DiT"),
        ({"model_args": {"heads": 3}}, "GSPN-DiT-micro/2.*heads"),
    ],
)
def test_bad_options(tmp_path, changes, message):
    with pytest.raises(OptionError, match=message):
        train_generator("digits", tmp_path / "run", options(**changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_names": ("a", "b")}, "class_names: .* latents, .*gspn encode.*leave it out"),
        ({"label_column": "kind"}, "label_column: .* latents"),
        ({"streaming": True}, "streaming: .* latents"),
        ({"channels": 3}, "channels: .* latents"),
        ({"size": (8, 8)}, r"size: .* latents of images of \(16, 8\), got \(8, 8\)"),
        ({"strict": True}, "strict: 1 images were left out of .*5.png"),
        (
            {"model": "DiT-micro/2", "model_args": {"num_layers": 1}},
            r"got 16x8: encode square images \(gspn encode --size N\), or choose a model of GSPN",
        ),
    ],
)
def test_options_that_latents_cannot_follow(latents, tmp_path, changes, message):
    with pytest.raises(OptionError, match=message):
        train_generator(latents[1], tmp_path / "run", options(**changes))
    assert not (tmp_path / "run").exists()


def test_mirrored_images_that_were_not_encoded_are_missed_before_a_run_is_made(pictures, vae, tmp_path):
    encode(pictures, vae, tmp_path / "latents", **SIZE)
    with pytest.raises(DataError, match=r"without the mirrored images: expected gspn encode --flip"):
        train_generator(tmp_path / "latents", tmp_path / "run", options(flip=True))
    assert not (tmp_path / "run").exists()


def test_a_stream_of_more_images_than_are_evaluated(monkeypatch, tmp_path):
    monkeypatch.setattr(base, "Stream", Split)  # every split counts as one
    with pytest.raises(OptionError, match=r"a stream is evaluated as a whole; its test split has 359 .* got 50"):
        train_generator("digits", tmp_path / "run", options())
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_made_within_its_data(pictures, vae):
    with pytest.raises(OptionError, match=r"out: .*runs.x lies in the folder of the data"):
        train_generator(pictures, pictures / "runs" / "x", options())
    with pytest.raises(OptionError, match=r"out: .* lies in the folder of the data"):
        encode(pictures, vae, pictures / "latents", **SIZE)
    assert not (pictures / "runs").exists() and not (pictures / "latents").exists()


def test_a_run_of_another_task_or_result_is_not_gone_on_with(whole, tmp_path):
    from gspn.tasks.classify import resume_classifier

    with pytest.raises(RunError, match=r"diffusion, expected classification"):
        resume_classifier(whole)
    with pytest.raises(OptionError, match=r"class_dropout .*0\.1.* 0\.2"):
        resume_generator(whole, {"class_dropout": 0.2})
    (tmp_path / "config.json").write_text(json.dumps({"format": 1, "task": "classification", "options": {}}))
    with pytest.raises(RunError, match=rf"{tmp_path} is .*classification, expected diffusion.*gspn eval"):
        resume_generator(tmp_path)


def test_the_command(tmp_path):
    run = CliRunner().invoke
    arguments = ["--epochs", "1", "--batch-size", "256", "--model-arg", "hidden_size=16", "--model-arg", "depth=2"]
    arguments += ["--sample-every", "0", "--out", str(tmp_path / "run")]
    result = run(app, ["train-diffusion", "digits", *arguments])
    assert result.exit_code == 0 and "validation: squared error" in result.output, result.output
    result = run(app, ["train-diffusion", "digits", *arguments])
    assert result.exit_code == 2 and "not empty" in result.output
    result = run(app, ["train-diffusion", "digits", "--prediction", "x"])
    assert result.exit_code == 2 and "prediction" in result.output and "'x'" in result.output
    result = run(app, ["train-diffusion", "--config", str(tmp_path / "run/options.yaml"), "--out", str(tmp_path / "b")])
    assert result.exit_code == 0, result.output
    a, b = (load_file(tmp_path / name / "checkpoints/last/model.safetensors") for name in ("run", "b"))
    assert all(torch.equal(a[name], b[name]) for name in a)
