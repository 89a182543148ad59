"""`gspn bench` as a user meets it."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from helpers.fresh import fresh
from typer.testing import CliRunner

from gspn.bench import measuring, suites
from gspn.cli import app

IN_OWN_PROCESS = suites.in_own_process


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(suites, "LAYERS", ((8, 4, 6),))
    monkeypatch.setattr(suites, "time", SimpleNamespace(monotonic=lambda: 100.0))  # none passes
    monkeypatch.setattr(suites, "in_own_process", lambda function, *arguments: 1.5)  # each takes seconds to import
    monkeypatch.setattr(measuring.gc, "collect", lambda: 0)  # half a second each, before every round
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def bench(*arguments):
    result = CliRunner().invoke(app, ["bench", *map(str, arguments)], catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


def test_results_pictures_and_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr(suites, "in_own_process", IN_OWN_PROCESS)
    code, out, err = bench("layer", "--threads", 1, "--minutes", 0.5, "--out", tmp_path / "new")
    assert code == 0 and not err, err
    results = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert results["threads"] == 1 and results["dtype"] == "fp32" and results["machine"]["gspn"]
    assert set(results["layer"][0]["contenders"]["gspn"]) == {"samples", "ms", "ratio"}
    assert (tmp_path / "new" / "layer.png").exists() and not (tmp_path / "new" / "growth.png").exists()
    assert "linear attention" in out and results["title"] in out and "bench.json, layer.png" in out


def test_earlier_results_stay_unless_told_otherwise(tmp_path):
    (tmp_path / "growth.png").write_text("mine")
    code, _, err = bench("layer", "--minutes", 0.1, "--out", tmp_path)
    assert code == 2 and "growth.png is there already" in err and "--overwrite" in err
    assert [file.name for file in tmp_path.iterdir()] == ["growth.png"]
    assert bench("layer", "--minutes", 0.5, "--out", tmp_path, "--overwrite")[0] == 0
    assert {file.name for file in tmp_path.iterdir()} - {".lock"} == {"bench.json", "layer.png"}


def test_a_new_folder_in_runs_by_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert bench("layer", "--threads", 1, "--minutes", 0.5)[0] == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("bench-") and (folder / "bench.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["layers"], "there is no suite 'layers', did you mean 'layer'? There are layer, growth, models"),
        (["--minutes", 0], "minutes must be from 0.1 to 100000, got 0.0"),
        (["--minutes", "nan"], "minutes must be from 0.1"),
        (["--threads", 0], "threads must be from 1"),
        (["--threads", 100_000], "the cores of this machine, got 100000"),
        (["--dtype", "fp8"], "dtype must be fp32, bf16 or fp16, got 'fp8'"),
        (["--device", "tpu"], "device must be cpu or cuda, got 'tpu'"),
        (["--device", "cuda", "--threads", 1], "--threads is for the CPU"),
    ],
)
def test_wrong_options(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = bench(*arguments)
    assert code == 2 and message.replace("fp32, bf16 or fp16", "fp32 or bf16 or fp16") in err, err
    assert len(err.splitlines()) == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(tmp_path):
    code, _, err = bench("--device", "cuda", "--out", tmp_path / "new")
    assert code == 2 and "no CUDA device" in err and not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = bench("layer", "--out", tmp_path / "file" / "new")
    assert code == 2 and "cannot make the folder" in err and len(err.splitlines()) == 1


def test_a_wrong_layer_ends_it(tmp_path, monkeypatch):
    def wrong(module, x):
        raise suites.WrongResult("the layer differs from the reference: relative error 1.00e+00, allowed 1e-04")

    monkeypatch.setattr(suites, "check_layer", wrong)
    code, _, err = bench("layer", "--threads", 1, "--out", tmp_path)
    assert code == 1 and "differs from the reference" in err and not (tmp_path / "layer.png").exists()


INTERRUPTED = """
import signal, sys
from gspn.bench import measuring, suites
from gspn.cli import app

signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in a shell's background ignores it

def waiting(*_):
    print("begun", flush=True)
    measuring.in_own_process(eval, "print('inside', flush=True) or __import__('time').sleep(3600)")

suites.in_own_process = waiting
app(["bench", "growth", "--threads", "1", "--out", sys.argv[1]])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured on Linux only")
@pytest.mark.parametrize("moment", ["begun", "inside"])
def test_an_interrupt_ends_all_processes_without_a_traceback(moment, tmp_path):
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path / "out")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as process:
        while moment not in process.stdout.readline():
            assert process.poll() is None
        time.sleep(1)  # at first the server imports, which takes longer
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        try:
            _, err = process.communicate(timeout=600)  # all processes have closed their outputs
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == 130 and "Traceback" not in err, err


def test_the_help_names_the_suites_and_importing_gspn_measures_nothing():
    _, out, _ = bench("--help")
    assert all(word in out for word in ("layer", "growth", "models", "--minutes", "--threads"))
    code = "import sys, gspn; gspn.GSPN2d; print([m for m in sys.modules if m.startswith('gspn.bench')])"
    result = fresh(code)
    assert result.stdout == "[]\n"
