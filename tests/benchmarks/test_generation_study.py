"""The comparison of trained generators: which samples it makes, where they lie, what its table of losses says."""

from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")

from benchmarks.quality import denoising
from benchmarks.quality.generation import losses_table, ways

TRAINED = (32, 24)


def arguments(**more):
    values = dict(factors=[1, 1.5], counts=[50, 20], guidance=2.0, other_guidance=[], dilate=[], enlarge=[])
    values |= dict(shift=[], interval=None)
    return SimpleNamespace(checkpoint="last", work=Path("work"), **(values | more))


def test_each_run_is_sampled_at_each_size():
    found = ways(["A", "B"], arguments())
    assert [(way.name, way.size(TRAINED), way.count) for way in found] == [
        ("A", (32, 24), 50),
        ("B", (32, 24), 50),
        ("A", (48, 36), 20),
        ("B", (48, 36), 20),
    ]


def test_other_guidance_is_for_the_trained_size_and_help_for_larger_ones():
    found = ways(["A", "B"], arguments(other_guidance=[1, 3], dilate=["B"], enlarge=[0.5]))
    trained = [(way.name, way.guidance) for way in found if way.factor == 1]
    assert sorted(trained) == [(name, guidance) for name in "AB" for guidance in (1, 2, 3)]
    assert all(way.dilation == 1 and way.enlarge is None for way in found if way.factor == 1)
    larger = {way.title for way in found if way.factor > 1}
    assert larger == {
        "A",
        "A, enlarged, 0.5 of the steps again",
        "B",
        "B, dilated by 2",
        "B, enlarged, 0.5 of the steps again",
    }


def test_no_two_ways_share_a_folder():
    """A folder that is there is continued: two ways in one would be one set of samples."""
    given = arguments(other_guidance=[1], dilate=["A", "B"], enlarge=[0.25, 0.5], shift=[2, 4], interval=(0, 0.8))
    found = ways(["A", "B"], given)
    assert {way.shift for way in found if way.factor > 1} == {1, 2, 4}
    assert {(way.guidance, way.interval) for way in found if way.factor == 1} == {
        (1, None),
        (2, None),
        (2, (0, 0.8)),
    }
    assert len({way.folder(given, TRAINED) for way in found}) == len(found)


def test_the_table_of_losses_tells_paired_differences():
    def measured(each):
        buckets = [0.1 + 0.01 * i for i in range(denoising.BUCKETS)]
        return {
            "loss": sum(each) / len(each),
            "each": each,
            "by_timestep": buckets,
            "class_is_worth": [0.002] * denoising.BUCKETS,
        }

    text = losses_table({"A": {"32x32": measured([0.1, 0.2, 0.3])}, "B": {"32x32": measured([0.2, 0.2, 0.5])}})
    rows = [line for line in text.splitlines() if line.startswith("| 32x32")]
    assert [row.split(" | ")[1:3] for row in rows] == [["A", "0.2000"], ["B", "0.3000"]]
    assert all(row.endswith("| 0.0020 |") for row in rows)
    # the differences are 0.1, 0 and 0.2: their mean, and 0.1 / sqrt(3)
    assert "B minus A at 32x32, over the same photos and noise: +0.1000 ± 0.0577." in text
