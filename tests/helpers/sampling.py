"""What the tests of `gspn sample` share."""

import numpy as np
from PIL import Image

from gspn.options.generators import SampleOptions

QUICK = dict(count=7, steps=2, guidance=2.0, batch_size=3)


def options(**more):
    return SampleOptions(**QUICK | more)


def pixels(folder):
    """The samples as an array, in order."""
    return np.stack([np.asarray(Image.open(path)) for path in sorted((folder / "images").glob("*.png"))]).astype(int)
