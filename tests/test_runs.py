"""`gspn.load_run`: what a run trained, ready for use, and folders that are no runs."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers.diffusion import ddpm, generator_run, tiny_vae
from PIL import Image
from typer.testing import CliRunner

import gspn
from gspn.cli import app
from gspn.data.labelled import open_data
from gspn.files import write_json
from gspn.options import OptionError
from gspn.tasks.classify import resume_classifier
from gspn.train.run import FORMAT, Run, RunError

# -- a classifier --


@pytest.fixture(scope="module")
def digits():
    """The test images as PIL images, and their labels."""
    split = open_data("digits").splits["test"]
    return [split.image(i) for i in range(len(split))], split.labels


def test_a_classifier_is_ready_for_use(digits_run, digits):
    run, metrics = digits_run
    loaded = gspn.load_run(run.path)
    assert not loaded.model.training and loaded.classes == [str(i) for i in range(10)]
    ema = run.load_checkpoint("best")[0]["ema"]
    assert all(torch.equal(value, ema[name]) for name, value in loaded.model.state_dict().items())
    inputs = torch.stack([loaded.preprocess(image) for image in digits[0]])
    assert inputs.shape == (len(digits[0]), 1, 8, 8) and inputs.dtype == torch.float32
    with torch.no_grad():
        right = loaded.model(inputs).argmax(1) == digits[1]
    assert right.float().mean().item() == pytest.approx(metrics["top1"])
    image = loaded.preprocessing(digits[0][0]).float()  # black is 0, white 255 here
    mean, std = loaded.preprocessing.mean[0], loaded.preprocessing.std[0]
    torch.testing.assert_close(loaded.preprocess(digits[0][0]), (image / 255 - mean) / std)


def test_predict_says_what_the_command_says(digits_run, digits, tmp_path):
    run, loaded = digits_run[0], gspn.load_run(digits_run[0].path)
    digits[0][3].save(tmp_path / "digit.png")
    told = CliRunner().invoke(app, ["predict", str(run.path), str(tmp_path / "digit.png"), "--json", "--top", "3"])
    (answer,) = json.loads(told.stdout)
    expected = {each["name"]: each["probability"] for each in answer["classes"]}
    for given in (digits[0][3], tmp_path / "digit.png", str(tmp_path / "digit.png")):
        assert loaded.predict(given, top=3) == pytest.approx(expected)
        assert list(loaded.predict(given, top=3)) == list(expected)
    every = loaded.predict(digits[0][3])
    assert list(every.values()) == sorted(every.values(), reverse=True)
    assert len(every) == len(loaded.predict(digits[0][3], top=99)) == 10 and sum(every.values()) == pytest.approx(1)


def test_an_opened_image_is_turned_upright_as_its_file_is(digits_run, tmp_path):
    loaded = gspn.load_run(digits_run[0].path)
    pixels = np.random.RandomState(0).randint(0, 255, (8, 8), np.uint8)
    image, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    turned = loaded.preprocess(Image.fromarray(np.rot90(pixels, -1).copy()))
    for given in (tmp_path / "turned.png", Image.open(tmp_path / "turned.png")):
        assert torch.equal(loaded.preprocess(given), turned)


def test_dtype_and_device(digits_run, digits):
    run = digits_run[0].path
    double, single = gspn.load_run(run, dtype=torch.float64), gspn.load_run(run)
    inputs = double.preprocess(digits[0][0])
    assert inputs.dtype == torch.float64 and double.model(inputs[None]).dtype == torch.float64
    assert double.predict(digits[0][0]) == pytest.approx(single.predict(digits[0][0]), abs=1e-5)
    assert gspn.load_run(run, device="meta").preprocess(digits[0][0]).device.type == "meta"
    for wrong in (torch.int8, "bfloat16"):
        with pytest.raises(OptionError, match=rf"dtype has to be a floating-point dtype.*{str(wrong)[-4:]}"):
            gspn.load_run(run, dtype=wrong)


def test_another_checkpoint(digits_run, tmp_path):
    shutil.copytree(digits_run[0].path, tmp_path / "run")
    shutil.copytree(tmp_path / "run/checkpoints/last", tmp_path / "run/checkpoints/epoch-0002")
    last = Run.open(tmp_path / "run").load_checkpoint("last")[0]["ema"]
    state = gspn.load_run(tmp_path / "run", "epoch-0002").model.state_dict()
    assert all(torch.equal(value, last[name]) for name, value in state.items())
    with pytest.raises(RunError, match=r"checkpoint 'first'.*best, epoch-0002, last"):
        gspn.load_run(tmp_path / "run", "first")


def test_what_predict_does_not_take(digits_run, tmp_path):
    loaded = gspn.load_run(digits_run[0].path)
    with pytest.raises(TypeError, match=r"PIL image.*path.*ndarray"):
        loaded.predict(np.zeros((8, 8)))
    with pytest.raises(FileNotFoundError):
        loaded.predict(tmp_path / "none.png")
    with pytest.raises(ValueError, match=r"top.*0"):
        loaded.predict(Image.new("L", (8, 8)), top=0)
    loaded.classes = ["same"] * 10
    with pytest.raises(ValueError, match="same name"):
        loaded.predict(Image.new("L", (8, 8)))


# -- a generator --


def test_a_generator_is_a_pipeline_ready_to_sample(tmp_path):
    run, model = generator_run(tmp_path / "run")
    pipeline = gspn.load_run(run.path)
    assert isinstance(pipeline, gspn.GSPNPipeline) and not pipeline.transformer.training
    assert pipeline.id2label == dict(enumerate(["one", "two", "three/3", "four", "five"]))
    pipeline.set_progress_bar_config(disable=True)
    own = gspn.GSPNPipeline(model, ddpm())
    own.set_progress_bar_config(disable=True)
    one, other = (
        each([1, 2], 2.0, 2, generator=torch.Generator().manual_seed(0), output_type="np").images
        for each in (pipeline, own)
    )
    assert one.shape == (2, 8, 8, 3)
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_generator_of_latents_has_its_vae(tmp_path):
    tiny_vae(scaling_factor=0.7).save_pretrained(tmp_path / "vae")
    vae = {"path": str(tmp_path / "vae"), "scaling_factor": 0.5, "shift_factor": None}
    run, _ = generator_run(tmp_path / "run", vae=vae, in_channels=4)
    pipeline = gspn.load_run(run.path, dtype=torch.bfloat16)
    assert pipeline.vae.dtype == torch.float32 and pipeline.transformer.dtype == torch.bfloat16
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("one", 1.0, 2, generator=torch.Generator().manual_seed(0)).images[0].size == (16, 16)
    (tmp_path / "vae").rename(tmp_path / "moved")
    with pytest.raises(OptionError, match="/vae cannot"):
        gspn.load_run(run.path)
    assert gspn.load_run(run.path, vae=tmp_path / "moved").vae.config.scaling_factor == 0.5


# -- what it refuses --


def test_runs_of_other_tasks(digits_run, tmp_path):
    generator_run(tmp_path / "generator")
    with pytest.raises(RunError, match="classification, expected diffusion"):
        gspn.load_run(digits_run[0].path, task="diffusion")
    with pytest.raises(RunError, match=r"diffusion, expected classification.*gspn sample"):
        gspn.load_run(tmp_path / "generator", task="classification")
    with pytest.raises(OptionError, match=r"task.*'detection'"):
        gspn.load_run(digits_run[0].path, task="detection")
    with pytest.raises(OptionError, match=r"vae.*classifier"):
        gspn.load_run(digits_run[0].path, vae="vae")
    Run.create(tmp_path / "students", {"task": "distillation"})
    with pytest.raises(RunError, match=r'distillation.*gspn\.load_swap\(pipe, ".*students"\)'):
        gspn.load_run(tmp_path / "students")
    (tmp_path / "none").mkdir()
    write_json(tmp_path / "none" / "config.json", {"format": FORMAT})
    with pytest.raises(RunError, match=r"no task.*classification or diffusion"):
        gspn.load_run(tmp_path / "none")


@pytest.mark.parametrize(
    "wrong",
    [
        {"channels": 5},
        {"channels": 3, "mean": [0.5] * 3, "std": [0.5] * 3},  # the model takes grey images
        {"size": []},
        {"size": [8, 0]},
        {"size": [8, 8.5]},
        {"mean": []},
        {"mean": [0.5] * 3, "std": [0.5] * 3},
        {"mean": [float("nan")]},
        {"std": [0]},
        {"std": ["a"]},
        {"crop": -1},
        {"crop": 2},
    ],
)
def test_a_preprocessing_that_cannot_be(digits_run, tmp_path, wrong):
    shutil.copytree(digits_run[0].path, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["preprocessing"] |= wrong
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    for opened in (gspn.load_run, resume_classifier):
        with pytest.raises(RunError, match=r"is damaged or foreign: ValueError"):
            opened(tmp_path / "run")


def test_folders_that_are_no_runs(digits_run, tmp_path):
    shutil.copytree(digits_run[0].path, tmp_path / "runs" / "first")
    (tmp_path / "pipeline").mkdir()
    write_json(tmp_path / "pipeline" / "model_index.json", {})
    (tmp_path / "swapped").mkdir()
    (tmp_path / "swapped" / "gspn_swap.safetensors").touch()
    (tmp_path / "photos").mkdir()
    for i in range(7):
        (tmp_path / "photos" / f"{i}.png").touch()
    (tmp_path / "empty").mkdir()
    first = tmp_path / "runs" / "first"
    for path, found in {
        tmp_path / "nowhere": "nothing is there",
        tmp_path / "photos" / "0.png": "a file",
        tmp_path / "photos": r"0\.png, 1\.png, 2\.png, 3\.png, 4\.png and 2 more",
        tmp_path / "empty": "holds nothing",
        tmp_path / "swapped": r"gspn\.load_swap",
        tmp_path / "runs": f"runs {first}",
        first / "checkpoints" / "best": f"part of the run {first}",
        first / "checkpoints": f"part of the run {first}",
    }.items():
        with pytest.raises(RunError, match=f"no run: .*{found}"):
            gspn.load_run(path)
    with pytest.raises(RunError, match=r"no run: .*gspn\.GSPNPipeline\.from_pretrained"):
        gspn.load_run(tmp_path / "pipeline", task="classification")
    with pytest.raises(RunError, match="holds a None, expected a GSPNPipeline"):
        gspn.load_run(tmp_path / "pipeline")  # saved pipelines are loaded, but this is none
    write_json(tmp_path / "empty" / "config.json", {"model_type": "vit", "hidden_size": 3})
    with pytest.raises(RunError, match=r"format.*model_type, hidden_size"):
        gspn.load_run(tmp_path / "empty")
