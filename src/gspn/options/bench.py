"""The options of `gspn bench`."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from gspn.names import unknown
from gspn.options.base import OptionSet, option
from gspn.options.classifiers import WriteOptions
from gspn.places import OptionError

SUITES = ("layer", "growth", "models")


@dataclass(frozen=True, kw_only=True)
class BenchOptions(WriteOptions, OptionSet):
    """All options of `gspn bench`."""

    plain: ClassVar = True

    suites: list[str] | None = option(
        None,
        "What to measure: layer (typical feature maps), growth (cost against the size of the map), models (whole "
        "networks). Default: all three.",
        metavar="SUITE...",
        argument=True,
    )
    minutes: float = option(
        8.0, "The time for all of it; what does not fit is left out, and named.", low=0.1, high=100_000
    )
    device: str | None = option(
        None, "cpu or cuda. Default: cuda if torch finds such a device.", choices=("cpu", "cuda")
    )
    threads: int | None = option(
        None, "Measure the CPU, with so many threads. Default: as many as torch chooses.", low=1
    )
    dtype: str = option("fp32", "Dtype of weights and data: fp32, bf16 or fp16.", choices=("fp32", "bf16", "fp16"))
    out: Path | None = option(
        None, "The folder for bench.json and the pictures. Default: a new one, runs/bench-DATE-TIME.", metavar="FOLDER"
    )

    def __post_init__(self):
        super().__post_init__()
        for suite in self.suites or ():
            if suite not in SUITES:
                raise OptionError(unknown("suite", suite, SUITES))
        if self.threads is not None and self.threads > (cores := os.cpu_count() or self.threads):
            raise OptionError(f"threads must be from 1 to {cores}, the cores of this machine, got {self.threads}")
        if self.device == "cuda" and self.threads is not None:
            raise OptionError("--threads is for the CPU, not for --device cuda")

    def chosen(self) -> list[str]:
        """The suites to measure, in their order."""
        return [suite for suite in SUITES if suite in (self.suites or SUITES)]
