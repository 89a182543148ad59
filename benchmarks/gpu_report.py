"""Reports on this library on a machine with a GPU: are its kernels right, and how fast are they?

    python -m benchmarks.gpu_report --out DIR                     everything, 18.5 minutes at most
    python -m benchmarks.gpu_report --out DIR --part correctness  the GPU tests, and compute-sanitizer's checks
    python -m benchmarks.gpu_report --out DIR --part speed        the benchmark's quick form

It needs torch, triton and pytest. gspn need not be installed: its sources are imported from this folder. Each step has
its own time limit and its own log in DIR. A failed step does not stop the next. DIR/report-PART.md lists the verdict of
each step. The exit status is 0 only if all passed. A step whose tool is missing is "not run", which is no pass.
"""

import argparse
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SANITIZERS = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")  # where it is when it is not on the path


class Step(NamedTuple):
    """A command, its time limit, and a regular expression that the log of a pass matches. The command is None if it
    cannot be run; ``why`` is then the reason."""

    name: str
    command: list[str] | None
    limit_s: int
    environment: dict[str, str] | None = None
    why: str = ""
    proof: str = ""  # status 0 is not enough: if all tests are skipped, nothing has passed


def correctness() -> list[Step]:
    smoke = [sys.executable, "tests/tools/triton_smoke.py"]
    search_path = os.pathsep.join([os.environ.get("PATH", ""), *SANITIZERS])
    sanitizer = shutil.which("compute-sanitizer", path=search_path)
    # a tool sees the edges of a tensor only if every tensor has its own allocation
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-ra", "tests/kernels/test_triton_gpu.py"]
    if importlib.util.find_spec("xdist"):
        pytest += ["-n", "8"]  # most of the time goes into compiling, on one core each
    steps = [Step("tests", pytest, 270, proof=r"\b[1-9]\d* passed")]
    for tool, limit in (("memcheck", 120), ("racecheck", 150)):
        checked = [sanitizer, "--tool", tool, "--error-exitcode", "9", *smoke] if sanitizer else None
        why = "" if sanitizer else "compute-sanitizer was not found"
        steps.append(Step(tool, checked, limit, alone, why, proof=r"SUMMARY: 0 (errors|hazards)"))
    return steps


def speed(out: Path, commit: str, rehearse: bool) -> list[Step]:
    command = [sys.executable, "-m", "benchmarks.speed.layer_gpu", "--quick", "--out", str(out), "--minutes", "7.5"]
    command += ["--commit", commit] if commit else []
    return [Step("layer-gpu", [*command, "--rehearse"] if rehearse else command, 570, proof="goals: ")]


def run(step: Step, out: Path) -> dict:
    """The verdict on a step: passed, failed, cut at its limit, or not run."""
    if step.command is None:
        return {"step": step.name, "verdict": "not run", "seconds": 0, "last_line": step.why}
    sources = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    before = os.environ.get("PYTHONPATH")
    environment = os.environ | (step.environment or {}) | {"PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([sources, before]) if before else sources
    log, start = out / f"{step.name}.log", time.monotonic()
    print(f"{step.name}: {' '.join(step.command)}", flush=True)
    with log.open("w") as file:
        process = subprocess.Popen(
            step.command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            status = process.wait(step.limit_s)
            proved = re.search(step.proof, log.read_text(errors="replace"))
            verdict = f"failed ({status})" if status else "passed" if proved else "failed (it checked nothing)"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            verdict = f"cut after {step.limit_s} s"
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    seconds = round(time.monotonic() - start, 1)
    return {"step": step.name, "verdict": verdict, "seconds": seconds, "last_line": lines[-1] if lines else ""}


def summary(rows: list[dict], part: str) -> str:
    lines = [f"# GPU report: {part}", "", "| step | verdict | seconds | its last line |", "|---|---|---|---|"]
    lines += [
        f"| {r['step']} | {r['verdict']} | {r['seconds']} | {r['last_line'].replace('|', '/')[:200]} |" for r in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", choices=("correctness", "speed", "all"), default="all")
    parser.add_argument("--commit", default="", help="the commit to record if the sources have no git history")
    parser.add_argument("--rehearse", action="store_true", help="the speed part at toy sizes on the CPU")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    steps = correctness() if options.part != "speed" else []
    steps += speed(out, options.commit, options.rehearse) if options.part != "correctness" else []
    rows = []
    for step in steps:
        rows.append(run(step, out))
        (out / f"report-{options.part}.md").write_text(summary(rows, options.part))  # a killed run keeps what it has
        print(f"  {rows[-1]['verdict']} after {rows[-1]['seconds']} s: {rows[-1]['last_line'][:300]}", flush=True)
    print(summary(rows, options.part))
    return 0 if all(r["verdict"] == "passed" for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
