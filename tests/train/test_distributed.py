"""Two processes with gloo on the CPU compute what one does: the same losses, each image evaluated once."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.two_processes import copies, damaged, main, others, statistics

from gspn.metrics.classification import evaluate
from gspn.train.run import Run

HELPERS = Path(__file__).parents[1] / "helpers"


def by_torchrun(*arguments):
    """What two processes print."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HELPERS.parent), os.environ.get("PYTHONPATH")]))
    result = subprocess.run(command + [str(a) for a in arguments], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert "Grad strides do not match" not in result.stderr
    return result.stdout


@pytest.fixture
def folders(colours, tmp_path):
    """Two folders with the same pictures, one of them damaged, for one process and for two."""
    for name in ("one", "two"):
        shutil.copytree(colours, tmp_path / name / "data")
    return tmp_path / "one", tmp_path / "two"


def close(one, other):
    """Whether two dicts of metrics say the same."""
    numbers = lambda metrics: {name: v for name, v in metrics.items() if isinstance(v, int | float)}  # noqa: E731
    return numbers(one) == pytest.approx(numbers(other), abs=1e-5) and one.keys() == other.keys()


def in_both(what, folders):
    """What one process finds, and what two find, of which only one prints."""
    return main(what, folders[0]), json.loads(by_torchrun(HELPERS / "two_processes.py", what.__name__, folders[1]))


def test_two_processes_are_as_one(folders):
    one, two = in_both(copies, folders)
    assert len(one["losses"]) == len(two["losses"]) == 25
    assert max(abs(a - b) for a, b in zip(one["losses"], two["losses"], strict=True)) < 1e-5
    first, second = two["seeds of all"]
    assert first == one["seeds"] and not set(first) & set(second)  # what is random in the model differs
    assert two["metrics"]["images"] == 359 and close(one["metrics"], two["metrics"])
    assert Run.open(folders[1] / "copies").metrics[0]["images"] == 359
    assert re.search(r"batch_size .* 2 processes.* 31", two["refusal"])


@pytest.mark.slow
def test_batch_norm_s_statistics_are_the_same_in_both(folders):
    _, two = in_both(statistics, folders)
    first, second = two["statistics"]
    assert len(first) == 50 and first == second
    # those that are saved are those that were evaluated
    run = Run.open(folders[1] / "statistics-False")
    assert run.metrics[0]["val_loss"] == pytest.approx(evaluate(run.path, "digits", workers=0)[0]["loss"], abs=1e-6)


@pytest.mark.slow
def test_shards_generators_and_damaged_pictures(folders):
    one, two = in_both(others, folders)
    # pictures of which one is damaged, whichever process read it
    assert close(one["of damaged"], two["of damaged"])
    assert "1 unreadable image left out" in two["warnings"][0] and "red/3.png" in two["warnings"][0]
    # sharded over the two, stopped, resumed: step 7 is done twice
    assert two["parameters"] == ["DTensor"] and one["parameters"] == ["Parameter"]
    assert len(one["sharded losses"]) == len(two["sharded losses"]) == 8 + 1
    assert max(abs(a - b) for a, b in zip(one["sharded losses"], two["sharded losses"], strict=True)) < 1e-5
    assert close(one["sharded"], two["sharded"])
    shapes = [
        {name: tensor.shape for name, tensor in Run.open(folder / "sharded").load_checkpoint("last")[0]["ema"].items()}
        for folder in folders
    ]
    assert shapes[0] == shapes[1]
    for name in ("generator", "sharded generator"):
        (alone,), (shared,) = (Run.open(folder / name).metrics for folder in folders)
        assert shared["images"] == 51 and shared["val_loss"] == pytest.approx(alone["val_loss"], abs=1e-5)
        pictures = [(folder / name / "samples/epoch-0001.png").read_bytes() for folder in folders]
        assert pictures[0] == pictures[1]


@pytest.mark.slow
def test_what_either_could_not_read_is_known_after_resuming(folders):
    in_both(damaged, folders)
    rows = [Run.open(folder / name).metrics[-1] for folder in folders for name in ("whole", "resumed")]
    (found,) = {row["unreadable_in_training"] for row in rows}
    assert found > 8


@pytest.mark.slow
def test_ddp_on_the_reference_where_no_line_reaches_another():
    assert float(by_torchrun(HELPERS / "two_gradients.py")) == 0
