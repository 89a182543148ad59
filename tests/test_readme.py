"""The README's Python snippets run, word for word, and it is short."""

import json
import re
import statistics
from pathlib import Path

import pytest
from helpers.stable_diffusion import tiny_sd

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


NAMES = ["first", "backbone", "generator", "swap"]


def test_there_are_four():
    assert len(SNIPPETS) == len(NAMES)


@pytest.mark.parametrize(("code", "name"), list(zip(SNIPPETS, NAMES, strict=True)), ids=NAMES)
def test_snippet(code, name, capsys):
    given = {"pipe": tiny_sd()} if name == "swap" else {}  # which readers have
    exec(compile(code, "README.md", "exec"), given)
    if name == "first":
        assert "torch.Size([2, 96, 40, 25]) torch.Size([1, 10])" in capsys.readouterr().out
        assert given["x"].grad.abs().sum() > 0


def test_at_most_900_words():
    assert len(README.split()) <= 900


def test_its_figures_are_the_published_ones():
    growth = json.loads((ROOT / "benchmarks/results/speed/growth-cpu.json").read_text())["growth"]
    forward = {case["side"]: case["contenders"] for case in growth["cases"] if case["pass"] == "forward"}

    def ratio(side, ours):
        samples = (forward[side][name]["samples"] for name in ("attention", ours))
        return statistics.median(theirs / mine for theirs, mine in zip(*samples, strict=True))

    told = re.search(
        r"takes ([\d.]+) times as long as `GSPN2d` at 16 x 16 and (\d+) times at 256 x 256 \(.*; "
        r"([\d.]+) and (\d+) with projections around it\)",
        " ".join(README.split()),
    )
    for short, long, ours in ((told[1], told[2], "gspn"), (told[3], told[4], "gspn + projections")):
        assert short == f"{ratio(16, ours):.1f}" and long == f"{ratio(256, ours):.0f}"


def test_its_table_of_mixers_is_the_published_one():
    """Seeds and accuracy, at the trained size and at 1.5 and 2 times, of the report's first table."""
    report = (ROOT / "benchmarks/results/quality/mixers/report.md").read_text()
    table = report.partition("## classes, bare")[2].partition("Times are")[0]
    published = {cells[0]: cells for cells in _rows(table)}
    told = _rows(README.partition("| mixer |")[2].partition("\n\n")[0])[1:]
    assert len(told) == 6
    for cells in told:
        row = published[cells[0]]
        assert cells[1:] == [row[3], row[5], row[8], row[9]]


def _rows(markdown):
    """The cells of a table's rows."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if line[:1] == "|"]
