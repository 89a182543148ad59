"""What studies of many runs share: single runs, settings of a folder, differences on the same examples, where the code
came from, tables."""

import argparse
import json
from typing import NamedTuple

import pytest

pytest.importorskip("matplotlib")

from benchmarks.harness import harness, plots, study


def test_a_difference_averages_each_example_over_the_seeds_first():
    """Two equal seeds tell no more than one: the error stays what it is, and nothing spreads."""
    pair = [1.0, 2.0, 3.0], [2.0, 2.0, 5.0]
    mean, error, of_seeds = study.difference([pair])
    assert (mean, of_seeds) == (1.0, [1.0]) and error == pytest.approx(1 / 3**0.5)
    assert study.difference([pair, pair]) == (mean, error, [1.0, 1.0])
    mean, error, of_seeds = study.difference([pair, (pair[0], [1.0, 4.0, 3.0])])  # examples: 0.5, 1 and 1
    assert (mean, error) == (pytest.approx(5 / 6), pytest.approx(1 / 6)) and of_seeds == [1.0, pytest.approx(2 / 3)]
    with pytest.raises(ValueError, match="shorter"):
        study.difference([([1.0, 2.0], [1.0])])


class Run(NamedTuple):
    contender: str
    rate: float
    seed: int
    steps: int = 800

    @property
    def stem(self):
        return f"{self.contender}-{self.rate:g}-{self.seed}-{self.steps}"


def test_single_runs_are_made_by_name(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    study.add_options(parser, tmp_path, Run, ("dit", "ours"))
    runs = parser.parse_args(["--runs", "contender=dit,rate=1e-2,seed=0", "contender=ours,rate=2,seed=1,steps=4"]).runs
    assert runs == [Run("dit", 0.01, 0), Run("ours", 2.0, 1, 4)]
    made = []
    train = lambda run: made.append(run) or run._asdict()  # noqa: E731
    for _ in range(2):  # the second time they are there
        study.work(tmp_path, Run, lambda done: [Run("dit", 0.5, 0)], train, str, 60, runs)
    assert made == runs and set(study.read(tmp_path, Run)) == set(runs)
    for text, told in (
        ("contender=dit,rate=1", "expected contender=str,rate=float,seed=int,steps=int, got 'contender=dit,rate=1'"),
        ("contender=dit,rate=x,seed=0", "rate=float"),
        ("contender=dit,rate=1,seed=0,colour=red", "got 'contender=dit,rate=1,seed=0,colour=red'"),
        ("contender=vit,rate=1,seed=0", "expected a contender of dit, ours, got 'vit'"),
    ):
        with pytest.raises(SystemExit):
            parser.parse_args(["--runs", text])
        assert told in capsys.readouterr().err


def test_a_folder_holds_runs_of_one_setting(tmp_path, capsys):
    usual = {"factors": None, "optimizer": "adamw"}

    def asked(*given):
        parser = argparse.ArgumentParser()
        study.add_options(parser, tmp_path, Run, ("dit",))
        parser.add_argument("--optimizer")
        parser.add_argument("--factors", nargs=2, type=float)
        return study.settings(parser, parser.parse_args(given), usual)

    def refused(*given):
        with pytest.raises(SystemExit):
            asked(*given)
        return capsys.readouterr().err

    muon, sizes = ("--optimizer", "muon"), ("--factors", "0.75", "1.5")
    other = {"factors": [0.75, 1.5], "optimizer": "muon"}
    assert asked() == usual and asked(*muon, *sizes) == other
    (tmp_path / "a.json").write_text("{}")  # of before: the usual settings
    assert asked() == usual and asked("--report") == asked("--list") == usual
    assert "a.json has optimizer adamw, expected muon: runs of other" in refused(*muon)
    assert "a.json has factors none, expected [0.75, 1.5]" in refused(*sizes)
    assert "expected muon" in refused(*muon, "--report")
    (tmp_path / "b.json").write_text(json.dumps(other))
    for option in ("--report", "--list"):
        assert "b.json has factors [0.75, 1.5], expected none" in refused(option)
    (tmp_path / "a.json").unlink()
    assert asked(*muon, *sizes) == other and asked("--report") == usual
    assert "expected none" in refused() and "b.json has optimizer muon, expected adamw" in refused(*sizes)


def test_commits_of_code_with_uncommitted_changes_are_marked():
    of = [("b" * 40, False), ("a" * 40, True), ("b" * 40, True), ("b" * 40, False), ("", False)]
    contents = [{"environment": {"commit": commit, "uncommitted_changes": changed}} for commit, changed in of]
    marked = "aaaaaaaa with uncommitted changes, bbbbbbbb, bbbbbbbb with uncommitted changes, unknown"
    assert study.commits(contents) == marked


def test_uncommitted_changes_are_those_of_the_code(monkeypatch):
    """And not of results and documents, which no run depends on."""
    asked = []
    monkeypatch.setattr(harness, "_git", lambda *arguments: asked.append(arguments) or "")
    assert harness.environment()["uncommitted_changes"] is False
    assert ("status", "--porcelain", "--", "src", ":(glob)benchmarks/**/*.py") in asked


def test_the_table_of_times_tells_who_had_fewer_rounds(tmp_path):
    case = {"size (B,C,H,W,S)": (1, 8, 4, 4, 2), "dtype": "float32", "pass": "train"}
    times = {"gspn": {"ms": [1, 2, 3], "ratio": [1, 1, 1]}, "unfused": {"ratio": [3, 4, 5], "rounds": 1}}
    environment = dict.fromkeys(("cpu", "cores", "torch", "commit", "date"), "a")
    content = {"environment": environment, "rounds": 5, "cases": [case | {"1 thread": times}]}
    plots.table(content, tmp_path / "a.md")
    text = (tmp_path / "a.md").read_text()
    assert "of 5 interleaved rounds, or of as many as stand in brackets." in text
    assert "| B1 C8 4x4 S2 | train | float32 | 1 | 2.00 | 4.00 (1) |  |" in text
    del times["unfused"]["rounds"]
    plots.table(content, tmp_path / "a.md")
    assert "brackets" not in (tmp_path / "a.md").read_text()
