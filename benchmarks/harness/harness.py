"""What every benchmark shares beside gspn.bench.measuring: a process of its own, a JSON file that records machine,
versions and commit, and Markdown tables.
"""

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from gspn.bench import measuring
from gspn.bench.measuring import eval_call, interleaved, peak_extra_mib, summary, train_call

__all__ = [
    "environment", "eval_call", "in_fresh_process", "interleaved", "peak_extra_mib", "summary", "table", "train_call",
    "write_json",
]  # fmt: skip

ROOT = Path(__file__).resolve().parents[2]
CODE = ("src", ":(glob)benchmarks/**/*.py")  # what a result depends on; other results and documents are none of it


def in_fresh_process(module: str, *arguments: str) -> dict:
    """Runs ``python -m module arguments`` and reads the JSON that it prints last."""
    result = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, cwd=ROOT, check=False
    )
    if result.returncode:
        raise RuntimeError(f"{module} {' '.join(arguments)} failed:\n{result.stderr[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def environment() -> dict:
    """Machine, versions, commit and whether the code had uncommitted changes, for the JSON file."""
    return measuring.environment() | {
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--", *CODE)),
    }


def _git(*arguments: str) -> str:
    """What git prints; empty where the sources have no history or git is not installed."""
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def write_json(path: Path, content: dict, quiet: bool = False) -> None:
    """Replaces the file at once: a benchmark that is killed leaves the file of the case before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)
    if not quiet:
        print(f"wrote {path}")


def table(header: Sequence, rows: Iterable[Sequence]) -> str:
    """A Markdown table, without a line end after it."""
    lines = [header, ["---"] * len(header), *rows]
    assert all(len(line) == len(header) for line in lines)
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
