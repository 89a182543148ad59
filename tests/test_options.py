"""Options: one definition for flags, files and runs."""

import codecs
import dataclasses
import inspect
import re
from collections.abc import Mapping
from typing import get_args, get_type_hints

import pytest
import yaml

import gspn
from gspn.data.augment import preset_for
from gspn.metrics.classification import evaluate
from gspn.metrics.fid import evaluate_samples
from gspn.models.dit import create_dit
from gspn.options import OptionError, Options, file_text, flags, parse_model_args, read_file
from gspn.options.base import with_option
from gspn.options.bench import BenchOptions
from gspn.options.classifiers import EvalOptions, ExportOptions, PredictOptions, ShowOptions
from gspn.options.diffusion import GeneratorOptions
from gspn.options.distill import DistillOptions
from gspn.options.generators import EncodeOptions, FidOptions, SampleArguments, SampleOptions
from gspn.options.segment import SegmentationOptions
from gspn.sampling.encode import encode

TRAININGS = [Options, GeneratorOptions, DistillOptions]
PLAIN = [EvalOptions, PredictOptions, ShowOptions, ExportOptions, SampleArguments, EncodeOptions, FidOptions]
PLAIN += [BenchOptions]


def test_options_that_cannot_be():
    for bad, message in {
        "epochs=0": "epochs must be from 1",
        "lr=-1": "lr must be from 0",
        "lr=float('inf')": "lr must be from 0 on and finite, got inf",
        "clip=float('nan')": "clip must be from 0",
        "lr=10**400": "lr must be from 0 on and finite, got 1000",
        "precision='fp8'": "precision must be fp32 or bf16, got 'fp8'",
        "channels=2": "channels must be 1 or 3, got 2",
        "label_smoothing=1": "label_smoothing must be from 0",
    }.items():
        with pytest.raises(OptionError, match=message):
            eval(f"Options({bad})")


@pytest.mark.parametrize(
    ("text", "value"),
    [("depths=[1,2]", [1, 2]), ("merger=mean", "mean"), ("global_pool=", ""), ("skip=false", False), ("a=true", True)],
)
def test_a_model_argument_is_json_or_a_word(text, value):
    assert list(parse_model_args([text]).values()) == [value]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("depths=[1,2", r"JSON for depths.*Expecting ',' delimiter: line 1 column 5"),
        ("skip=True", "JSON for skip, such as true"),
        ("segment=None", "JSON for segment, such as null"),
        ("depths=1,2", "JSON for depths.*Extra data"),
        ("merger='mean'", "JSON for merger"),
    ],
)
def test_malformed_json_is_no_text(text, message):
    with pytest.raises(OptionError, match=message):
        Options.read({"model_args": [text]})


@pytest.mark.parametrize(
    ("what", "meant"),
    [
        (lambda: gspn.create_model("gspn_tinny"), "gspn_tiny"),
        (lambda: gspn.create_model("gspn_micro", dept=[1]), "depths"),
        (lambda: gspn.create_generator("gspn-s/2"), "GSPN-S/2"),
        (lambda: gspn.create_generator("GSPN-S/2", hiden_size=8), "hidden_size"),
        (lambda: create_dit("DiT-M/2"), "DiT-B/2|DiT-S/2|DiT-L/2"),
        (lambda: create_dit("DiT-S/2", num_layer=1), "num_layers"),
        (lambda: preset_for("folder", (64, 64), 10, "gspn_micro", "fotos"), "photos"),
        (lambda: SampleOptions(scheduler="dpm-solver"), r"dpm-solver\+\+"),
        (lambda: Options(augment="corp"), "crop"),
        (lambda: GeneratorOptions.read({"sample_stpes": 3}), "sample_steps"),
        (lambda: DistillOptions.read({"caption_columns": "a"}), "caption_column"),
    ],
)
def test_a_mistyped_name_gets_the_nearest_one(what, meant):
    with pytest.raises((ValueError, TypeError), match=f"did you mean '({meant})'"):
        what()


def test_evaluation_options_that_cannot_be(digits_run):
    for bad, message in {
        "batch_size": "batch_size must be from 1 .* got -1",
        "workers": "workers must be from 0",
    }.items():
        with pytest.raises(OptionError, match=message):
            evaluate(digits_run[0].path, "digits", **{bad: -1})


@pytest.mark.parametrize("options", [*TRAININGS, *PLAIN])
def test_every_option_is_a_flag_with_a_help_text(options):
    parameters = {parameter.name: parameter for parameter in flags(options)}
    assert sorted(parameters) == sorted(one.name for one in dataclasses.fields(options))
    for parameter in parameters.values():
        (info,) = parameter.annotation.__metadata__
        assert (info.help and info.help.endswith(".")) or (":" in info.help and info.rich_help_panel)


def test_flags_of_a_training_are_none_where_the_user_gave_none_and_can_be_turned_off():
    parameters = {one.name: one for one in flags(Options)}
    assert all(one.default is None for one in parameters.values())
    assert parameters["strict"].annotation.__metadata__[0].default == "--strict/--no-strict"


def test_flags_of_other_commands_have_their_defaults_and_their_own_come_first():
    parameters = {one.name: one for one in flags(EvalOptions)}
    assert list(parameters)[:3] == ["run", "data", "split"] and list(parameters)[-1] == "checkpoint"
    assert parameters["batch_size"].default == 256 and parameters["data"].default is inspect.Parameter.empty
    assert parameters["strict"].annotation.__metadata__[0].default == "--strict"
    assert {one.annotation.__metadata__[0].rich_help_panel for one in parameters.values()} == {None}
    panels = {one.name: one.annotation.__metadata__[0].rich_help_panel for one in flags(SampleArguments)}
    assert panels["steps"] == "Samples" and panels["vae"] is None


@pytest.mark.parametrize(
    ("function", "options"), [(evaluate, EvalOptions), (encode, EncodeOptions), (evaluate_samples, FidOptions)]
)
def test_functions_and_their_commands_have_the_same_defaults(function, options):
    own = inspect.signature(function).parameters.values()
    own = {one.name: one.default for one in own if one.default is not inspect.Parameter.empty}
    shared = {one.name: one.default for one in dataclasses.fields(options) if one.name in own}
    assert {name: own[name] for name in shared} == shared and {"batch_size", "workers", "strict"} <= set(shared)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({}, "--onnx.*--aoti.*--diffusers"),
        ({"aoti": True, "opset": 18}, "--opset is for --onnx"),
        ({"diffusers": True, "no_check": True}, "--no-check is for --onnx and --aoti"),
        ({"onnx": True, "vae": "x"}, "--vae is for --diffusers"),
        ({"onnx": True, "size": "0x4"}, "--size takes .* '0x4'"),
        ({"onnx": True, "out": "m.pt2"}, r"\.onnx.*m\.pt2"),
    ],
)
def test_export_options_that_exclude_each_other(values, told):
    with pytest.raises(OptionError, match=told):
        ExportOptions.read({"run": "x", **values})
    assert ExportOptions.read({"run": "x", "onnx": True, "out": "M.ONNX"}).batch is None


def test_a_tilde_is_the_home(monkeypatch):
    """A shell leaves it in --out=~/x, and a folder called ~ is what a user removes the home with."""
    monkeypatch.setenv("HOME", "/home/me")
    options = ShowOptions.read({"run": "~/run", "image": "~nobody-of-that-name/a", "out": "~/b.png"})
    assert [str(path) for path in (options.run, options.image, options.out)] == [
        "/home/me/run",
        "~nobody-of-that-name/a",
        "/home/me/b.png",
    ]


def test_a_help_shows_what_the_presets_fill_in():
    shown = {one.name: one.annotation.__metadata__[0].show_default for one in flags(GeneratorOptions)}
    assert shown["ema"] == "0.999 for pixels, 0.9999 for latents" and shown["weight_decay"] == "0.0"
    shown = {one.name: one.annotation.__metadata__[0].show_default for one in flags(DistillOptions)}
    assert shown["precision"] == "bf16" and shown["beta1"] == "0.9" and shown["segment"] is False
    shown = {one.name: one.annotation.__metadata__[0].show_default for one in flags(SegmentationOptions)}
    assert shown["lr"] == "0.004 for gspn_mobile from random weights, 0.002 for others"
    assert shown["optimizer"] is False
    shown = {one.name: one.annotation.__metadata__[0].show_default for one in flags(Options)}
    assert shown["optimizer"] is False  # its help tells it


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
    for file in (tmp_path / "a.yaml", tmp_path / "a.toml"):
        file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())  # as some editors write it
        assert Options.read(read_file(file)) == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "epoch: 3", r"there is no option 'epoch', did you mean 'epochs'"),
        ("a.yaml", "batchsize: 3", r"no option 'batchsize', did you mean 'batch_size'"),
        ("a.yaml", "epochs: many", r"epochs takes a whole number, got 'many'"),
        ("a.yaml", "epochs: 2.5", r"epochs takes a whole number, got 2\.5"),
        ("a.yaml", "epochs: true", r"epochs takes a whole number, got True"),
        ("a.yaml", "lr: fast", r"lr takes a number, got 'fast'"),
        ("a.yaml", "flip: 1", r"flip takes true or false, got 1"),
        ("a.yaml", "precision: 16", r"precision takes text, got 16"),
        ("a.yaml", "size: big", r"size takes N or HxW in pixels, got 'big'"),
        ("a.yaml", "save_every: often", r"save_every takes a number of steps, minutes such as 15min, or never"),
        ("a.yaml", "epochs: 0", r"epochs must be from 1 to 1000000, got 0"),
        ("a.yaml", "strict: null", "strict takes no null: leave the option out for its default, false"),
        ("a.yaml", "model_args: null", "model_args takes no null: leave the option out for its default, {}"),
        ("a.toml", "epochs = ", r"a\.toml cannot be read"),
        ("a.yaml", "a: [", r"a\.yaml cannot be read"),
        ("a.yaml", "lr: 2024-13-45", r"a\.yaml cannot be read: month must be in 1\.\.12"),
        ("a.yaml", "lr: 2001-01-01 25:61:00", r"a\.yaml cannot be read: hour must be in 0\.\.23"),
        ("a.yaml", "lr: 0b_", r"a\.yaml cannot be read: invalid literal"),
        pytest.param("a.yaml", f"lr: {'9' * 5000}", r"a\.yaml cannot be read: Exceeds the limit", id="5000 digits"),
        pytest.param("a.yaml", f"lr: {'[' * 5000}", r"a\.yaml cannot be read: maximum recursion", id="deep"),
        pytest.param("a.toml", f"lr = {'[' * 5000}", r"a\.toml cannot be read: maximum recursion", id="deep TOML"),
        pytest.param("a.yaml", f"lr: {'9' * 400}", "lr takes a number of at most 308 digits, got 99", id="400 digits"),
        pytest.param("a.yaml", f"size: {'9' * 400}", "size takes N or HxW in pixels, got 99", id="pixels"),
        pytest.param("a.yaml", f"model_args: ['a={'[' * 5000}']", "a value in JSON for a", id="deep JSON"),
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


def test_a_presets_warm_up_leaves_time_for_the_rate_to_fall():
    preset = dict(epochs=30, lr=1e-3, warmup=5.0)
    assert Options().resolved(preset).warmup == 5
    assert Options(epochs=2).resolved(preset).warmup == 1
    assert Options(epochs=2, warmup=2.0).resolved(preset).warmup == 2  # as it was asked for


def test_a_presets_muon_gives_way_to_what_is_asked_for():
    preset = dict(epochs=3, lr=1e-3, optimizer="muon")
    asked = ({}, {"optimizer": "adamw"}, {"fsdp": True})
    assert [Options(**each).resolved(preset).optimizer for each in asked] == ["muon", "adamw", "adamw"]
    assert Options().resolved(dict(epochs=3, lr=1e-3)).optimizer == "adamw"


@pytest.mark.parametrize("name", ["min_lr", "warmup_lr"])
def test_no_rate_is_above_the_highest(name):
    with pytest.raises(OptionError, match=f"{name} has to be at most lr, the highest rate, 0.001: got 1"):
        Options(**{name: 1.0}).resolved(dict(epochs=3, lr=1e-3))


@pytest.mark.parametrize("name", ["min_lr", "warmup_lr"])
def test_a_presets_rates_follow_a_lower_highest_one(name):
    preset = {"epochs": 3, "lr": 1e-3, name: 1e-5}
    rates = [getattr(Options(lr=lr).resolved(preset), name) for lr in (None, 1e-4, 1e-6, 0.0)]
    assert rates == [1e-5, 1e-5, 1e-6, 0.0]


def test_options_that_do_nothing_are_told():
    preset = dict(epochs=3, lr=1e-3)
    assert Options().resolved(preset).idle() == []
    (note,) = Options(lr=0.0).resolved(preset).idle()
    assert "learning rate is 0" in note and "--lr above 0" in note
    idle = Options(keep=3, ema_device="cpu", mix_switch=0.2, warmup=3.0).resolved(preset).idle()
    assert [re.search("warm-up|--keep |--ema-device|--mix-switch", note)[0].strip() for note in idle] == [
        "warm-up",
        "--keep",
        "--ema-device",
        "--mix-switch",
    ]


def test_weights_of_classes_that_cannot_be():
    for bad in ([1, None], [1, [2]], "1,x", "-1,1", "0,0", []):
        with pytest.raises(OptionError, match="class_weights takes none, balanced, or a number for each class"):
            SegmentationOptions.read({"class_weights": bad})


@pytest.mark.parametrize("options", [*TRAININGS, SegmentationOptions])
def test_null_is_for_options_that_may_be_none(options):
    types = get_type_hints(options)
    for name in (one.name for one in dataclasses.fields(options)):
        if type(None) in get_args(types[name]):
            assert getattr(options.read({name: None}), name) is None
        else:
            with pytest.raises(OptionError, match=f"^{name} takes no null: leave the option out for its default, "):
                options.read({name: None})


def test_an_option_that_has_to_be_given_is_not_null():
    with pytest.raises(OptionError, match="size takes no null: give a value"):
        EncodeOptions.read({"size": None})


@pytest.mark.parametrize("options", [*TRAININGS, SegmentationOptions])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1, 1.1])
def test_a_fraction_is_from_0_to_1(options, value):
    with pytest.raises(OptionError, match=f"val_fraction must be from 0 to 1, got {value}"):
        options.check(val_fraction=value)


def test_a_yaml_file_may_merge(tmp_path):
    """What is merged may stand in another mapping, which is made later, and is overridden there too."""
    text = "model_args: {skip: false, a: &s {<<: {width: 8}, width: 16}}\nb: {<<: *s}\nc: {<<: *s, width: 32}"
    (tmp_path / "a.yaml").write_text(text)
    read = read_file(tmp_path / "a.yaml")
    assert (read["model_args"]["a"], read["b"], read["c"]) == ({"width": 16}, {"width": 16}, {"width": 32})


@pytest.mark.parametrize("text", ["lr: 1\nlr: 2", "batch-size: 1\nbatch_size: 2"])
def test_an_option_stands_once_in_a_file(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(OptionError, match="twice"):
        read_file(tmp_path / "a.yaml")


@pytest.mark.parametrize("old", ["/old", "'/old'  # mine", "", ">\n  /o\n  ld\n", '["/old"]', '"/o\n  ld"'])
def test_one_option_of_a_written_file_changes(old):
    before = "# data: here\nmodel_args: {\ndata: 3,\nb: 4}\nnested:\n  data: 5\n"
    text = with_option(f"{before}data: {old}\nepochs: 2\n", "data", "/new: # 'place'")
    expected = {"model_args": {"data": 3, "b": 4}, "nested": {"data": 5}, "data": "/new: # 'place'", "epochs": 2}
    assert text.startswith(before) and yaml.safe_load(text) == expected and text.count("# mine") == old.count("# mine")


OTHER_FILES = ["", "epochs: 2", "- data: 1", "data: [", "a: &x /old\ndata: *x", "data"]
OTHER_FILES += ["data: &x /old\na: *x", "? data\n: x"]  # which a change of the value alone would break


@pytest.mark.parametrize("text", OTHER_FILES)
def test_a_file_without_the_option_stays(text):
    assert with_option(text, "data", "/new") == text
