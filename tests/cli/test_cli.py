"""The gspn command, as a user meets it: output, messages, exit codes."""

import errno
import json
import shutil
import subprocess
import sys

import pytest
import torch
from helpers.fresh import fresh
from helpers.training import same
from PIL import Image
from typer.testing import CliRunner

import gspn
from gspn import plots
from gspn.cli import app, main
from gspn.cli.training import arguments_of
from gspn.data.labelled import open_data
from gspn.metrics.features import load_extractor
from gspn.options import TASKS, OptionError, read_file
from gspn.train.run import Run

TINY = [
    argument
    for pair in ("depths=[1]", "width=8", "global_levels=[0]", "stem_stride=4")
    for argument in ("--model-arg", pair)
]


def gspn_command(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "digits"
    code, out, err = gspn_command("train", "digits", "--out", path, "--epochs", 2, "--lr", 0.01, *TINY)
    assert code == 0, err
    assert "1,438 training and 359 test images of 10 classes, 8x8, grey" in out
    assert out.count("validation loss") == 2 and "images/s" in out and "top-1" in out and "predictions.png" in out
    return path


@pytest.fixture(scope="module")
def digit_files(tmp_path_factory):
    split, folder = open_data("digits").splits["test"], tmp_path_factory.mktemp("digits")
    for i in range(40):
        (folder / str(int(split.labels[i]))).mkdir(exist_ok=True)
        split.image(i).save(folder / str(int(split.labels[i])) / f"{i}.png")
    return folder


def test_version_help_and_backends():
    lines = gspn_command("--version")[1].splitlines()
    assert lines[:2] == [f"gspn {gspn.__version__}", f"torch {torch.__version__}"]
    assert lines[2:] == gspn_command("backends")[1].splitlines()
    code, out, _ = gspn_command("--help")
    assert code == 0 and all(name in out for name in ("train", "eval", "predict", "show", "backends"))
    for name in ("train", "eval", "predict", "show"):
        assert gspn_command(name, "--help")[0] == 0
    lines = gspn_command("backends")[1].splitlines()
    assert lines[0].startswith("reference: available") and len(lines) == len(gspn.available_backends())
    assert all(status.reason in line for status, line in zip(gspn.available_backends().values(), lines, strict=True))


def test_eval(run, digit_files):
    code, out, err = gspn_command("eval", run, "digits", "--json")
    metrics = json.loads(out)
    assert code == 0 and err == "" and metrics["images"] == 359 and metrics["split"] == "test"
    code, out, _ = gspn_command("eval", run, digit_files, "--checkpoint", "last")
    assert code == 0 and "40 (all)" in out


def test_predict_of_png_files_agrees_with_the_data_set(run, digit_files):
    files = sorted(digit_files.rglob("*.png"))
    code, out, _ = gspn_command("predict", run, *files, "--json", "--top", 10)
    answers = json.loads(out)
    assert code == 0 and [answer["image"] for answer in answers] == [str(file) for file in files]
    assert all(sum(c["probability"] for c in answer["classes"]) == pytest.approx(1, abs=1e-4) for answer in answers)
    right = [answer["classes"][0]["name"] == file.parent.name for answer, file in zip(answers, files, strict=True)]
    metrics = json.loads(gspn_command("eval", run, digit_files, "--json")[1])
    assert sum(right) / len(right) == pytest.approx(metrics["top1"])
    code, out, _ = gspn_command("predict", run, files[0])
    assert code == 0 and out.startswith(f"{files[0]}: ") and out.count("%") == 5


def test_predict_of_any_kind_of_file(run, tmp_path):
    for mode in ("1", "L", "RGB", "RGBA", "P", "CMYK", "I;16"):
        Image.new(mode, (31, 17)).save(tmp_path / f"{mode}.tiff")
    code, out, err = gspn_command("predict", run, *sorted(tmp_path.iterdir()))
    assert code == 0 and err == "" and out.count("tiff: ") == 7


def test_a_mistyped_checkpoint(run):
    code, _, err = gspn_command("eval", run, "digits", "--checkpoint", "bets")
    assert code == 2 and "has no checkpoint 'bets', did you mean 'best'? It has best, last" in " ".join(err.split())


def test_eval_options_that_cannot_be(run):
    for option, value, message in [
        ("--batch-size", 0, "batch_size must be from 1 to 1000000, got 0"),
        ("--channels", 3, "channels is 3, but the model of"),
    ]:
        code, _, err = gspn_command("eval", run, "digits", option, value)
        assert code == 2 and message in err


def test_eval_takes_a_size_once_and_data_that_have_a_name(run, tmp_path):
    code, out, err = gspn_command("eval", run, "digits", "--sizes", "8,12,8x8", "--out", tmp_path / "out")
    assert code == 2 and "sizes holds 8x8 more than once" in err and out == "" and not (tmp_path / "out").exists()
    code, _, err = gspn_command("eval", run, "")  # which as a path is the current folder
    assert code == 2 and "DATA is empty: expected `digits`" in err


def test_probabilities_that_are_not_finite_are_an_error(run, digit_files, monkeypatch):
    forward, calls = gspn.models.Backbone.forward, []

    def broken(self, images):
        calls.append(images)
        return forward(self, images) * (torch.nan if len(calls) == 2 else 1)

    monkeypatch.setattr(gspn.models.Backbone, "forward", broken)
    files = sorted(digit_files.rglob("*.png"))[:3]
    for more in (["--json"], []):
        calls.clear()
        code, out, err = gspn_command("predict", run, *files, *more)
        assert code == 2 and out == "" and "not finite for 1 of 1 images: its weights are damaged" in err


@pytest.mark.parametrize(
    "command, name, error",
    [
        ("predict", "models.Backbone.forward", RuntimeError("the kernel")),
        ("predict", "data.images.Preprocessing.__call__", ZeroDivisionError("the sizes")),
        ("predict", "data.images.decode", MemoryError("no memory")),
        ("show", "data.images.decode", OSError(errno.EMFILE, "too many open files")),
    ],
)
def test_what_fails_elsewhere_is_not_an_unreadable_image(run, digit_files, monkeypatch, command, name, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(f"gspn.{name}", fail)
    with pytest.raises(type(error), match=str(error.args[-1])):
        gspn_command(command, run, next(digit_files.rglob("*.png")))


def test_paths_are_printed_as_they_are(run, tmp_path):
    moved = tmp_path / "m[red]r"
    shutil.copytree(run, moved)
    code, out, _ = gspn_command("eval", moved, "digits")
    assert code == 0 and "m[red]r on digits" in out.replace("\n", "")


def test_the_run_folder_of_a_file_may_be_in_the_home(monkeypatch, tmp_path):
    """As DATA may. A folder called ~ is what a user removes the home with."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "options.yaml").write_text("data: digits\nout: ~/runs/first\n")
    data, run, _ = arguments_of(TASKS["classification"], None, None, None, tmp_path / "options.yaml", {})
    assert (data, run) == ("digits", tmp_path / "runs" / "first")


def test_a_run_in_the_home_is_resumed_and_gives_features(monkeypatch, run):
    monkeypatch.setenv("HOME", str(run.parent))
    code, _, err = gspn_command("train", f"--resume=~/{run.name}", "--epochs", 1000)
    assert code == 2 and "epochs" in err and "resumed" in err  # it was found, and refuses another length
    code, _, err = gspn_command("train", "digits", "--config=~/gone.yaml")
    assert code == 2 and str(run.parent / "gone.yaml") in err
    assert load_extractor(f"classifier:~/{run.name}").class_names == Run.open(f"~/{run.name}").config["class_names"]


@pytest.mark.parametrize("name", ["n" * 300, f"./{'n' * 300}", "~nobody-of-that-name/x"])
def test_paths_that_the_system_refuses(run, digit_files, name, tmp_path):
    """A name that is too long, the home of an unknown user: one line, as for a folder without permission."""
    reason = "home directory" if name.startswith("~") else "too long"
    good = next(digit_files.rglob("*.png"))
    code, out, err = gspn_command("predict", run, name, good)
    assert code == 1 and reason in err and f"{good}: " in out
    for arguments in (
        ("train", name, "--out", tmp_path / "run"),
        ("eval", run, name),
        ("eval", name, "digits"),
        ("show", run, name),
        ("encode", "digits", "--vae", name, "--size", 8, "--out", tmp_path / "latents"),
        ("fid", name, "--reference", "digits", "--features", f"classifier:{run}"),
    ):
        code, _, err = gspn_command(*arguments)
        assert code == 2 and reason in err, arguments


def test_predict_names_what_it_cannot_read(run, digit_files, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    good = next(digit_files.rglob("*.png"))
    code, out, err = gspn_command("predict", run, good, tmp_path / "bad.png", tmp_path / "gone.png")
    assert code == 1 and "bad.png: unreadable" in out and f"{good}: " in out and "%" in out
    assert "2 of 3 images could not be read" in err and "gone.png: there is no such file" in err
    assert "bad.png: cannot identify image file" in err
    code, out, err = gspn_command("predict", run, tmp_path / "gone.png", good, "--json")
    gone, read = json.loads(out)
    assert code == 1 and gone == {"image": str(tmp_path / "gone.png"), "error": "there is no such file"}
    assert len(read["classes"]) == 5 and "gone.png: there is no such file" in err
    for more in (["--strict", good], []):
        code, out, err = gspn_command("predict", run, tmp_path / "bad.png", *more)
        assert code == 2 and "bad.png" in err and out == ""


def test_an_error_without_a_text_is_told_by_its_kind(run, digit_files, monkeypatch):
    def fail(path):
        raise EOFError

    monkeypatch.setattr("gspn.data.images.decode", fail)
    file = next(digit_files.rglob("*.png"))
    for command in ("predict", "show"):
        code, _, err = gspn_command(command, run, file)
        assert code == 2 and str(file) in err and ": EOFError" in err


MISSING = {
    "predict {run} gone.png": "gone.png",
    "predict gone x.png": "gone/config.json",
    "eval gone digits": "gone/config.json",
    "eval {run} ./gone": "./gone",
    "eval {run}s digits": "did you mean {run}?",
    "show {run} gone.png": "gone.png",
    "export gone --onnx": "gone/config.json",
    "train ./gone": "./gone",
    "train {run}s": "did you mean {run}?",
    "train --resume gone": "gone/config.json",
    "train digits --resume gone": "gone/config.json",
    "train digits --init-from gone": "gone",
    "train --config gone.yaml": "gone.yaml",
    "train-diffusion ./gone": "./gone",
    "train-diffusion --resume gone": "gone/config.json",
    "sample gone --out s": "gone/config.json",
    "sample {run} --out s --vae ./gone": "./gone",
    "encode ./gone --vae v --size 8 --out l": "./gone",
    "encode digits --vae ./gone --size 8 --out l": "./gone",
    "fid gone.npz --reference digits": "gone.npz",
    "fid digits --reference gone.safetensors": "gone.safetensors",
    "fid digits --reference digits --features classifier:gone": "gone/config.json",
    "fid digits --reference digits --features inception,gone.pth": "gone.pth",
    "distill ./gone --data x": "./gone",
    "distill x --data ./gone": "./gone",
    "distill --resume gone": "gone/config.json",
}
MISNAMED = {  # files to write whose names are not of their format, and what they should end in
    "show {run} x.png --out c.jpg": ".png",
    "export {run} --onnx --out m.pt2": ".onnx",
    "export {run} --aoti --out m.onnx": ".pt2",
    "fid digits --reference digits --save s.npz": ".safetensors",
    "fid digits --reference digits --out result": ".json",
}


def test_what_is_missing_or_misnamed_is_told_before_torch_is_imported(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = """
import json, sys
from typer.testing import CliRunner
from gspn.cli import app
results = [CliRunner().invoke(app, line.split()) for line in json.loads(sys.argv[1])]
print(json.dumps(["torch" in sys.modules, [[result.exit_code, result.stdout, result.stderr] for result in results]]))
"""
    told = MISSING | MISNAMED
    lines = [line.format(run=run) for line in told]
    result = subprocess.run([sys.executable, "-c", code, json.dumps(lines)], capture_output=True, text=True, check=True)
    imported, answers = json.loads(result.stdout)
    for line, missing, (code, out, err) in zip(lines, told.values(), answers, strict=True):
        assert code == 2 and missing.format(run=run) in err and out == "", (line, err)
    assert not imported and not list(tmp_path.iterdir())


def test_show(run, digit_files, tmp_path):
    image = next(digit_files.rglob("*.png"))
    code, out, _ = gspn_command("show", run, image, "--place", "2,5", "--block", "0", "--out", tmp_path / "c.png")
    assert code == 0 and (tmp_path / "c.png").exists() and "c.png" in out
    assert gspn_command("show", run, image)[0] == 0 and (run / f"context-{image.stem}.png").exists()
    assert gspn_command("show", run, image, "--out", tmp_path / "new" / "folder" / "c.png")[0] == 0
    for bad, message in {"8,8": "not on the 8x8 image", "middle": "takes ROW,COL"}.items():
        code, _, err = gspn_command("show", run, image, "--place", bad, "--out", tmp_path / "d.png")
        assert code == 2 and message in err
    code, _, err = gspn_command("show", run, image, "--block", "9", "--out", tmp_path / "d.png")
    assert code == 2 and "block has to be" in err
    code, _, err = gspn_command("show", run, tmp_path / "gone.png")
    assert code == 2 and "gone.png cannot be read as an image" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "/no/such/folder"], "there is no /no/such/folder; expected `digits`"),
        (["train", "digits", "--model", "gspn_huge"], "there is no model 'gspn_huge', did you mean 'gspn_base'"),
        (["train", "digits", "--model-arg", "width"], "takes KEY=VALUE, got 'width'"),
        (["train", "digits", "--size", "big"], "takes N or HxW in pixels, got 'big'"),
        (["train", "digits", "--class-names", "a,a"], "takes distinct names"),
        (["train", "digits", "--class-names", "a,b"], "2 class names were given for 10 classes"),
        (["train", "digits", "--precision", "fp8"], "precision must be fp32 or bf16, got 'fp8'"),
        (["train", "digits", "--epochs", "-1"], "epochs must be from 1"),
        (["train", "digits", "--val-fraction", "1"], "val_fraction must be above 0 and below 1, got 1.0"),
        (["eval", "/no/such/run", "digits"], "/no/such/run is no run"),
        (["predict", "/no/such/run", "x.png"], "/no/such/run is no run"),
        (["train"], "Missing argument 'DATA'"),
    ],
)
def test_user_errors_are_one_message_and_exit_code_2(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = gspn_command(*arguments)
    assert code == 2 and "Traceback" not in err and message in " ".join(err.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["train", "digits", "--out", ""], "after '--out'"),
        (["eval", "", "digits"], "after 'eval'"),
        (["--out="], "--out="),
    ],
)
def test_an_empty_argument_is_not_the_current_folder(arguments, named, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gspn", *arguments])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert f"{named} is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--ignore", ""], ["--ignore="], ["--out=a/lr="], ["--model-arg", "a="], ["--", "--out="]]
)
def test_what_may_be_empty_or_is_not(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gspn", "train-segmentation", "nothing", *arguments])
    with pytest.raises(SystemExit):
        main()
    assert "is empty" not in capsys.readouterr().err


def test_a_runs_options_repeat_it(run, tmp_path, monkeypatch):
    for name in ("curves", "predictions", "context"):
        monkeypatch.setattr(plots, name, lambda *args: None)
    code, out, err = gspn_command("train", "--config", run / "options.yaml", "--out", tmp_path / "again")
    assert code == 0, err
    assert (
        "waiting for data" in out
        and (tmp_path / "again" / "options.yaml").read_text() == (run / "options.yaml").read_text()
    )
    one, other = (Run.open(path).load_checkpoint("last")[0] for path in (run, tmp_path / "again"))
    assert all(same(one[part], other[part]) for part in one)


def test_flags_override_the_file_and_the_file_is_checked(run, tmp_path):
    (tmp_path / "mine.toml").write_text('data = "digits"\nepochs = 1\nlr = -1.0\n')
    code, _, err = gspn_command("train", "--config", tmp_path / "mine.toml", "--out", tmp_path / "run", *TINY)
    assert code == 2 and "mine.toml: lr must be from 0" in " ".join(err.split())
    (tmp_path / "mine.toml").write_text("data = 5")
    code, _, err = gspn_command("train", "--config", tmp_path / "mine.toml")
    assert code == 2 and "mine.toml: data takes text, got 5" in " ".join(err.split())
    (tmp_path / "mine.toml").write_text(f'data = "digits"\nout = "{tmp_path}/run"\nepochs = 7\nlearningrate = 1\n')
    code, _, err = gspn_command("train", "--config", tmp_path / "mine.toml")
    assert code == 2 and "mine.toml: there is no option 'learningrate'; there are" in " ".join(err.split())
    (tmp_path / "mine.toml").write_text(f'data = "digits"\nout = "{tmp_path}/run"\nepochs = 7\nbatch-size = 512\n')
    code, _, err = gspn_command("train", "--config", tmp_path / "mine.toml", "--epochs", 1, *TINY)
    assert code == 0, err
    assert len(Run.open(tmp_path / "run").metrics) == 1
    assert Run.open(tmp_path / "run").config["options"]["batch_size"] == 512


def test_model_arg_adds_to_those_of_the_file(tmp_path):
    (tmp_path / "t.yaml").write_text("data: digits\nmodel_args: {width: 8}\n")
    given = (TASKS["classification"], None, None, tmp_path / "run", tmp_path / "t.yaml")
    assert arguments_of(*given, {"model_args": ["depths=[1, 1]"]})[2].model_args == {"width": 8, "depths": [1, 1]}
    with pytest.raises(OptionError, match="KEY=VALUE"):
        arguments_of(*given, {"model_args": ["depths"]})


def test_resume(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    code, out, err = gspn_command("train", "--resume", copy, "--workers", 0)
    assert code == 0 and "going on from its end, step 22: nothing is left to do" in out, err
    code, _, err = gspn_command("train", "--resume", copy, "--lr", 0.5)
    assert code == 2 and "lr was 0.01 and cannot be 0.5" in " ".join(err.split())
    code, _, err = gspn_command("train", "--resume", copy, "--out", tmp_path / "other")
    assert code == 2 and "leave out --out" in " ".join(err.split())
    code, _, err = gspn_command("train", "--resume", tmp_path)
    assert code == 2 and "is no run" in " ".join(err.split())


@pytest.mark.parametrize("kept", ["last", "nothing"])
def test_a_stopped_run_in_the_way_is_gone_on_with(run, tmp_path, kept):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    state = copy / "checkpoints" / "last" / "state.json"
    if kept == "nothing":
        shutil.rmtree(copy / "checkpoints")
    else:
        content = json.loads(state.read_text())
        content["position"] |= {"epoch": 1, "batch": 3}
        state.write_text(json.dumps(content))
    code, _, err = gspn_command("train", "digits", "--out", copy)
    told = " ".join(err.split())
    assert code == 2 and told.index(f"gspn train --resume {copy}") < told.index("--overwrite")
    assert ("in epoch 2 of 2" if kept == "last" else "before its first checkpoint") in told
    config = json.loads((copy / "config.json").read_text())
    for changes in ({"task": "foreign"}, {"format": 99}):  # what --resume would refuse
        (copy / "config.json").write_text(json.dumps(config | changes))
        assert "--resume" not in gspn_command("train", "digits", "--out", copy)[2]


def test_eval_says_that_a_size_is_far_and_what_it_wrote(run, tmp_path):
    code, out, err = gspn_command("eval", run, "digits", "--sizes", "8,9,12", "--out", tmp_path / "e")
    assert code == 0 and err.count("far from") == 1 and "12x12 is far from 8x8" in err and "1.50 times" in err
    written = sorted(file.name for file in (tmp_path / "e").iterdir())
    assert len(written) == 6 and all(name in out for name in written) and "HxW" not in out
    code, out, _ = gspn_command("eval", run, "digits", "--sizes", "6", "--json")
    assert json.loads(out)["size"] == [6, 6] and json.loads(out)["trained_size"] == [8, 8]


def test_a_runs_options_mean_the_same_in_another_folder(run, digit_files, tmp_path, monkeypatch):
    monkeypatch.chdir(digit_files.parent)
    shutil.copytree(run, "start", dirs_exist_ok=True)
    few = ["--epochs", 1, "--batch-size", 16, "--workers", 0]
    code, _, err = gspn_command("train", digit_files.name, "--init-from", "start", "--out", tmp_path / "one", *few)
    assert code == 0, err
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    options = read_file(tmp_path / "one" / "options.yaml")
    assert options["data"] == str(digit_files) and options["init_from"] == str(digit_files.parent / "start")
    code, _, err = gspn_command("train", "--config", tmp_path / "one" / "options.yaml", "--out", "two")
    assert code == 0, err
    one, other = (Run.open(path).load_checkpoint("last")[0]["model"] for path in (tmp_path / "one", "two"))
    assert same(one, other)


def test_run_in_the_way_and_overwrite(run, digit_files, tmp_path):
    before = (run / "config.json").read_text()
    code, _, err = gspn_command("train", "digits", "--out", run)
    assert code == 2 and "is not empty" in err and (run / "config.json").read_text() == before
    assert "--resume" not in err  # there is nothing left to do
    copy = tmp_path / "m[red]r"
    shutil.copytree(run, copy)
    train = [
        "train",
        digit_files,
        "--out",
        copy,
        "--epochs",
        1,
        "--batch-size",
        8,
        "--workers",
        0,
        "--overwrite",
        *TINY,
    ]
    code, out, err = gspn_command(*train, "--lr", "1e30", "--clip", 0)
    assert code == 1 and (copy / "config.json").read_text() == before
    assert f"the earlier run is back in {copy}" in " ".join(out.split())
    code, out, _ = gspn_command(*train)
    assert code == 0 and (copy / "config.json").read_text() != before and f"in {copy}: checkpoints" in out


def test_a_training_that_diverges_is_exit_code_1(tmp_path):
    code, _, err = gspn_command("train", "digits", "--out", tmp_path / "run", "--lr", "1e30", "--clip", 0, *TINY)
    assert code == 1 and "at step" in err and "there is no checkpoint yet" in err


def test_strict_and_warning_of_unreadable_images(digit_files, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(digit_files, data)
    bad = next(data.rglob("*.png"))
    bad.write_bytes(bad.read_bytes()[:60])
    code, _, err = gspn_command("train", data, "--out", tmp_path / "run", "--epochs", 1, "--batch-size", 8, *TINY)
    assert code == 0 and "warning: 1 unreadable image left out" in err and str(bad) in " ".join(err.split())
    code, _, err = gspn_command(
        "train", data, "--out", tmp_path / "strict", "--epochs", 1, "--batch-size", 8, "--strict", *TINY
    )
    assert code == 2 and "unreadable image (--strict)" in err


def test_as_a_module_and_without_the_extra(run):
    result = subprocess.run([sys.executable, "-m", "gspn", "--version"], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.startswith(f"gspn {gspn.__version__}\ntorch ")
    code = "import sys; sys.modules['typer'] = None; import gspn; from gspn.cli import main"
    result = fresh(code, check=False)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert 'need typer: install with pip install "gspn[train]"' in result.stderr
    code = "import importlib.util as u; find = u.find_spec; "
    code += "u.find_spec = lambda name, *more: None if name == 'diffusers' else find(name, *more); "
    code += "import sys; from gspn.cli import main; sys.argv = ['gspn', 'train-diffusion', 'digits']; main()"
    result = fresh(code, check=False)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert 'generation needs diffusers: install with pip install "gspn[diffusion]"' in result.stderr
