"""The habits of a terminal: --quiet, completion by a shell, NO_COLOR."""

import json
import os
import subprocess
import sys

import pytest
from diffusers.utils import logging as diffusers_logging
from helpers.masks import FLAGS
from typer.testing import CliRunner

from gspn import progress
from gspn.cli import app
from gspn.models import list_models
from gspn.models.dit import dit_names
from gspn.models.generator import generator_names
from gspn.options.classify import Options
from gspn.options.diffusion import GeneratorOptions
from gspn.places import runs_like

MAIN = "import sys; sys.argv[0] = 'gspn'; from gspn.cli import main; main()"


def in_a_process(*arguments, **environment):
    environment = {**os.environ, "COLUMNS": "100", **environment}
    return subprocess.run([sys.executable, "-c", MAIN, *arguments], env=environment, capture_output=True, text=True)


def completed(*words):
    """What bash is offered for the last of the words."""
    environment = dict(_GSPN_COMPLETE="complete_bash", COMP_WORDS=" ".join(words), COMP_CWORD=str(len(words) - 1))
    return in_a_process(**environment).stdout.split()


def test_quiet_leaves_results_and_errors(masked, tmp_path):
    def run(*arguments):
        result = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
        return result.exit_code, result.stdout, result.stderr

    folder = tmp_path / "run"
    flags = (*FLAGS, "--epochs", "1", "--batch-size", "6", "--workers", "0", "--size", "24x32", "--out", folder)
    code, out, _ = run("train-segmentation", masked, *flags, "--quiet")
    assert code == 0 and "epoch" not in out and f"in {folder}" in out and len(out.splitlines()) == 1
    assert progress.quiet
    code, out, err = run("eval", folder, masked, "--workers", "0", "--json", "-q")
    assert code == 0 and "miou" in json.loads(out) and not err
    code, out, err = run("eval", tmp_path / "none", masked, "-q")
    assert code == 2 and "none" in err and not out
    code, out, _ = run("train-segmentation", masked, *flags, "--overwrite")
    assert code == 0 and "epoch   1" in out and not progress.quiet


@pytest.mark.parametrize("quiet", [False, True])
def test_quiet_holds_for_the_bars_of_the_libraries(monkeypatch, quiet):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(progress, "quiet", quiet)
    before = diffusers_logging.is_progress_bar_enabled()
    diffusers_logging.enable_progress_bar()
    with progress.bars_on_terminals_only():
        assert diffusers_logging.is_progress_bar_enabled() != quiet
    assert diffusers_logging.is_progress_bar_enabled()
    if not before:
        diffusers_logging.disable_progress_bar()


def test_a_shell_is_offered_commands_and_values():
    assert {"train", "train-segmentation", "train-diffusion"} == set(completed("gspn", "train"))
    assert completed("gspn", "train", "digits", "--model", "gspn_t") == ["gspn_tiny"]
    assert completed("gspn", "train", "digits", "--precision", "b") == ["bf16"]
    assert completed("gspn", "train-diffusion", "digits", "--model", "GSPN-DiT-X") == ["GSPN-DiT-XL/2", "GSPN-DiT-XL/4"]


def test_all_models_are_offered_and_no_other():
    def offered(options):
        return set(options.__dataclass_fields__["model"].metadata["complete"])

    assert offered(Options) == set(list_models())
    assert offered(GeneratorOptions) == {*generator_names(), *dit_names()}


def test_runs_are_offered(tmp_path, monkeypatch):
    for name, content in [("runs/a", {"format": 1}), ("runs/[b", {"format": 1}), ("runs/x", {}), ("c", {"format": 1})]:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    assert runs_like("") == ["c", "runs/[b", "runs/a"] and runs_like("ru") == ["runs/[b", "runs/a"]
    assert runs_like("runs/a") == ["runs/a"] and runs_like("runs/[") == ["runs/[b"] and runs_like("./c") == ["./c"]
    assert runs_like(f"{tmp_path}/runs/a") == [f"{tmp_path}/runs/a"] and runs_like("nothing/") == []
    assert completed("gspn", "eval", "runs/a") == completed("gspn", "train", "--resume", "runs/a") == ["runs/a"]


@pytest.mark.parametrize("arguments", [["eval", "none", "digits"], ["no-command"]], ids=str)
def test_no_color_is_respected(arguments):
    coloured = in_a_process(*arguments, FORCE_COLOR="1", NO_COLOR="")
    plain = in_a_process(*arguments, FORCE_COLOR="1", NO_COLOR="1")
    assert coloured.returncode == plain.returncode == 2
    assert "31m" in coloured.stderr  # red
    assert plain.stderr and "31m" not in plain.stderr
