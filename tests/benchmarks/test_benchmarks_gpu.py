"""The GPU benchmarks without a GPU: the whole path rehearsed, and what decides about figures and verdicts."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_report
from benchmarks.harness import gpu_harness, harness, plots_gpu
from benchmarks.speed import cases_gpu, layer_gpu
from benchmarks.speed.cases_gpu import LINES, OURS, Case

pytest.importorskip("triton")  # Linux has it

ROOT = Path(__file__).parents[2]
HEAD = {"environment": {"commit": "c", "gpu": "g"}}
REHEARSAL = gpu_harness.Rehearsal()


def python(*arguments, limit=600):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=limit, check=False
    )


@pytest.mark.slow
def test_the_rehearsal_measures_every_section(tmp_path):
    result = python("-m", "benchmarks.speed.layer_gpu", "--rehearse", "--tune", "--out", str(tmp_path))
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-3000:]
    content = json.loads((tmp_path / "layer-gpu.json").read_text())
    assert content["rehearsal"] and "not a measurement" in content["what"]
    sections = content["sections"]
    assert content["compiled beforehand"] == 1
    assert set(sections) == {"gate", "copy", "scan", "layer", "models", "tune"} and content["left"] == []
    for name, row in sections["scan"].items():
        contenders = {OURS, LINES, cases_gpu.REFERENCE} if "per channel" in name else {OURS}
        assert contenders <= {n for n, r in row.items() if isinstance(r, dict) and r.get("ms")}, (name, row)
        assert row[OURS]["errors"] and "of copy" in row[OURS]
        assert LINES not in contenders or (row[OURS]["graph"]["ms"] and row[LINES]["graph"]["ms"])
    for section in ("layer", "models"):
        for name, row in sections[section].items():
            assert {"gspn", "attention", "linear attention"} <= {
                n for n, r in row.items() if isinstance(r, dict) and "ms" in r
            }, name
    assert all("winner" in row for row in sections["tune"].values())
    assert all("errors" in row[OURS] for row in sections["gate"].values())
    assert {g["verdict"] for g in content["goals"]} == {"not measured"}
    assert "not a measurement" in (tmp_path / "layer-gpu.md").read_text()
    assert len(list(tmp_path.glob("*.png"))) == 3


GRADIENTS = """
import torch
from benchmarks.contenders import peers_gpu
from gspn.kernels import reference
for shape, groups in (((2, 4, 3, 3), 4), ((1, 6, 2, 4), 3)):
    batch, channels, height, width = shape
    x, gate = torch.randn(shape), torch.randn(batch, 4, *shape[1:])
    logits, grad = torch.randn(batch, 4, groups, 3, height, width), torch.randn(batch, 4, *shape[1:])
    scan = peers_gpu.LineLaunches(x, gate, logits, train=True)
    for buffer in [*scan.h, *(b for out in scan.grads for b in out)]:
        buffer.fill_(float("nan"))
    scan.forward()
    scan.backward(scan.stacked(grad))
    same = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    same(scan.unstacked(scan.h), reference.gated_scan(x, gate, logits, [0, 1, 2, 3], None))
    weights = [scan.unstacked([out[k] for out in scan.grads]) for k in (3, 4, 5)]
    for d in range(4):
        full = logits[:, d].repeat_interleave(channels // groups, 1)
        normal = reference.normalize_weights(full, d)
        h = reference.line_scan(x * gate[:, d], normal, d, None)
        dx, dweights = reference.line_scan_backward(grad[:, d], normal, h, d, None)
        same(scan.gate_gradient()[:, d], dx * x)
        same(torch.stack([w[:, d] for w in weights], 2), dweights)
"""


COMPILES = """
import triton
from triton.backends.compiler import GPUTarget
from benchmarks.contenders import peers_gpu
for kernel in (peers_gpu._line_forward, peers_gpu._line_backward):
    numbers = dict.fromkeys(("t", "rows", "places", "lines"), "i32") | {"BLOCK": "constexpr"}
    signature = {name: numbers.get(name, "*bf16") for name in kernel.arg_names}
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs={"BLOCK": peers_gpu.BLOCK})
    options = {"num_warps": peers_gpu.BLOCK // 32}
    print(kernel.__name__, len(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"]))
"""


def test_the_kernel_with_one_launch_a_line_compiles():
    result = python("-c", "import os; os.environ.pop('TRITON_INTERPRET', None)\n" + COMPILES)
    assert result.returncode == 0, result.stderr[-3000:]


def test_the_kernel_with_one_launch_a_line_is_right_in_all_gradients():
    environment = "import os; os.environ['TRITON_INTERPRET'] = '1'\n"
    result = python("-c", environment + GRADIENTS)
    assert result.returncode == 0, result.stderr[-3000:]


def test_without_a_gpu_the_command_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["layer_gpu", "--out", str(tmp_path)])
    assert layer_gpu.main() == 2
    assert "--rehearse" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_lost_device_is_followed_by_a_fresh_process_for_what_is_left(tmp_path, monkeypatch):
    from benchmarks.speed import suite_gpu

    class Gone(Exception):
        pass

    def execv(path, arguments):
        raise Gone(path, *arguments)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_harness, "Gpu", lambda: None)
    monkeypatch.setattr(suite_gpu, "measure_all", lambda *_: fails(gpu_harness.DeviceLost("illegal access"))())
    monkeypatch.setattr(layer_gpu.os, "execv", execv)
    monkeypatch.setattr(sys, "argv", ["layer_gpu", "--out", str(tmp_path), "--only", "scan", "--minutes", "5"])
    with pytest.raises(Gone) as gone:
        layer_gpu.main()
    path, *arguments, minutes = gone.value.args
    assert path == sys.executable and 4.9 < float(minutes) <= 5
    assert arguments[1:3] == ["-m", "benchmarks.speed.layer_gpu"] and arguments[-2:] == ["--resume", "--minutes"]


def test_bytes_are_those_of_the_design():
    floor = lambda *case: round(Case(case[0], cases_gpu.SIZES[case[0]], *case[1:]).bytes_moved / 3e12 * 1e6)  # noqa: E731
    assert floor("a", "float32", False, False) == 4295 and floor("a", "bfloat16", False, False) == 2147
    assert floor("a", "bfloat16", True, False) == 1208
    assert floor("b1", "bfloat16", False, True) == 1285 and floor("b1", "bfloat16", True, True) == 745
    assert Case("p1", cases_gpu.SIZES["p1"], "float32", True, False).channels_a_group == 7  # 196 channels


def test_every_size_is_measured_and_those_with_goals_first():
    full, quick = cases_gpu.cases(False, False), cases_gpu.cases(True, False)
    assert len(cases_gpu.SIZES) == 19 and len(set(full)) == 19 * 2 * 2 * 2
    assert {c.size for c in quick} == set(cases_gpu.SIZES) and set(quick) < set(full)
    assert {c.size for c in full[: 5 * 8]} == set(cases_gpu.FIRST)


def test_goals_are_reached_missed_or_not_measured():
    case = lambda size: str(Case(size, cases_gpu.SIZES[size], "bfloat16", False, False))  # noqa: E731
    row = lambda ms, share: {"ms": [ms] * 3, "of copy": share}  # noqa: E731
    scan = {
        case("b1"): {OURS: row(1, 0.85)},
        case("c1"): {OURS: row(1, 0.59)},
        case("a"): {OURS: row(2, 0.65), LINES: row(90, 0.02) | {"graph": {"ms": [1, 81, 90]}}},
        case("d2"): {OURS: {"why": "not measured: out of memory"}},
    }
    layer = {
        "crossover: B2 C640 32x32, bfloat16, forward": {"side": 32, "gspn": row(1, 0), "attention": row(0.5, 0)},
        "crossover: B2 C640 16x16, bfloat16, forward": {"side": 16, "gspn": row(1, 0), "attention": row(0.5, 0)},
    }
    verdicts = {g["goal"]: (g["verdict"], g["measured"]) for g in cases_gpu.goals(scan, layer)}
    share = "share of copy bandwidth, forward, bfloat16, "
    assert verdicts[share + "B128 C96 56x56"] == ("reached", "85%")
    assert verdicts[share + "B128 C96 56x56 (stretch)"][0] == "missed"
    assert verdicts[share + "B2 C640 64x64"] == ("missed", "59%")
    assert verdicts[share + "B256 C1152 32x32"] == verdicts[share + "B128 C192 28x28"] == ("not measured", None)
    assert verdicts["times the speed of one launch a line, B16 C8 1024x1024"] == ("reached", "40.5")
    assert [v[0] for g, v in verdicts.items() if "fair" in g] == ["missed"]
    assert [v for g, v in verdicts.items() if "attention" in g] == [("missed", "0.50")]


class Measured(gpu_harness.Rehearsal):
    """A machine that records failures as a GPU does, with a clock that tells each call's own number."""

    rehearsal = False

    def round(self, calls):
        return {name: run() for name, run in calls}


def fails(error):
    def run():
        raise error

    return run


def test_one_contenders_failure_is_a_result(capsys):
    found = gpu_harness.measure(
        Measured(),
        {
            "ours": lambda: 1e-3,
            "slower": lambda: 3e-3,
            "slow": lambda: 0.5,
            "big": fails(torch.OutOfMemoryError("CUDA out of memory. Tried")),
            "broken": fails(ValueError("no such thing\nmore")),
            "wrong": fails(gpu_harness.WrongResult("h is wrong")),
        },
        "ours",
        seconds=0.1,
    )
    assert found["slower"]["ratio"] == [3, 3, 3] and found["slow"]["ratio"][1] == 500 and found["slow"]["rounds"] == 3
    assert found["ours"]["graph"]["ms"][1] == 1 and "graph" not in found["slow"]
    assert found["big"]["why"] == "not measured: out of memory (CUDA out of memory)"
    assert found["broken"]["why"] == "not measured: ValueError: no such thing"
    assert gpu_harness.wrong_results({"scan": {"case": found}}) == [
        "scan: case, wrong: not measured: wrong: h is wrong"
    ]
    assert gpu_harness.best_ms({"ms": [1, 2, 3], "graph": {"ms": [1, 1.5, 2]}}) == 1.5
    assert gpu_harness.best_ms(found["big"]) is None


def test_ours_missing_leaves_times_without_ratios():
    found = gpu_harness.measure(Measured(), {"ours": fails(ValueError("gone")), "other": lambda: 1e-3}, "ours", 0.1)
    assert "ratio" not in found["other"] and found["other"]["ms"][1] == 1


def test_the_clock_of_a_gpu_is_two_events_around_a_call_with_a_cold_cache(monkeypatch):
    done = []
    properties = SimpleNamespace(
        L2_cache_size=2**20, name="stand-in", total_memory=2**33, multi_processor_count=3, uuid="0"
    )

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append("event")

        def elapsed_time(self, end):
            return 2.0

    stand_in = SimpleNamespace(
        get_device_properties=lambda: properties,
        Event=Event,
        synchronize=lambda: done.append("wait"),
        memory_allocated=lambda: 5 * 2**20,
        max_memory_allocated=lambda: 8 * 2**20,
        reset_peak_memory_stats=lambda: done.append("reset"),
        empty_cache=lambda: None,
    )
    monkeypatch.setattr(gpu_harness.Gpu, "device", torch.device("cpu"))
    monkeypatch.setattr(torch, "cuda", stand_in)
    gpu = gpu_harness.Gpu()
    assert 4 * gpu._other.numel() >= 64 * 2**20  # a small cache is no reason to fill little
    monkeypatch.setattr(gpu, "cool", lambda: done.append("cool"))
    seconds = gpu.round([("one", lambda: done.append("one")), ("two", lambda: done.append("two"))])
    assert seconds == {"one": 2e-3, "two": 2e-3}
    assert done == ["cool", "event", "one", "event", "cool", "event", "two", "event", "wait"]
    assert gpu.extra_mib(lambda: None) == 3.0 and done[-2:] == ["reset", "wait"]
    told = gpu.describe()
    assert told["name"] == "stand-in" and told["memory_gib"] == gpu.memory_gib() == 8 and "nvidia-smi" in told
    gpu.free()
    gpu.check()
    monkeypatch.setattr(stand_in, "synchronize", fails(RuntimeError("illegal memory access")))
    with pytest.raises(gpu_harness.DeviceLost, match="illegal"):
        gpu_harness.attempt(gpu, fails(RuntimeError("illegal memory access")))


def test_a_lost_device_is_not_a_result():
    lost = SimpleNamespace(rehearsal=False, check=fails(gpu_harness.DeviceLost("illegal access")))
    with pytest.raises(gpu_harness.DeviceLost):
        gpu_harness.attempt(lost, fails(RuntimeError("illegal access")))


def test_a_rehearsal_hides_nothing():
    with pytest.raises(ValueError, match="a bug"):
        gpu_harness.attempt(REHEARSAL, fails(ValueError("a bug")))


def test_results_outlive_a_crash_and_end_at_the_deadline(tmp_path):
    path = tmp_path / "r.json"
    results = gpu_harness.Results(path, HEAD, minutes=1)
    assert results.case("scan", "one", lambda: {"ms": 1})["ms"] == 1
    with pytest.raises(gpu_harness.DeviceLost):
        results.case("scan", "two", fails(gpu_harness.DeviceLost("gone")))
    again = gpu_harness.Results(path, HEAD, minutes=1, resume=True)
    assert again.case("scan", "one", fails(AssertionError("measured twice")))["ms"] == 1
    assert again.case("scan", "two", fails(AssertionError("tried twice"))) == {"why": "not measured: the process died"}
    late = gpu_harness.Results(path, HEAD, minutes=0, resume=True)
    assert late.case("scan", "three", fails(AssertionError("begun too late"))) is None
    assert late.content["left"] == ["scan: three"]
    with pytest.raises(ValueError, match="another commit"):
        gpu_harness.Results(path, {"environment": {"commit": "d", "gpu": "g"}}, 1, resume=True)


def test_an_unfinished_file_can_be_read(tmp_path):
    head = {"rehearsal": False, "packages": {}, "device before": {"name": "GPU"}}
    head["environment"] = {"torch": "2", "python": "3", "commit": "", "date": "today"}
    results = gpu_harness.Results(tmp_path / "r.json", head, 1)
    results.case("scan", "one", lambda: {"gib": 3.5, "gspn": {"ms": [1, 2, 3], "of copy": 0.5}})
    text = plots_gpu.document(json.loads((tmp_path / "r.json").read_text()))
    assert "| one, 3.5 GiB | 2 (50%) |" in text and "commit unknown" in text


def test_the_report_goes_on_after_a_failure(tmp_path):
    code = lambda text: [sys.executable, "-c", text]  # noqa: E731
    steps = [
        gpu_report.Step("fails", code("print('so it ends'); raise SystemExit(3)"), 300),
        gpu_report.Step("hangs", ["sh", "-c", "echo begun; sleep 600"], 2),
        gpu_report.Step("absent", None, 1, why="no such tool"),
        gpu_report.Step(
            "passes", code("import os; print(os.environ['EXTRA'], os.environ['PYTHONPATH'])"), 300, {"EXTRA": "seen"}
        ),
        gpu_report.correctness()[0]._replace(name="skips", command=code("print('43 skipped, 1 warning')")),
        gpu_report.correctness()[0]._replace(name="tests", command=code("print('40 passed, 3 skipped')")),
    ]
    rows = [gpu_report.run(step, tmp_path) for step in steps]
    verdicts = ["failed (3)", "cut after 2 s", "not run", "passed", "failed (it checked nothing)", "passed"]
    assert [r["verdict"] for r in rows] == verdicts
    assert [r["last_line"] for r in rows[:3]] == ["so it ends", "begun", "no such tool"]
    assert rows[3]["last_line"].startswith(f"seen {ROOT / 'src'}")  # the sources are used where they lie
    assert (tmp_path / "hangs.log").read_text() == "begun\n"
    assert "| hangs | cut after 2 s |" in gpu_report.summary(rows, "all")


def test_the_report_fits_its_time():
    limits = {part: sum(s.limit_s for s in steps) for part, steps in (
        ("correctness", gpu_report.correctness()), ("speed", gpu_report.speed(Path("out"), "", False))
    )}  # fmt: skip
    assert max(limits.values()) <= 600


def test_an_official_kernel_that_is_none_is_told(tmp_path):
    from benchmarks.contenders import official_gpu

    assert official_gpu.load(tmp_path)[0] is None and "no .cpp" in official_gpu.load(tmp_path)[1]["why"]


def test_an_official_kernel_is_checked_and_called(tmp_path, monkeypatch):
    from torch.utils import cpp_extension

    from benchmarks.contenders import official_gpu
    from benchmarks.speed import scan_gpu

    (tmp_path / "kernel.cpp").write_text("// built by the test's stand-in")
    monkeypatch.setattr(cpp_extension, "load", lambda name, sources, **_: SimpleNamespace(sources=sources))
    assert "adapter.py is missing" in official_gpu.load(tmp_path)[1]["why"]
    (tmp_path / "adapter.py").write_text(
        "import torch\n"
        "from gspn.kernels import reference\n"
        "def prepare(extension, x, gate, weights):\n"
        "    assert extension.sources and all(t.is_contiguous() for t in (x, gate, *weights))\n"
        "    return lambda: reference.line_scan(x * gate, torch.stack(weights, 2), 0, None)\n"
    )
    make, found = official_gpu.load(tmp_path)
    case = Case("toy", (2, 4, 3, 5), "float32", False, False)
    inputs = scan_gpu.problem(case, torch.device("cpu"))
    calls, errors = make(REHEARSAL, case, inputs)
    assert errors["h"] < 1e-6 and len(calls["official"]()) == 2 and found["exports"] == ["sources"]
    (tmp_path / "adapter.py").write_text("def prepare(extension, x, gate, weights):\n    return lambda: x * gate\n")
    with pytest.raises(gpu_harness.WrongResult):
        official_gpu.load(tmp_path)[0](REHEARSAL, case, inputs)


def test_unwritten_memory_is_seen():
    from benchmarks.speed import scan_gpu

    with scan_gpu.poisoned():
        assert torch.empty(4).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
    case = Case("toy", (1, 8, 2, 2), "float32", False, False)
    inputs = scan_gpu.problem(case, torch.device("cpu"))
    h = scan_gpu.scan_of(REHEARSAL, "reference")[0](*inputs[:3], cases_gpu.DIRECTIONS, None)
    assert scan_gpu.gate(case, inputs, h, None, 1e-5)["h"] < 1e-6
    h[0, 3, 5, 1, 1] = float("nan")
    with pytest.raises(gpu_harness.WrongResult, match="nan"):
        scan_gpu.gate(case, inputs, h, None, 1e-5)


def test_the_json_is_whole_or_not_there(tmp_path):
    harness.write_json(tmp_path / "a.json", {"a": 1}, quiet=True)
    with pytest.raises(TypeError):
        harness.write_json(tmp_path / "a.json", {"a": object()}, quiet=True)
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
