"""Progress where there is no terminal: what is said, and when."""

import io
import re
import threading
import time
from itertools import pairwise

import pytest
from helpers.comparing import compare, paint_both
from helpers.diffusion import generator_run
from helpers.encoding import SIZE
from helpers.high_resolution import FEW, PLAIN
from helpers.training import tiny_options
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

import gspn
from gspn.cli import app
from gspn.export.program import Exported
from gspn.options.generators import SampleOptions
from gspn.progress import EVERY, FIRST, Progress
from gspn.sampling.encode import encode
from gspn.sampling.sample import sample
from gspn.stable_diffusion.highres import HighResPipeline
from gspn.tasks.classify import train_classifier


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def lines_of(clock, total, seconds_a_step, steps, done=0, **more):
    """[(seconds after the start, line), ...] of work that takes so many steps of so many seconds."""
    said, start = [], clock.now
    work = Progress("painting", total, "walls", done=done, clock=clock, say=lambda line: said.append(line), **more)
    at = []
    for step in range(1, steps + 1):
        for _ in range(10):  # as the thread would
            clock.now += seconds_a_step / 10
            work.look()
            at += [clock.now - start] * (len(said) - len(at))
        work.update(done + step)
        at += [clock.now - start] * (len(said) - len(at))
    return list(zip(at, said, strict=True))


def test_the_first_line_says_how_long_it_takes_and_others_follow(clock):
    (first, header), *others = lines_of(clock, 100, 2.0, 60)
    assert FIRST - 1 <= first <= FIRST and header == "painting: 2 of 100 walls, 5 s so far, about 3 min in all"
    times = [first, *(at for at, _ in others)]
    assert all(EVERY - 1 <= b - a <= EVERY for a, b in pairwise(times)) and times[-1] > 120 - EVERY
    assert [line for _, line in others] == [
        "painting: 17 of 100 walls, about 3 min left",
        "painting: 31 of 100 walls, about 2 min left",
        "painting: 46 of 100 walls, about 2 min left",
    ]


def test_steps_that_take_longer_than_the_lines_are_waited_for_aloud(clock):
    lines = lines_of(clock, 3, 100.0, 2)
    times = [0.0, *(at for at, _ in lines)]
    assert max(b - a for a, b in pairwise(times)) <= EVERY
    assert lines[0][1] == "painting: 0 of 3 walls, 30 s so far"
    assert lines[3] == (120.0, "painting: 1 of 3 walls, about 3 min left")


def test_a_pause_between_steps_is_no_work_on_those_that_are_left(clock):
    said = []
    work = Progress("painting", 6, "walls", clock=clock, say=said.append)
    for step in range(1, 4):
        clock.now += 8.0
        work.update(step)
    clock.now += 24.0  # as an evaluation takes
    work.update(details="looking at it")
    assert said[-1] == "painting: 3 of 6 walls, looking at it, about 24 s left"


def test_what_was_done_before_does_not_count_for_the_rate(clock):
    ((_, header), *_) = lines_of(clock, 100, 6.0, 1, done=90)
    assert header == "painting: 91 of 100 walls, 6 s so far, about 60 s in all"


def test_what_follows_the_last_step_is_no_part_of_an_estimate(clock):
    assert [line for _, line in lines_of(clock, 1, 4.0, 3)] == ["painting: 1 of 1 walls, 5 s so far"]


def test_short_work_says_nothing_and_work_of_unknown_length_its_time(clock):
    assert lines_of(clock, 10, 0.4, 10) == []
    assert [line for _, line in lines_of(clock, None, 10.0, 8)] == ["painting: 30 s so far", "painting: 60 s so far"]


def test_details_and_own_lines_go_to_the_console(clock):
    console = Console(file=io.StringIO(), soft_wrap=True)
    with Progress("painting", 4, "walls", console=console, clock=clock) as work:
        work.say("blue [bold]now")
        clock.now += 6
        work.update(2, "loss 0.5")
    assert console.file.getvalue().splitlines() == [
        "blue [bold]now",
        "painting: 2 of 4 walls, loss 0.5, 6 s so far, about 12 s in all",
    ]
    with Progress("painting", 4, clock=clock) as work:  # silent
        clock.now += 99
        work.update(3)
        work.say("nothing")


def test_the_thread_speaks_by_itself_and_stops(monkeypatch):
    monkeypatch.setattr("gspn.progress.EVERY", 0.02)
    monkeypatch.setattr("gspn.progress.TICK", 0.01)
    said = []
    with Progress("waiting", say=said.append):
        deadline = time.monotonic() + 30
        while len(said) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    count = len(said)
    time.sleep(0.1)
    assert 3 <= count and len(said) == count


def test_a_terminal_gets_a_bar_and_no_lines(clock):
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Progress("painting", 4, "walls", console=console, clock=clock) as work:
        clock.now += 99
        work.update(2, "loss 0.5")
        work.bar.refresh()
        work.say("own")
    shown = console.file.getvalue()
    assert "2/4" in shown and "loss 0.5" in shown and "own" in shown and "in all" not in shown


@pytest.mark.parametrize("width", [60, 80, 160])
def test_the_bar_of_a_narrow_terminal_keeps_its_numbers(width):
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    with Progress("training", 12000, "steps", console=console) as work:
        work.update(350, "epoch 12/300, loss 1.389, 45.5 images/s")
        console.file.truncate(0)
        work.bar.refresh()
        shown = console.file.getvalue()
    assert "350/12000 steps" in shown and "epoch 12/300" in shown and "left" in shown
    assert ("45.5 images/s" in shown) == (width == 160) and "\n" not in shown


# -- who tells of it --


@pytest.fixture
def talkative(monkeypatch):
    """A line for every step."""
    monkeypatch.setattr("gspn.progress.FIRST", 0.0)
    monkeypatch.setattr("gspn.progress.EVERY", 0.0)


@pytest.fixture
def console():
    return Console(file=io.StringIO(), soft_wrap=True)


def test_training_and_evaluation_tell(talkative, console, tmp_path):
    train_classifier("digits", tmp_path / "run", tiny_options(batch_size=719), console=console)
    said = console.file.getvalue()
    assert "training: 1 of 2 steps, epoch 1/1, loss 2." in said and "evaluating: 359 of 359 images" in said
    result = CliRunner().invoke(app, ["eval", str(tmp_path / "run"), "digits", "--json", "--batch-size", "300"])
    assert "evaluating: 300 of 359 images" in result.stderr and "evaluating" not in result.stdout
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    result = CliRunner().invoke(app, ["predict", str(tmp_path / "run"), *[str(tmp_path / "a.png")] * 2])
    assert "predicting: 1 of 2 images" in result.stderr and "predicting" not in result.stdout


def test_encoding_tells(talkative, console, pictures, vae, tmp_path):
    encode(pictures, vae, tmp_path / "out", shard_size=5, batch_size=2, console=console, **SIZE)
    assert "encoding: 2 of " in console.file.getvalue() or "encoding: 4 of " in console.file.getvalue()


def test_sampling_and_comparing_tell(talkative, console, tmp_path):
    run = generator_run(tmp_path / "run")[0].path
    sample(run, tmp_path / "out", SampleOptions(count=3, steps=2, batch_size=1), console=console)
    assert "sampling: 0.5 of 3 images, step 1/2" in console.file.getvalue()
    painted = paint_both(tmp_path)
    compare(painted.drawn, painted.real, split="all", samples_split="all", console=console)
    assert "reference: " in console.file.getvalue() and "samples: " in console.file.getvalue()


def test_high_resolution_tells(talkative, sd, capsys):
    sd.set_progress_bar_config(disable=False)
    try:
        HighResPipeline(sd)("red fox", stages=[(16, 16), (24, 32)], **FEW | PLAIN)
    finally:
        sd.set_progress_bar_config(disable=True)
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("stage 1/2, 16x16: 2 of 2 steps") for line in lines)
    assert any(line.startswith("stage 2/2, 24x32: 1 of 3 steps") for line in lines)
    assert not any("it/s" in line for line in lines)  # the pipeline's own bar
    HighResPipeline(sd)("red fox", stages=[(16, 16)], **FEW | PLAIN)  # with disable=True
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", ["onnx", "aoti"])
def test_exporting_tells(kind, talkative, monkeypatch, tmp_path):
    train_classifier("digits", tmp_path / "run", tiny_options(batch_size=719))
    monkeypatch.setattr("gspn.progress.TICK", 0.01)

    told, say = threading.Event(), Progress.say

    def saying(self, text):
        say(self, text)
        told.set()

    def export(model, path, **options):
        assert told.wait(60)  # another thread tells of it
        return Exported(path, 8, ((1, 1, 8, 8),), 0.0)

    monkeypatch.setattr(Progress, "say", saying)
    monkeypatch.setattr(gspn, f"export_{kind}", export)
    result = CliRunner().invoke(app, ["export", str(tmp_path / "run"), f"--{kind}"])
    assert re.search(r"exporting: \d+ s so far", result.stderr) and "wrote" in result.stdout, result.output


def test_a_bar_takes_any_text():
    """Paths may hold braces and brackets."""
    console = Console(force_terminal=True, file=io.StringIO(), width=100)
    with Progress("reading samples{1}[red]", 3, unit="{image}", console=console) as progress:
        progress.update(1)
    assert "samples{1}[red]" in console.file.getvalue()
