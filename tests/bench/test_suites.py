"""What is measured, what is left out and why: on a machine whose clock is made up."""

import importlib
import json
from types import SimpleNamespace

import pytest
import torch

from gspn.bench import figures, suites, tables
from gspn.bench.contenders import CONTENDERS, OURS, Contender
from gspn.bench.measuring import Cpu, Gpu, WrongResult


class Machine(Cpu):
    """A CPU on which no call is made for its time: each takes `seconds`, and memory is endless."""

    free = 1e9

    def __init__(self, seconds=1e-3):
        self.threads, self.seconds = 1, seconds

    def rounds(self, calls, rounds, once):
        return {name: [self.seconds * (2 if name == "attention" else 1)] * rounds for name in calls}

    def free_mib(self):
        return self.free


@pytest.fixture
def small(monkeypatch):
    """Suites of tiny cases, whose memory is made up too. No time passes, so that a busy machine does the same."""
    monkeypatch.setattr(suites, "time", SimpleNamespace(monotonic=lambda: 100.0))
    monkeypatch.setattr(suites, "LAYERS", ((8, 4, 6),))
    monkeypatch.setattr(suites, "CHANNELS", 8)
    monkeypatch.setattr(suites, "FIRST_SIDE", 2)
    monkeypatch.setattr(suites, "SIDES", (32, 48))
    monkeypatch.setattr(suites, "MODELS", ("gspn_micro",))
    monkeypatch.setattr(suites, "in_own_process", lambda function, *arguments: 1.5)
    monkeypatch.setattr(importlib.import_module("gspn.bench.figures"), "MODELS", ("gspn_micro",))
    no_timm = lambda name: (_ for _ in ()).throw(ModuleNotFoundError(f"no {name}"))  # noqa: E731
    monkeypatch.setattr(suites, "import_module", no_timm)


def run(*names, machine=None, minutes=1.0, **options):
    return suites.run(names, machine or Machine(), minutes=minutes, **options)


@pytest.mark.parametrize(
    ("costs", "left", "kept"),
    [
        ({"a": 1, "b": 1}, 2, {"a", "b"}),
        ({"a": 1, "b": 2}, 2, {"a"}),
        ({"a": 2}, 2, {"a"}),
        ({"a": 3}, 2, set()),
        ({"a": 0}, -1, set()),
        ({"a": 30, "b": 1, "c": 1, "d": 1, "e": 1}, 100, set("bcde")),  # more than a quarter of what is left
        ({"a": 30, "b": 1, "c": 1}, 100, set("abc")),
        ({}, 1, set()),
    ],
)
def test_the_most_expensive_do_not_fit(costs, left, kept):
    assert suites.affordable(costs, left) == kept


def test_exponents_are_those_of_the_three_largest_maps():
    sides = [16, 32, 64, 128]
    assert suites.exponent(sides, [1, 1, 16, 256]) == 2.0
    assert suites.exponent(sides, [5, *(side**2 for side in sides[1:])]) == 1.0
    assert suites.exponent(sides[:2], [1, 2]) is None
    assert suites.exponent(sides, [0, 0, 1, 2]) is None  # memory that is too small to be seen


@pytest.mark.parametrize(
    ("ratios", "side"),
    [
        ([2, 3, 4], 16),
        ([0.5, 2, 4], 22.6),  # halfway between 16 and 32
        ([2, 0.5, 2], 45.3),  # the last time
        ([0.5, 2, 0.9], None),
        ([0.1, 0.2, 0.3], None),
        ([], None),
    ],
)
def test_a_crossover_is_where_the_other_falls_behind_for_good(ratios, side):
    assert suites.crossover([16, 32, 64][: len(ratios)], ratios) == side


def test_everything_is_measured_saved_and_drawn(small, tmp_path):
    saved = []
    results = run(
        "layer", "growth", "models", last_sides={"forward": 16, "training": 4},
        save=lambda results: saved.append(json.dumps(results)),
    )  # fmt: skip
    assert json.loads(saved[-1]) == json.loads(json.dumps(results)) and len(saved) > 6
    assert [(case["shape"], case["pass"]) for case in results["layer"]] == [
        ((1, 8, 4, 6), "forward"),
        ((1, 8, 4, 6), "training"),
    ]
    row = results["layer"][0]["contenders"]
    assert list(row) == list(CONTENDERS) and row["attention"]["ratio"] == [2, 2, 2] and row[OURS]["ms"] == [1, 1, 1]
    assert len(row[OURS]["samples"]) == 9
    growth = results["growth"]
    assert [(case["side"], case["pass"]) for case in growth["cases"]] == [
        (2, "forward"), (2, "training"), (4, "forward"), (4, "training"), (8, "forward"), (16, "forward"),
    ]  # fmt: skip
    assert growth["exponents"]["forward"][OURS] == {"time": 0.0, "memory": 0.0}
    assert growth["crossovers"]["forward"]["attention"] == {"behind from side": 2.0, "compared up to side": 16}
    assert growth["crossovers"]["forward"]["depthwise 7x7"]["behind from side"] is None
    assert growth["cases"][0]["contenders"]["attention"]["extra_mib"] == 1.5
    models = results["models"]["cases"]
    assert [case["side"] for case in models] == [32, 48]
    assert models[0]["models"]["gspn_micro"]["images/s"] == 1000 and models[0]["models"]["gspn_micro"]["macs"] > 1e6
    (absent,) = results["left out"]
    assert absent["what"] == "ConvNeXt-T, Swin-T, DeiT-S" and "gspn[timm]" in absent["why"]
    assert figures.draw(results, tmp_path) == ["layer.png", "growth.png", "models.png"]
    assert all((tmp_path / f"{name}.png").stat().st_size > 10_000 for name in ("layer", "growth", "models"))
    assert [table.row_count for table in tables.tables(results)] == [7, 7, 7, 2]


def test_one_legend_names_what_some_panels_lack(small, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure))
    results = run("layer", "models")
    results["layer"] = [case for case in results["layer"] if case["pass"] == "forward"]
    for case in results["models"]["cases"]:
        del case["models"]["gspn_micro"]["images/s"]
    figures.draw(results, tmp_path)
    told = [[text.get_text() for text in figure.legends[0].get_texts()] for figure in drawn]
    assert told == [[name for name in CONTENDERS if name != OURS], ["gspn_micro"]]


class OnGpu(Gpu):
    """A GPU that is not there: tensors have shapes only."""

    device = torch.device("meta")

    def __init__(self):
        self.looked = 0

    def rounds(self, calls, rounds, once):
        return {name: [1e-3] * rounds for name in calls}

    def wait(self):
        pass

    def free_mib(self):
        return 1e9

    def extra_mib(self, run):
        self.looked += 1
        return 3.0


def test_on_a_gpu_memory_is_read_in_this_process(small, monkeypatch):
    monkeypatch.setattr(suites, "BATCH", {"meta": 16})
    monkeypatch.setattr(suites, "environment", lambda: {"cpu": "a CPU", "gpu": "NVIDIA X"})
    monkeypatch.setattr(suites, "check_layer", lambda module, x: None)
    monkeypatch.setattr(suites, "in_own_process", None)
    machine = OnGpu()
    results = run("layer", "growth", "models", machine=machine, last_sides={"forward": 4, "training": 4})
    assert results["title"] == "NVIDIA X" and results["threads"] is None and results["clock"] == "CUDA events"
    assert results["layer"][0]["shape"] == (16, 8, 4, 6)
    assert results["growth"]["cases"][3]["contenders"]["attention"]["extra_mib"] == 3.0
    assert results["models"]["cases"][1]["models"]["gspn_micro"]["images/s"] == 16_000
    assert machine.looked == 4 * len(CONTENDERS) + 2


def test_nothing_is_begun_when_the_time_is_up(small, tmp_path):
    results = run("layer", "growth", "models", minutes=0.0)
    assert not results["layer"] and not results["growth"]["cases"] and not results["models"]["cases"]
    assert {each["why"] for each in results["left out"] if "timm" not in each["why"]} == {"no time was left"}
    whats = [each["what"] for each in results["left out"] if each["suite"] == "growth"]
    assert len(whats) == 2 * len(CONTENDERS) and "gspn, training, 2x2" in whats
    assert figures.draw(results, tmp_path) == [] and tables.tables(results) == []
    assert len(tables.reasons(results)) == 4  # a line for each suite, and one for timm


def test_what_would_take_too_long_is_left_out_but_for_the_rest(small, monkeypatch):
    """Attention is expected to grow with the square of the pixels."""
    monkeypatch.setattr(suites.Session, "seconds_of", lambda session, call: 0.04)
    results = run("growth", last_sides={"forward": 8, "training": 1})
    sides = {name: [c["side"] for c in results["growth"]["cases"] if name in c["contenders"]] for name in CONTENDERS}
    assert sides["attention"] == [2, 4, 8] and sides[OURS] == [2, 4, 8]
    results = run("growth", minutes=0.1, last_sides={"forward": 8, "training": 1})
    sides = {name: [c["side"] for c in results["growth"]["cases"] if name in c["contenders"]] for name in CONTENDERS}
    assert sides["attention"] == [2] and sides[OURS] == [2, 4, 8]
    (left,) = results["left out"]
    assert left["what"] == "attention, forward, from 4x4 on" and left["why"] == "would take about 3 s of the 6 s left"


def test_the_map_grows_no_further_than_the_memory(small, monkeypatch):
    machine = Machine()
    monkeypatch.setattr(machine, "free", 8.0, raising=False)  # each takes 1.5 MiB; expected are then 6 of 6.4
    results = run("growth", machine=machine, last_sides={"forward": 4, "training": 1})
    assert [case["side"] for case in results["growth"]["cases"]] == [2, 4] and len(results["left out"]) == 0
    monkeypatch.setattr(machine, "free", 7.0, raising=False)
    results = run("growth", machine=machine)
    assert {case["side"] for case in results["growth"]["cases"]} == {2}
    assert all("MiB" in each["why"] for each in results["left out"]) and len(results["left out"]) == 2 * len(CONTENDERS)


def test_a_contender_that_fails_is_left_out_and_gspn_is_not(small, monkeypatch):
    def broken(channels):
        raise RuntimeError("no such kernel\nmore")

    monkeypatch.setitem(CONTENDERS, "depthwise 7x7", Contender(broken))
    monkeypatch.setattr(suites, "parameters", lambda channels: {})
    results = run("layer")
    assert "depthwise 7x7" not in results["layer"][0]["contenders"]
    assert results["left out"][0]["why"] == "failed: no such kernel"
    monkeypatch.setitem(CONTENDERS, OURS, Contender(broken))
    with pytest.raises(RuntimeError, match="no such kernel"):
        run("layer")


def test_a_case_that_the_system_ends_stops_its_contender_only(small, monkeypatch):
    def memory(function, name, *rest):
        if name == "linear attention":
            raise MemoryError("ended")
        return 1.0

    monkeypatch.setattr(suites, "in_own_process", memory)
    results = run("growth", last_sides={"forward": 4, "training": 1})
    assert all("linear attention" not in case["contenders"] for case in results["growth"]["cases"])
    assert len(results["growth"]["cases"]) == 2
    assert [each["why"] for each in results["left out"]] == ["out of memory: ended"]


def test_a_wrong_layer_is_not_timed(small, monkeypatch):
    original = suites.gspn.GSPN2d.forward

    def forward(layer, x):
        return original(layer, x) * (1 if layer.backend == "reference" else 1.01)

    monkeypatch.setattr(suites.gspn.GSPN2d, "forward", forward)
    for suite in ("layer", "growth"):
        with pytest.raises(WrongResult, match=r"1\.00e-02, allowed 1e-04"):
            run(suite)


def test_growth_adds_what_earlier_results_lack(small):
    first = run("growth", only=[OURS], last_sides={"forward": 4, "training": 2})
    second = run("growth", only=[OURS, "attention"], last_sides={"forward": 8, "training": 2}, earlier=[first])
    cases = [(case["side"], case["pass"]) for case in second["growth"]["cases"]]
    assert cases == [(2, "forward"), (2, "training"), (4, "forward"), (8, "forward")]
    for case, before in zip(second["growth"]["cases"], first["growth"]["cases"], strict=False):
        assert list(case["contenders"]) == [OURS, "attention"] and list(before["contenders"]) == [OURS]
        assert case["contenders"][OURS] == before["contenders"][OURS]
    assert "ratio" in second["growth"]["cases"][3]["contenders"]["attention"]  # measured in turns with GSPN
    assert "ratio" not in second["growth"]["cases"][0]["contenders"]["attention"]
    assert second["growth"]["exponents"]["forward"][OURS]["time"] == 0.0
    assert first["growth"]["exponents"]["forward"][OURS]["time"] is None
    other = run("growth", only=["attention"], last_sides={"forward": 4, "training": 1})
    joined = run("growth", last_sides={"forward": 1, "training": 1}, earlier=[first, other])["growth"]["cases"]
    assert [(case["side"], list(case["contenders"])) for case in joined] == [
        (2, [OURS, "attention"]), (2, [OURS]), (4, [OURS, "attention"]),
    ]  # fmt: skip
    assert second["earlier"][0]["machine"] == first["machine"]


@pytest.mark.parametrize("dtype", suites.DTYPES)
def test_every_dtype_passes_the_check(dtype):
    x = torch.randn(1, 8, 6, 5).to(suites.DTYPES[dtype])
    suites.check_layer(suites.gspn.GSPN2d(8).to(x.dtype), x)


def test_multiply_adds_are_counted_from_shapes():
    """Four times the pixels take four times the multiply-adds, but for the head."""
    small, large = (suites.macs("gspn_micro", side) for side in (32, 64))
    assert 3.9 < large / small < 4


@pytest.mark.timm
def test_models_of_timm_count_as_published_and_take_other_sizes():
    published = {"ConvNeXt-T": 4.5e9, "Swin-T": 4.5e9, "DeiT-S": 4.6e9}
    for name, macs in published.items():
        assert abs(suites.macs(name, 224) / macs - 1) < 0.02
        with torch.device("meta"):
            assert suites.build(name, 384)(torch.empty(1, 3, 384, 384)).shape == (1, 1000)
