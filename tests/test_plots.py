"""The pictures that the commands draw."""

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from PIL import Image

from gspn import plots, plots_masks
from gspn.data.images import Preprocessing, Split
from gspn.metrics.classification import Outcome
from gspn.train.run import Run

NAMES = ["$5", "$10", r"$\nosuchsymbol$"]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures, save = [], plots.save
    monkeypatch.setattr(plots, "save", lambda figure, path: (figures.append(figure), save(figure, path)))
    return figures


def outcome():
    label, top = torch.tensor([0, 1, 2, 0]), torch.tensor([[0, 1, 2], [0, 1, 2], [2, 1, 0], [1, 0, 2]])
    probability = torch.tensor([[0.6, 0.3, 0.1]]).expand(4, 3)
    return Outcome(torch.arange(4), label, top, probability, torch.ones(4), 1.0, 1.0)


def with_dollars(figure):
    return [text for text in figure.findobj(Text) if "$" in text.get_text()]


def test_names_that_begin_alike_are_told_apart(drawn, tmp_path):
    names = ["an owl", *(f"a picture of an animal, number {i}" for i in (1, 2))]
    metrics = {"size": (8, 8), "images": 4, "split": "val", "top1": 0.5, "ece": 0.1, "reliability": []}
    plots.confusion(tmp_path / "c.png", outcome().confusion(3), names, metrics)
    shown = [label.get_text() for label in drawn[0].axes[0].get_yticklabels()]
    assert shown == ["an owl", "a pictur… number 1", "a pictur… number 2"]
    assert max(map(len, shown)) <= 18
    split = Split([0, 1, 2, 0], names, pixels=torch.zeros(4, 1, 8, 8, dtype=torch.uint8))
    plots.predictions(tmp_path / "p.png", split, outcome(), Preprocessing(1, (8, 8), (0.5,), (0.5,)), names, "val")
    titles = [text.get_text() for text in drawn[1].findobj(Text) if "(60%)" in text.get_text()]
    assert "a pi…ber 1 (60%)\nis an owl" in titles and "a pi…ber 2 (60%)" in titles


def test_names_of_classes_are_no_formulas(drawn, tmp_path):
    """matplotlib reads what stands between two dollars as a formula: "$5 (60%) is $10", and fails for the third."""
    pixels = torch.randint(256, (4, 1, 8, 8), dtype=torch.uint8)
    split = Split([0, 1, 2, 0], NAMES, pixels=pixels)
    plots.predictions(tmp_path / "p.png", split, outcome(), Preprocessing(1, (8, 8), (0.5,), (0.5,)), NAMES, "val")
    metrics = {"size": (8, 8), "images": 4, "split": "val", "top1": 0.5, "ece": 0.1, "reliability": []}
    plots.confusion(tmp_path / "c.png", outcome().confusion(3), NAMES, metrics)
    for figure in drawn:
        texts = with_dollars(figure)
        assert len(texts) >= 4
        assert not any(text.get_parse_math() for text in texts)


@pytest.mark.parametrize("draw", [plots.confusion, plots_masks.pixel_confusion])
@pytest.mark.parametrize("count", [1, 3, 10, 19])
@pytest.mark.parametrize("longest", [1, 18])
def test_nothing_is_cut_off_at_the_border(draw, count, longest, tmp_path):
    names = [f"{i}".zfill(longest) for i in range(count)]
    names = ["traffic light", "person", "bus"] if (count, longest) == (3, 18) else names
    metrics = {"images": 4, "split": "val", "miou": 0.5, "scale": 1, "iou": dict.fromkeys(names, 0.5)}
    metrics |= {"size": (8, 8), "top1": 0.5, "ece": 0.1, "reliability": []}
    draw(tmp_path / "c.png", torch.ones(count, count, dtype=torch.int64), names, metrics)
    picture = np.asarray(Image.open(tmp_path / "c.png").convert("L"))
    assert all((line == 255).all() for line in (picture[0], picture[-1], picture[:, 0], picture[:, -1]))


@pytest.mark.parametrize("draw", [plots.losses, plots.distillation])
def test_losses_that_hardly_change_have_ticks_that_differ(draw, drawn, tmp_path):
    names = ["train_loss", "val_loss", "val_error", "val_bound", "val_noise", "val_output", "val_feature"]
    rows = [{"epoch": i, "val_teacher": 1.1909} | dict.fromkeys(names, 0.01324 - 0.00004 * i) for i in (1, 2)]
    draw(Run(tmp_path, {}, rows))
    for axes in drawn[0].axes:
        low, high = axes.get_ylim()
        ticks = zip(axes.get_yticks(minor=True), axes.get_yticklabels(minor=True), strict=True)
        shown = [label.get_text() for at, label in ticks if low <= at <= high]
        assert len(set(shown)) == len(shown) >= 2


def test_grid_shows_every_class_with_its_images():
    colours = {0: (200, 0, 0), 1: (0, 200, 0), 3: (0, 0, 200)}
    labels = [0, 1, 3, 0, 1, 3, 0]
    images = [Image.new("RGB", (20, 10), colours[label]) for label in labels]
    names = ["red", "green and a name that does not fit in one line, nor two", "none", "blue"]
    picture = np.asarray(plots.draw_grid(images, labels, names, title="a title", columns=2)).astype(int)
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
    picture = plots.draw_grid(images, range(70), [str(i) for i in range(70)])
    assert (np.asarray(picture) == (7, 99, 200)).all(-1).sum() == 60 * 256 * 128
    assert 0.5 < picture.width / picture.height < 2


def test_the_grid_of_samples_is_of_classes_that_have_some(tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    from helpers.diffusion import generator_run
    from helpers.sampling import options

    from gspn.sampling import sample as module

    shown = []

    def draw(images, labels, names, **more):
        shown.append((images, labels))
        return plots.draw_grid(images, labels, names, **more)

    monkeypatch.setattr(module, "GRID_CLASSES", 2)
    monkeypatch.setattr(module, "draw_grid", draw)
    run = generator_run(tmp_path / "run")[0]
    for count, expected in ((1, {0: 4}), (2, {0: 4, 1: 0}), (7, {1: 0, 2: 1, 4: 0, 5: 1})):  # classes by sample
        module.sample(run.path, tmp_path / "out", options(classes="4,0,1", count=count))
        images, labels = shown.pop()
        assert labels == list(expected.values()) and (tmp_path / "out/grid.png").exists()
        for i, image in zip(expected, images, strict=True):
            (file,) = (tmp_path / "out/images").glob(f"{i:06d}-*.png")
            assert np.array_equal(np.asarray(image), np.asarray(Image.open(file)))
