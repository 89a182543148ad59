"""`gspn sample`: each sample a function of its number, folders that go on, npz, grid, what cannot be sampled."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, HeunDiscreteScheduler
from helpers.diffusion import ddpm, generator_run, lively, tiny_vae
from helpers.training import same, tree
from PIL import Image
from typer.testing import CliRunner

from gspn.cli import app
from gspn.data.images import generator
from gspn.digests import is_earlier
from gspn.files import SaveError
from gspn.models.dit import create_dit
from gspn.models.pipeline import GSPNPipeline
from gspn.options import OptionError
from gspn.plots import draw_grid
from gspn.sampling import sample as module
from gspn.sampling.generators import load_pipeline
from gspn.sampling.options import SCHEDULERS, SampleOptions
from gspn.sampling.sample import sample
from gspn.sampling.sample_folder import Samples
from gspn.sampling.vae import describe_vae
from gspn.train.loop import TrainingError
from gspn.train.run import Run, RunError

QUICK = dict(count=7, steps=2, guidance=2.0, batch_size=3)


def options(**more):
    return SampleOptions(**QUICK | more)


def pixels(folder):
    """The samples as an array, in order."""
    return np.stack([np.asarray(Image.open(path)) for path in sorted((folder / "images").glob("*.png"))]).astype(int)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return generator_run(tmp_path_factory.mktemp("runs") / "run")[0].path


@pytest.fixture(scope="module")
def done(run, tmp_path_factory):
    """A finished folder of samples, and what `sample` said."""
    folder = tmp_path_factory.mktemp("samples") / "done"
    return folder, sample(run, folder, options(npz=True))


# -- loading --


def test_the_averaged_weights_are_sampled(tmp_path):
    run, model = generator_run(tmp_path / "run")  # the others are zeros there
    loaded = load_pipeline(run.path)
    assert all(torch.equal(loaded.transformer.state_dict()[name], w) for name, w in model.state_dict().items())
    assert loaded.id2label == dict(enumerate(["one", "two", "three/3", "four", "five"]))
    assert loaded.image_size == (8, 8) and loaded.vae is None and not loaded.transformer.training
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


# -- what is made --


def test_sample_i_is_a_function_of_seed_and_i(run, done):
    folder, said = done
    assert said["images"] == said["made"] == 7 and said["files"] == ["images", "grid.png", "samples.npz"]
    names = ["one", "two", "three_3", "four", "five", "one", "two"]
    assert sorted(path.name for path in (folder / "images").iterdir()) == [
        f"{i:06d}-{name}.png" for i, name in enumerate(names)
    ]
    pipeline = load_pipeline(run)
    for i in range(7):
        (image,) = pipeline([i % 5], 2.0, 2, generator=[generator(0, i)]).images
        made = np.asarray(Image.open(folder / "images" / f"{i:06d}-{names[i]}.png")).astype(int)
        assert abs(made - np.asarray(image)).max() <= 1  # another batch may round otherwise


def test_the_batch_size_does_not_matter_and_the_seed_does(run, done, tmp_path):
    sample(run, tmp_path / "batch", options(batch_size=5))
    assert abs(pixels(tmp_path / "batch") - pixels(done[0])).max() <= 1
    sample(run, tmp_path / "seed", options(seed=1))
    assert (abs(pixels(tmp_path / "seed") - pixels(done[0])).max((1, 2, 3)) > 20).all()


def test_npz_is_what_the_evaluation_suite_of_adm_reads(done, tmp_path):
    with np.load(done[0] / "samples.npz") as arrays:
        assert sorted(arrays) == ["arr_0", "arr_1"]
        np.testing.assert_array_equal(arrays["arr_0"], pixels(done[0]))
        assert arrays["arr_0"].dtype == np.uint8 and arrays["arr_1"].dtype == np.int64
        assert arrays["arr_1"].tolist() == [0, 1, 2, 3, 4, 0, 1]
    grey = generator_run(tmp_path / "grey", in_channels=1)[0]
    sample(grey.path, tmp_path / "out", options(count=2, npz=True, grid=False))
    with np.load(tmp_path / "out/samples.npz") as arrays:
        assert arrays["arr_0"].shape == (2, 8, 8, 3)
        np.testing.assert_array_equal(arrays["arr_0"][..., 1], pixels(tmp_path / "out"))
    assert not (tmp_path / "out/grid.png").exists()


def test_classes_sizes_and_schedulers(run, tmp_path):
    said = sample(run, tmp_path / "a", options(classes="three/3, 0", count=None, per_class=2, size=(8, 12)))
    samples = Samples.open(tmp_path / "a")
    assert said["images"] == 4 and [samples.label(i) for i in range(4)] == [2, 0, 2, 0]
    assert pixels(tmp_path / "a").shape == (4, 8, 12, 3)
    split = samples.split()
    assert split.labels.tolist() == [2, 0, 2, 0] and split.class_names[2] == "three/3" and split.image(3).width == 12
    images = {}
    for name in SCHEDULERS:
        sample(run, tmp_path / name, options(count=1, steps=3, scheduler=name))
        images[name] = pixels(tmp_path / name).tobytes()
    assert len(set(images.values())) == len(SCHEDULERS)


@pytest.mark.parametrize("more", [{}, dict(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2")])
def test_schedulers_keep_the_noise_and_the_prediction(more):
    own = ddpm(**more)  # the rest is DDPM's default, which is not that of each of the others
    for name in SCHEDULERS:
        made = module.named_scheduler(name, own)
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
        scheduler = module.named_scheduler(name, ddpm(clip_sample=clip))
        scheduler.set_timesteps(5)
        scheduler._init_step_index(scheduler.timesteps[0])
        noise = torch.linspace(-3, 3, 48).view(1, 3, 4, 4)
        predicted.append(scheduler.convert_model_output(-noise, sample=noise))
    clipped, free = predicted
    assert free.abs().max() > 100
    torch.testing.assert_close(clipped, free.clamp(-1, 1))


def test_names_and_numbers_of_classes(tmp_path):
    run, _ = generator_run(tmp_path / "run", class_names=("7", "all", "b"))
    pipeline = load_pipeline(run.path)
    names = ["7", "all", "b"]
    assert module._classes(pipeline, "7,2", names) == [0, 2]  # a name comes before a number
    assert module._classes(pipeline, "all", names) == [1]


def test_default_count(run, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PER_CLASS", 2)
    said = sample(run, tmp_path / "a", SampleOptions(steps=1, guidance=1.0, classes="0,1"))
    assert said["images"] == 4


# -- going on --


class Stopped(BaseException):
    """What stands for a kill."""


def test_batches_are_the_same_when_a_part_is_there(tmp_path):
    samples = Samples(tmp_path, {}, 8, [0], ["a"])
    (tmp_path / "images").mkdir()
    assert module._batches(samples, 3) == [([0, 1, 2], [0, 1, 2]), ([3, 4, 5], [3, 4, 5]), ([6, 7], [6, 7])]
    for i in (0, 1, 2, 3, 5):
        samples.path(i).touch()
    assert module._batches(samples, 3) == [([3, 4, 5], [4]), ([6, 7], [6, 7])]


@pytest.mark.parametrize("after", [0, 1, 4, 6])
def test_a_stopped_folder_comes_out_as_if_it_had_not_been(run, done, tmp_path, monkeypatch, after):
    save, count = module.save_picture, [0]

    def stopping(path, picture):
        if count[0] == after:
            Path(path).with_name(f".{Path(path).name}.new").write_bytes(b"half")
            raise Stopped
        count[0] += 1
        save(path, picture)

    monkeypatch.setattr(module, "save_picture", stopping)
    with pytest.raises(Stopped):
        sample(run, tmp_path / "a", options(npz=True))
    monkeypatch.setattr(module, "save_picture", save)
    samples = Samples.open(tmp_path / "a")
    assert len(samples.missing()) == 7 - after
    with pytest.raises(RunError, match=f"{7 - after} of 7 samples"):
        samples.split()
    said = sample(run, tmp_path / "a", options(npz=True))
    assert said["made"] == 7 - after
    assert {p: b for p, b in tree(tmp_path / "a").items() if not p.endswith(".new")} == tree(done[0])


def test_samples_that_an_older_version_began_can_grow(run, done, tmp_path):
    folder = shutil.copytree(done[0], tmp_path / "a")
    about = json.loads((folder / "samples.json").read_text())
    assert not is_earlier(about["settings"]["weights"])
    about["settings"]["weights"] = module._digest(load_pipeline(run), like="")
    (folder / "samples.json").write_text(json.dumps(about))
    assert sample(run, folder, options(count=9, batch_size=2))["made"] == 2
    about["settings"]["weights"] = "0" * 64
    (folder / "samples.json").write_text(json.dumps(about))
    with pytest.raises(RunError, match="other weights"):
        sample(run, folder, options(count=9, batch_size=2))


def test_a_finished_folder_is_left_as_it_is_and_can_grow(run, done, tmp_path, monkeypatch):
    folder = shutil.copytree(done[0], tmp_path / "a")
    times = {path: path.stat().st_mtime_ns for path in (folder / "images").iterdir()}
    assert sample(run, folder, options(npz=True))["made"] == 0
    assert tree(folder) == tree(done[0])
    assert sample(run, folder, options(count=9, batch_size=2, npz=True))["made"] == 2
    assert len(pixels(folder)) == 9 and all(path.stat().st_mtime_ns == time for path, time in times.items())
    with np.load(folder / "samples.npz") as arrays:
        assert arrays["arr_1"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    with pytest.raises(RunError, match=r"9 samples.* 7"):
        sample(run, folder, options())


@pytest.mark.parametrize(
    ("more", "what"),
    [
        (dict(guidance=3.0), r"guidance 2.0, not 3.0"),
        (dict(steps=3), r"steps 2, not 3"),
        (dict(seed=1), r"seed 0, not 1"),
        (dict(size=(8, 12)), r"size \[8, 8\], not \[8, 12\]"),
        (dict(scheduler="ddim"), r"scheduler class DDPMScheduler, not DDIMScheduler"),
        (dict(precision="bf16"), r"precision fp32, not bf16"),
        (dict(classes="0,1,2,3"), r"classes \[0, 1, 2, 3, 4\], not \[0, 1, 2, 3\]"),
    ],
)
def test_other_arguments_in_the_same_folder_are_refused(run, done, more, what):
    before = tree(done[0])
    with pytest.raises(RunError, match=f"with {what}"):
        sample(run, done[0], options(**more))
    assert tree(done[0]) == before


def test_other_weights_in_the_same_folder_are_refused(done, tmp_path):
    run, _ = generator_run(tmp_path / "run")
    tensors, state = run.load_checkpoint("last")
    tensors["ema"]["norm.weight"][0] += 1e-3
    Run.open(run.path).save_checkpoint("last", tensors, state)
    with pytest.raises(RunError, match="other weights"):
        sample(run.path, done[0], options())


def test_folders_of_something_else_are_refused(run, done, tmp_path):
    (tmp_path / "precious.txt").write_text("here")
    with pytest.raises(RunError, match=r"not empty.*no samples"):
        sample(run, tmp_path, options())
    with pytest.raises(RunError, match="file; expected a folder"):
        sample(run, tmp_path / "precious.txt", options())
    assert tree(tmp_path) == {"precious.txt": b"here"}
    for text, message in (("{}", "KeyError"), ('{"format": 9}', "newer gspn")):
        (tmp_path / "samples.json").write_text(text)
        with pytest.raises(RunError, match=message):
            sample(run, tmp_path, options())
    with pytest.raises(RunError, match="no samples"):
        Samples.open(done[0] / "images")


def test_a_full_disk_is_told_and_leaves_what_is_done(run, tmp_path, monkeypatch):
    save = Image.Image.save

    def full(self, path, *more, **options):
        if "000003" in str(path):
            raise OSError(28, "No space left on device")
        save(self, path, *more, **options)

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(SaveError, match=r"000003-four\.png: No space left"):
        sample(run, tmp_path / "a", options())
    assert len(list((tmp_path / "a/images").iterdir())) == 3


# -- what cannot be sampled --


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (dict(classes="one,seven"), "classes: .*'seven'.*one, two"),
        (dict(classes="5"), "classes: .*0 to 4.* 5"),
        (dict(classes="one,0"), "twice: 'one,0'"),
        (dict(per_class=2), "count 7.*per_class 2"),
        (dict(size=(9, 8)), "multiples of 2.*9x8"),
        (dict(steps=1001), "num_inference_steps.*1 to 1000.*1001"),
    ],
)
def test_bad_options(run, tmp_path, more, message):
    with pytest.raises(OptionError, match=message):
        sample(run, tmp_path / "a", options(**more))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("values", [dict(guidance=-1.0), dict(steps=0), dict(count=0), dict(scheduler="magic")])
def test_values_out_of_range(values):
    with pytest.raises(OptionError, match=next(iter(values))):
        SampleOptions(**values)


def test_a_scheduler_for_another_prediction(tmp_path):
    run, _ = generator_run(tmp_path / "run", scheduler=DDIMScheduler(prediction_type="v_prediction"))
    config = json.loads((run.path / "config.json").read_text())
    config["scheduler"] = {"class": "DDIMScheduler", "config": {"prediction_type": "v_prediction"}}
    (run.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(OptionError, match=r"'epsilon'.*DDIMScheduler"):
        sample(run.path, tmp_path / "a", options())


def test_values_that_are_no_numbers_and_memory_that_does_not_suffice(run, tmp_path, monkeypatch):
    def broken(self, latents, output_type):
        latents[1, 0, 0] = torch.nan
        return decode(self, latents, output_type)

    decode = GSPNPipeline._decode
    with monkeypatch.context() as patch, pytest.raises(TrainingError, match=r"sample 1: .* not finite"):
        patch.setattr(GSPNPipeline, "_decode", broken)
        sample(run, tmp_path / "a", options())
    assert not list((tmp_path / "a/images").iterdir())

    def large(self, *arguments, **more):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(GSPNPipeline, "__call__", large)
    with pytest.raises(TrainingError, match=r"3 images of 8x8 .*--batch-size"):
        sample(run, tmp_path / "a", options())


# -- the picture --


def test_grid_shows_every_class_with_its_images():
    colours = {0: (200, 0, 0), 1: (0, 200, 0), 3: (0, 0, 200)}
    labels = [0, 1, 3, 0, 1, 3, 0]
    images = [Image.new("RGB", (20, 10), colours[label]) for label in labels]
    names = ["red", "green and a name that does not fit in one line, nor two", "none", "blue"]
    picture = np.asarray(draw_grid(images, labels, names, title="a title", columns=2)).astype(int)
    for label, colour in colours.items():
        places = np.argwhere((picture == colour).all(-1))
        # two images of 100x50 side by side, no third one
        assert len(places) == 2 * 100 * 50, label
        (top, left), (bottom, right) = places.min(0), places.max(0)
        assert (bottom - top + 1, right - left + 1) == (50, 2 * 100 + 4)
        beside = picture[top : bottom + 1, :left]
        assert (beside < 100).all(-1).sum() > 20, f"no name beside {label}"
    rows = [np.argwhere((picture == colour).all(-1)).min(0)[0] for colour in colours.values()]
    assert rows == sorted(rows)


def test_grid_of_many_classes_and_large_images():
    images = [Image.new("RGB", (600, 300), (7, 99, 200)) for _ in range(70)]
    picture = draw_grid(images, range(70), [str(i) for i in range(70)])
    assert (np.asarray(picture) == (7, 99, 200)).all(-1).sum() == 60 * 256 * 128
    assert 0.5 < picture.width / picture.height < 2


# -- the command, and several processes --


def test_the_command(run, tmp_path):
    arguments = ["sample", str(run), "--out", str(tmp_path / "a"), "--classes", "two,4", "--per-class", "1"]
    result = CliRunner().invoke(app, [*arguments, "--steps", "3", "--guidance", "1", "--size", "2", "--npz"])
    assert result.exit_code == 0, result.output
    assert "2 samples" in result.output and "images, grid.png, samples.npz" in result.output
    result = CliRunner().invoke(app, [*arguments, "--steps", "1", "--guidance", "1", "--size", "2"])
    assert result.exit_code == 2 and "steps 3, not 1" in result.output
    result = CliRunner().invoke(app, ["sample", str(run), "--out", str(tmp_path / "b"), "--guidance", "-1"])
    assert result.exit_code == 2 and "guidance" in result.output


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


def test_a_number_of_steps_that_begins_too_late_is_told(run, tmp_path):
    (note,) = module._plan(load_pipeline(run), tmp_path, options(steps=600))[1]
    assert "DDPMScheduler begins at timestep 599 of 1000" in note and "with 500 it begins at 998" in note
    (note,) = module._plan(load_pipeline(run), tmp_path, options(steps=2))[1]  # which divides 1000
    assert "begins at timestep 500 of 1000" in note and "with 10 it begins at 900" in note
    assert module._plan(load_pipeline(run), tmp_path, options(steps=600, scheduler="dpm-solver++"))[1] == []
    assert module._plan(load_pipeline(run), tmp_path, options(steps=250))[1] == []


def test_a_size_far_from_the_trained_one_is_told(run, tmp_path):
    height, width = load_pipeline(run).image_size
    (note,) = module._plan(load_pipeline(run), tmp_path, options(size=(2 * height, width), steps=10))[1]
    assert f"{2 * height}x{width} is far from {height}x{width}" in note and "2.00 times the height" in note


@pytest.mark.slow
def test_two_processes_share_the_batches(run, done, tmp_path):
    """Of a folder in which some samples are there already."""
    folder = shutil.copytree(done[0], tmp_path / "a")
    for path in sorted((folder / "images").iterdir())[1:]:
        path.unlink()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "gspn"]
    command += ["sample", str(run), "--out", str(folder), "--count", "7", "--steps", "2", "--guidance", "2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command += ["--batch-size", "3", "--npz"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("7 samples, 6 of them made now") == 1
    assert tree(folder) == tree(done[0])
