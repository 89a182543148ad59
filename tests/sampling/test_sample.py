"""`gspn sample`: each sample is a function of its number; npz, classes, sizes; what cannot be sampled."""

import numpy as np
import pytest
import torch
from diffusers import PNDMScheduler
from helpers.diffusion import generator_run
from helpers.sampling import options, pixels
from PIL import Image
from typer.testing import CliRunner

from gspn.cli import app
from gspn.data.images import generator
from gspn.models.pipeline import GSPNPipeline
from gspn.options import OptionError
from gspn.options.generators import SCHEDULERS, SampleOptions
from gspn.sampling import sample as module
from gspn.sampling.generators import load_pipeline
from gspn.sampling.sample import sample
from gspn.sampling.sample_folder import Samples
from gspn.train.loop import TrainingError
from gspn.train.run import RunError

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


def test_the_grid_is_of_classes_that_have_samples(run, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "GRID_CLASSES", 2)
    said = sample(run, tmp_path / "out", options(classes="4,0,1", count=1, npz=True))
    assert said["files"] == ["images", "grid.png", "samples.npz"]


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


def test_larger_images_from_enlarged_ones(run, tmp_path):
    """Those of the trained number of pixels, and the last steps again from there, with each image's own noise."""
    said = sample(run, tmp_path / "a", options(count=2, steps=4, size=(8, 32), enlarge=0.5))
    assert said["images"] == 2 and Samples.open(tmp_path / "a").settings["first_size"] == [4, 16]
    pipeline = load_pipeline(run)
    for i in range(2):
        source = [generator(0, i)]
        small = pipeline([i], 2.0, 4, 4, 16, generator=source, output_type="pt").images
        [image] = pipeline([i], 2.0, 4, 8, 32, generator=source, image=small, strength=0.5).images
        assert abs(pixels(tmp_path / "a")[i].astype(int) - np.asarray(image)).max() <= 1
    with pytest.raises(RunError, match=r"with enlarge 0\.5, not 0\.25"):
        sample(run, tmp_path / "a", options(count=2, steps=4, size=(8, 32), enlarge=0.25))


def test_shifted_timesteps_and_guidance_in_an_interval(run, tmp_path):
    ways = {"plain": {}, "shift": dict(timestep_shift=2.0), "interval": dict(guidance_interval=(0.0, 0.7))}
    found = {}
    for name, way in ways.items():
        sample(run, tmp_path / name, options(count=1, steps=4, **way))
        about = Samples.open(tmp_path / name).settings
        assert {key: about[key] for key in ("timestep_shift", "guidance_interval") if key in about} == {
            key: list(value) if isinstance(value, tuple) else value for key, value in way.items()
        }
        found[name] = pixels(tmp_path / name)
    [image] = load_pipeline(run)([0], 2.0, 4, generator=[generator(0, 0)], timestep_shift=2.0).images
    assert abs(found["shift"][0].astype(int) - np.asarray(image)).max() <= 1
    assert len({each.tobytes() for each in found.values()}) == 3
    with pytest.raises(RunError, match=r"with timestep_shift 2\.0, not without it"):
        sample(run, tmp_path / "shift", options(count=1, steps=4))
    with pytest.raises(OptionError, match="DDIMScheduler cannot be given timesteps"):
        sample(run, tmp_path / "ddim", options(count=1, steps=4, scheduler="ddim", timestep_shift=2.0))


def test_names_and_numbers_of_classes(tmp_path):
    run, _ = generator_run(tmp_path / "run", class_names=("7", "all", "b"))
    pipeline = load_pipeline(run.path)
    names = ["7", "all", "b"]
    assert module._classes(pipeline, "7,2", names) == [0, 2]  # a name comes before a number
    assert module._classes(pipeline, "all", names) == [1]
    names = ["tench, Tinca tinca", "Tinca", "owl", "tench, Tinca tinca, big"]
    pipeline = load_pipeline(generator_run(tmp_path / "commas", class_names=names)[0].path)
    assert module._classes(pipeline, "owl,tench, Tinca tinca,Tinca", names) == [2, 0, 1]
    assert module._classes(pipeline, "tench,Tinca tinca,big, 2", names) == [3, 2]
    assert module._classes(pipeline, "big, Tinca", names) == [3, 1]  # a part names its class, as before


def test_default_count(run, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PER_CLASS", 2)
    said = sample(run, tmp_path / "a", SampleOptions(steps=1, guidance=1.0, classes="0,1"))
    assert said["images"] == 4


# -- what cannot be sampled, and what is told --


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (dict(classes="one,seven"), "classes: .*'seven'.*one, two"),
        (dict(classes="5"), "classes: .*0 to 4.* 5"),
        (dict(classes="one,0"), "twice: 'one,0'"),
        (dict(per_class=2), "count 7.*per_class 2"),
        (dict(size=(9, 8)), "multiples of 2.*9x8"),
        (dict(steps=1001), "num_inference_steps.*1 to 1000.*1001"),
        (dict(enlarge=0.5), "enlarge is for images larger than in training, 8x8, but these are 8x8"),
        (dict(guidance_interval=(0.8, 0.2)), "guidance_interval.*the lower first"),
        (dict(enlarge=0.1, size=(16, 16)), "enlarge: 0.1 of 2 steps is no step"),
        (dict(enlarge=0.0, size=(16, 16)), "enlarge: 0 of 2 steps is no step"),
    ],
)
def test_bad_options(run, tmp_path, more, message):
    with pytest.raises(OptionError, match=message):
        sample(run, tmp_path / "a", options(**more))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "values",
    [
        dict(guidance=-1.0),
        dict(steps=0),
        dict(count=0),
        dict(scheduler="magic"),
        dict(timestep_shift=0.5),
    ],
)
def test_values_out_of_range(values):
    with pytest.raises(OptionError, match=next(iter(values))):
        SampleOptions(**values)


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


def test_a_number_of_steps_that_begins_too_late_is_told(run, tmp_path):
    (note,) = module._plan(load_pipeline(run), tmp_path, options(steps=600))[1]
    assert "DDPMScheduler begins at timestep 599 of 1000" in note and "with 500 it begins at 998" in note
    (note,) = module._plan(load_pipeline(run), tmp_path, options(steps=2))[1]  # which divides 1000
    assert "begins at timestep 500 of 1000" in note and "with 10 it begins at 900" in note
    assert module._plan(load_pipeline(run), tmp_path, options(steps=600, scheduler="dpm-solver++"))[1] == []
    assert module._plan(load_pipeline(run), tmp_path, options(steps=250))[1] == []


def test_schedulers_that_refuse_few_steps(run):
    """What a note on the first timestep needs is left out where the scheduler cannot tell it."""
    scheduler = PNDMScheduler.from_config(load_pipeline(run).scheduler.config, skip_prk_steps=False)
    with pytest.raises(ValueError, match="broadcast"):
        scheduler.set_timesteps(1)
    assert module._late_start(scheduler, 50) is None and len(scheduler.timesteps) > 50


def test_options_that_do_nothing_and_schedulers_that_do_not_clip_are_told(run, tmp_path):
    def notes(**more):
        return module._plan(pipeline, tmp_path, options(steps=10, **more))[1]

    pipeline = load_pipeline(run)
    assert notes(dilate_from=0.5) == ["--dilate-from does nothing without --dilation"] and notes() == []
    pipeline.scheduler.register_to_config(clip_sample=True)
    (note,) = notes(scheduler="euler")
    assert "EulerDiscreteScheduler does not clip" in note
    assert SampleOptions(dilate_from=0.5, dilation=2).idle() == []


def test_a_size_far_from_the_trained_one_is_told(run, tmp_path):
    height, width = load_pipeline(run).image_size
    (note,) = module._plan(load_pipeline(run), tmp_path, options(size=(2 * height, width), steps=10))[1]
    assert f"{2 * height}x{width} is far from {height}x{width}" in note and "2.00 times the height" in note


# -- the command --


def test_the_command(run, tmp_path):
    arguments = ["sample", str(run), "--out", str(tmp_path / "a"), "--classes", "two,4", "--per-class", "1"]
    result = CliRunner().invoke(app, [*arguments, "--steps", "3", "--guidance", "1", "--size", "2", "--npz"])
    assert result.exit_code == 0, result.output
    assert "2 samples" in result.output and "images, grid.png, samples.npz" in result.output
    result = CliRunner().invoke(app, [*arguments, "--steps", "1", "--guidance", "1", "--size", "2"])
    assert result.exit_code == 2 and "steps 3, not 1" in result.output
    result = CliRunner().invoke(app, ["sample", str(run), "--out", str(tmp_path / "b"), "--guidance", "-1"])
    assert result.exit_code == 2 and "guidance" in result.output
    again = ["sample", str(run), "--out", str(tmp_path / "c"), "--steps", "2", "--guidance-interval"]
    result = CliRunner().invoke(app, [*again, "0.8"])
    assert result.exit_code == 2 and "--guidance-interval takes two numbers from 0 to 1" in result.output
    result = CliRunner().invoke(app, [*again, "0,0.8", "--timestep-shift", "2", "--count", "1"])
    assert result.exit_code == 0, result.output
