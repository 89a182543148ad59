"""Small data sets with masks: a disc and a square on noise, whose colours tell their classes."""

import json

import numpy as np
from PIL import Image

from gspn.options.segment import SegmentationOptions

CLASSES = [{"name": "ground", "color": "#888888"}, {"name": "disc", "color": [208, 32, 32]}, "square"]
TINY = dict(depths=[1, 1], width=16, global_levels=[0, 1], stem_stride=2)
FLAGS = [part for key, value in TINY.items() for part in ("--model-arg", f"{key}={json.dumps(value)}")]


def pair(seed, height=24, width=32):
    """(image uint8 (H,W,3), mask uint8 (H,W)): 0 grey, 1 red, 2 blue; the upper row is 255."""
    random = np.random.RandomState(seed)
    y, x = np.mgrid[:height, :width]
    image, mask = random.randint(90, 130, (height, width, 3)), np.zeros((height, width), np.uint8)
    (cy, cx), (sy, sx) = random.randint(6, (height - 6, width - 6), (2, 2))
    disc, square = (y - cy) ** 2 + (x - cx) ** 2 < 36, (abs(y - sy) < 5) & (abs(x - sx) < 5)
    for value, area, colour in ((1, disc, (220, 40, 40)), (2, square, (40, 40, 220))):
        image[area], mask[area] = colour, value
    mask[0] = 255
    return image.astype(np.uint8), mask


def save_pair(folder, name, image, mask):
    for side, pixels, suffix in (("images", image, "png"), ("masks", mask, "png")):
        (folder / side).mkdir(parents=True, exist_ok=True)
        (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(
            folder / side / f"{name}.{suffix}"
        )


def make_masked(folder, count=12, classes=CLASSES, **size):
    """A folder with images/, masks/ and classes.json."""
    for seed in range(count):
        save_pair(folder, f"{seed:02}", *pair(seed, **size))
    if classes is not None:
        (folder / "classes.json").write_text(json.dumps(classes))
    return folder


def masked_options(**more):
    """Options for `make_masked`'s data."""
    given = dict(model_args=TINY, epochs=2, batch_size=4, lr=1e-2, warmup=0.5, ema=0.5, workers=0, size=(24, 32))
    return SegmentationOptions(**given | more)
