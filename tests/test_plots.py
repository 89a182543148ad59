"""The pictures that the commands draw."""

import pytest
import torch
from matplotlib.text import Text

from gspn import plots
from gspn.data.images import Preprocessing, Split
from gspn.metrics.classification import Outcome

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
