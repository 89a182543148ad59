"""The folder that `gspn sample` makes, and reading it.

    OUT/samples.json                their settings: classes, guidance, steps, seed, a digest of the weights, ...
    OUT/images/000012-dress.png     number and class
    OUT/grid.png, OUT/samples.npz   optional

Sample i is of the class classes[i % len(classes)]: the first n samples are balanced for any n, and stay the same when
more are added.
"""

import json
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from gspn.data.images import Split, decode
from gspn.digests import Content
from gspn.files import atomic, check_format
from gspn.train.run import RunError

ABOUT, IMAGES, GRID, ARRAYS, FORMAT = "samples.json", "images", "grid.png", "samples.npz", 1


@dataclass(frozen=True)
class Samples:
    """A folder of samples.

    Attributes:
        folder: its path. settings: of the sampling. count: the number asked for.
        classes: the numbers of the classes that take turns. class_names: of all classes of the generator.
    """

    folder: Path
    settings: dict
    count: int
    classes: list[int]
    class_names: list[str]

    @classmethod
    def open(cls, folder: Path | str) -> "Samples":
        """Reads samples.json. Errors: RunError."""
        folder = Path(folder)
        file = folder / ABOUT
        try:
            about = json.loads(file.read_text(encoding="utf-8"))
            check_format(file, about["format"], FORMAT, RunError)
            samples = cls(folder, about["settings"], about["count"], about["classes"], about["class_names"])
            samples.path(samples.count - 1)
            return samples
        except FileNotFoundError as error:
            raise RunError(f"{folder} holds no samples: there is no {file} (gspn sample makes them)") from error
        except RunError:
            raise
        except (OSError, KeyError, TypeError, ValueError, IndexError) as error:
            raise RunError(f"{file} is damaged or foreign: {type(error).__name__}: {error}") from error

    def about(self) -> dict:
        """What samples.json holds."""
        return {
            "format": FORMAT,
            "settings": self.settings,
            "count": self.count,
            "classes": self.classes,
            "class_names": self.class_names,
        }

    def label(self, i: int) -> int:
        """The class of sample i."""
        return self.classes[i % len(self.classes)]

    def path(self, i: int) -> Path:
        """The file of sample i."""
        name = re.sub(r"[^\w-]+", "_", self.class_names[self.label(i)])[:40]
        return self.folder / IMAGES / f"{i:06d}-{name}.png"

    def missing(self) -> list[int]:
        """The indices of the missing samples."""
        there = {path.name for path in (self.folder / IMAGES).glob("*.png")}
        return [i for i in range(self.count) if self.path(i).name not in there]

    def split(self) -> Split:
        """The samples with their classes. Errors: RunError if some are still missing."""
        if missing := self.missing():
            raise RunError(
                f"{len(missing)} of {self.count} samples are not in {self.folder} yet: `gspn sample` with the same "
                "arguments makes them"
            )
        return Split([self.label(i) for i in range(self.count)], self.class_names, read=_Read(self), names=self.path)

    def write_arrays(self) -> Path:
        """Writes samples.npz for ADM's evaluation: the images arr_0 uint8 (N,H,W,3), the classes arr_1 int64 (N,). One
        image is in memory at a time. Errors: SaveError."""
        labels = np.array([self.label(i) for i in range(self.count)])
        with Image.open(self.path(0)) as first:
            width, height = first.size
        path = self.folder / ARRAYS
        with atomic(path) as temporary, zipfile.ZipFile(temporary, "w", allowZip64=True) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": (self.count, height, width, 3)}
                np.lib.format.write_array_header_1_0(file, header)
                for i in range(self.count):
                    file.write(np.asarray(decode(self.path(i)).convert("RGB")).tobytes())
            with archive.open("arr_1.npy", "w") as file:
                np.lib.format.write_array(file, labels)
        return path


@dataclass(frozen=True)
class _Read:
    samples: Samples

    def __call__(self, i):
        return decode(self.samples.path(i))

    def identity(self) -> Iterator:
        yield self.samples.about()
        for i in range(self.samples.count):
            yield Content(self.samples.path(i))
