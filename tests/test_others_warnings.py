"""What the libraries below us would say and a user has no use for: it is avoided where it comes from."""

import io
import subprocess
import sys
import warnings
from functools import partial

import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from diffusers.models import modeling_utils
from helpers.diffusion import generator_run
from helpers.stable_diffusion import tiny_sd
from helpers.training import TINY
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from torch.utils.data import DataLoader

import gspn
from gspn import plots
from gspn.data import loader as module
from gspn.data.images import Preprocessing
from gspn.data.labelled import open_data
from gspn.data.loader import batches, make_loader, workers_note
from gspn.options import OptionError, Options
from gspn.options.generators import SampleOptions
from gspn.sampling.generators import load_pipeline
from gspn.sampling.sample import sample
from gspn.sampling.vae import open_vae
from gspn.tasks.classify import train_classifier
from gspn.tasks.text_to_image import open_text_to_image
from gspn.train.loop import make_accelerator, with_strides


@pytest.fixture
def one_processor(monkeypatch):
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda process: {0}, raising=False)
    monkeypatch.setattr(torch._utils, "cpu_count", lambda: 1)


def test_too_many_workers_are_told_once_and_by_us(one_processor, colours):
    split = open_data(colours).splits["all"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loader = make_accelerator().prepare(
            make_loader(split, Preprocessing(3, (8, 8), (0.0,) * 3, (1.0,) * 3), 9, workers=2)
        )
        assert loader.num_workers == 2 and sum(len(batch["index"]) for batch in batches(loader)) == len(split)
    assert not [each for each in caught if "worker" in str(each.message)]
    with pytest.warns(UserWarning, match="This DataLoader will create 2 worker"):  # which is not silenced elsewhere
        DataLoader(split.labels, num_workers=2)
    assert workers_note(2, split) == "2 workers on 1 processor: fewer (--workers) may be faster"
    assert workers_note(1, split) is None and workers_note(2, open_data("digits").splits["train"]) is None


@pytest.mark.parametrize("epochs", [1, 2])
def test_workers_that_do_not_start_are_not_told(one_processor, colours, tmp_path, epochs):
    """Small images are kept after the first of several epochs, and none of the workers starts."""
    console = Console(file=io.StringIO(), width=200)
    options = Options(model="gspn_micro", model_args=TINY, epochs=epochs, workers=2, batch_size=8)
    train_classifier(colours, tmp_path / "run", options, console=console)
    assert ("2 workers on 1 processor" in console.file.getvalue()) == (epochs == 1)


def test_the_strides_of_sides_of_length_1_become_the_parameters():
    gradient = torch.arange(12.0).view(3, 1, 2, 2).as_strided((3, 1, 2, 2), (4, 1, 2, 1))
    other = with_strides((4, 4, 2, 1), gradient)
    assert other.stride() == (4, 4, 2, 1) and torch.equal(other, gradient) and other.data_ptr() == gradient.data_ptr()
    turned = torch.arange(12.0).view(3, 1, 2, 2).transpose(2, 3)
    assert with_strides((4, 4, 2, 1), turned) is turned  # its values lie elsewhere: that warning is right


def test_a_generator_in_bfloat16(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(modeling_utils.logger, "warning", lambda *message: said.append(message))
    run, options = generator_run(tmp_path / "run")[0].path, SampleOptions(count=1, steps=1, precision="bf16")
    sample(run, tmp_path / "samples", options)
    assert gspn.load_run(run, dtype=torch.bfloat16).transformer.dtype == torch.bfloat16
    assert not said


def _save_table(file):
    images = [Image.new("L", (8, 8), grey) for grey in range(4)]
    Dataset.from_dict({"image": images, "label": [0, 1, 0, 1]}).cast_column("image", ImageFeature()).to_parquet(file)


@pytest.mark.parametrize(
    "load, save",
    [
        (open_text_to_image, lambda path: tiny_sd().save_pretrained(path)),
        (load_pipeline, lambda path: load_pipeline(generator_run(path / "run")[0].path).save_pretrained(path)),
        (partial(open_data, label_column="label"), _save_table),
    ],
    ids=["stable diffusion", "generator", "table"],
)
def test_bars_of_loading_appear_on_a_terminal_only(load, save, tmp_path, capsys, monkeypatch):
    paths = tmp_path / "1.parquet", tmp_path / "2.parquet"  # a table is only loaded once
    for path in paths:
        save(path)
    capsys.readouterr()
    load(paths[0])
    assert "%|" not in (told := capsys.readouterr().err) and "examples/s" not in told
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    load(paths[1])
    assert "%|" in (told := capsys.readouterr().err) or "examples/s" in told  # the libraries' own, as before


def test_letters_without_a_glyph_are_not_told(tmp_path, recwarn):
    figure = Figure(layout="constrained")
    figure.suptitle("熊猫 גמל")
    plots.save(figure, tmp_path / "picture.png")
    assert not [each for each in recwarn if "Glyph" in str(each.message) or "Matplotlib" in str(each.message)]


@pytest.mark.slow
def test_no_advice_to_install_torchvision():
    code = "import gspn.tasks.text_to_image, gspn.stable_diffusion.pipelines as s; assert not s.LOGGER.filters"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torchvision" not in result.stderr


def test_a_vae_that_is_nowhere_is_told_without_the_warnings_of_the_hubs_library(monkeypatch):
    monkeypatch.setattr("gspn.sampling.vae.out_of_reach", lambda *_: "the hub cannot be reached")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(OptionError, match="there is no folder nobody/model here; the hub cannot be reached; "):
            open_vae("nobody/model")
