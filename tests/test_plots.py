"""The grid of samples."""

import numpy as np
from PIL import Image

from gspn.plots import draw_grid


def test_grid_shows_every_class_with_its_images():
    colours = {0: (200, 0, 0), 1: (0, 200, 0), 3: (0, 0, 200)}
    labels = [0, 1, 3, 0, 1, 3, 0]
    images = [Image.new("RGB", (20, 10), colours[label]) for label in labels]
    names = ["red", "green and a name that does not fit in one line, nor two", "none", "blue"]
    picture = np.asarray(draw_grid(images, labels, names, title="a title", columns=2)).astype(int)
    for label, colour in colours.items():
        places = np.argwhere((picture == colour).all(-1))
        # two images of 100x50 side by side, no third one
        assert len(places) == 2 * 100 * 50, label
        (top, left), (bottom, right) = places.min(0), places.max(0)
        assert (bottom - top + 1, right - left + 1) == (50, 2 * 100 + 4)
        beside = picture[top : bottom + 1, :left]
        assert (beside < 100).all(-1).sum() > 20, f"no name beside {label}"
    rows = [np.argwhere((picture == colour).all(-1)).min(0)[0] for colour in colours.values()]
    assert rows == sorted(rows)


def test_grid_of_many_classes_and_large_images():
    images = [Image.new("RGB", (600, 300), (7, 99, 200)) for _ in range(70)]
    picture = draw_grid(images, range(70), [str(i) for i in range(70)])
    assert (np.asarray(picture) == (7, 99, 200)).all(-1).sum() == 60 * 256 * 128
    assert 0.5 < picture.width / picture.height < 2
