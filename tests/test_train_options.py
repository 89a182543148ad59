"""Options: one definition for flags, files and runs."""

import dataclasses
from collections.abc import Mapping

import pytest

from gspn.train.distill_options import DistillOptions
from gspn.train.evaluate import evaluate
from gspn.train.generator_options import GeneratorOptions
from gspn.train.options import OptionError, Options, file_text, flags, read_file


def test_options_that_cannot_be():
    for bad, message in {
        "epochs=0": "epochs must be from 1",
        "lr=-1": "lr must be from 0",
        "lr=float('inf')": "lr must be from 0",
        "clip=float('nan')": "clip must be from 0",
        "precision='fp8'": "precision must be fp32 or bf16, got 'fp8'",
        "channels=2": "channels must be 1 or 3, got 2",
        "label_smoothing=1": "label_smoothing must be from 0",
    }.items():
        with pytest.raises(OptionError, match=message):
            eval(f"Options({bad})")


def test_evaluation_options_that_cannot_be(digits_run):
    for bad, message in {
        "batch_size": "batch_size must be from 1 .* got -1",
        "workers": "workers must be from 0",
    }.items():
        with pytest.raises(OptionError, match=message):
            evaluate(digits_run[0].path, "digits", **{bad: -1})


def test_every_option_is_a_flag_with_a_help_text():
    parameters = {parameter.name: parameter for parameter in flags(Options)}
    assert list(parameters) == [one.name for one in dataclasses.fields(Options)]
    for parameter in parameters.values():
        (info,) = parameter.annotation.__metadata__
        assert (info.help and info.help.endswith(".")) or (":" in info.help and info.rich_help_panel)


def test_a_help_shows_what_the_presets_fill_in():
    shown = {one.name: one.annotation.__metadata__[0].show_default for one in flags(GeneratorOptions)}
    assert shown["ema"] == "0.999 for pixels, 0.9999 for latents" and shown["weight_decay"] == "0.0"
    shown = {one.name: one.annotation.__metadata__[0].show_default for one in flags(DistillOptions)}
    assert shown["precision"] == "bf16" and shown["beta1"] == "0.9" and shown["segment"] is False


VALUES = {  # something else than the default, of each type
    "model": "gspn_tiny",
    "model_args": {"width": 16, "depths": [1, 2], "merger": "mean"},
    "size": (20, 30),
    "class_names": ("a", "schön", "no"),
    "freeze": ("stem", "levels.0"),
    "lr": 1e-5,
    "eps": 1e-12,
    "epochs": 3,
    "flip": False,
    "strict": True,
    "save_every": "2.5min",
}


def test_a_written_file_reads_back(tmp_path):
    for options in (Options(), Options(**VALUES)):
        (tmp_path / "a.yaml").write_text(file_text(options, {"data": "digits"}))
        read = read_file(tmp_path / "a.yaml")
        assert read.pop("data") == "digits" and set(read) == {one.name for one in dataclasses.fields(Options)}
        assert Options.read(read) == options


def test_files_say_the_same_in_yaml_and_toml(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "lr: 1e-3\nmodel-args: {width: 16}\nsize: 20x30\nfreeze: [stem]\nflip: no\nepochs: 3"
    )
    (tmp_path / "a.toml").write_text(
        'lr = 1e-3\nmodel_args = {width = 16}\nsize = [20, 30]\nfreeze = "stem"\nflip = false\nepochs = 3'
    )
    expected = Options(lr=1e-3, model_args={"width": 16}, size=(20, 30), freeze=("stem",), flip=False, epochs=3)
    assert Options.read(read_file(tmp_path / "a.yaml")) == Options.read(read_file(tmp_path / "a.toml")) == expected
    assert isinstance(expected.model_args, Mapping)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "epoch: 3", r"there is no option 'epoch'; the nearest is 'epochs'"),
        ("a.yaml", "batchsize: 3", r"no option 'batchsize'; the nearest is 'batch_size'"),
        ("a.yaml", "epochs: many", r"epochs takes a whole number, got 'many'"),
        ("a.yaml", "epochs: 2.5", r"epochs takes a whole number, got 2\.5"),
        ("a.yaml", "epochs: true", r"epochs takes a whole number, got True"),
        ("a.yaml", "lr: fast", r"lr takes a number, got 'fast'"),
        ("a.yaml", "flip: 1", r"flip takes true or false, got 1"),
        ("a.yaml", "precision: 16", r"precision takes text, got 16"),
        ("a.yaml", "size: big", r"size takes N or HxW in pixels, got 'big'"),
        ("a.yaml", "save_every: often", r"save_every takes a number of steps, minutes such as 15min, or never"),
        ("a.yaml", "epochs: 0", r"epochs must be from 1 to 1000000, got 0"),
        ("a.yaml", "strict: null", r"strict takes true or false, got None"),
        ("a.toml", "epochs = ", r"a\.toml cannot be read"),
        ("a.yaml", "a: [", r"a\.yaml cannot be read"),
        ("a.yaml", "- 1", r"has to hold options with their values"),
        ("a.json", "{}", r"has to be a \.yaml or \.toml file"),
    ],
)
def test_files_that_cannot_be(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(OptionError, match=message):
        Options.read(read_file(tmp_path / name))
    with pytest.raises(OptionError, match=r"gone\.yaml cannot be read: No such file"):
        read_file(tmp_path / "gone.yaml")
