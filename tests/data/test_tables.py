"""Tables of `datasets`: which of their columns are read."""

import io

import pytest
import torch
from PIL import Image

from gspn.data.captions import open_captions
from gspn.data.images import Preprocessing
from gspn.data.labelled import open_data
from gspn.data.loader import make_loader

GREY8 = Preprocessing(1, (8, 8), (0.5,), (0.25,))


def picture(i):
    file = io.BytesIO()
    Image.new("L", (8, 8), i).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


@pytest.fixture(params=["Image", "Audio"])
def saved(request, tmp_path):
    """A table of ten images, with a column beside them that cannot be decoded."""
    datasets = pytest.importorskip("datasets")
    undecoded = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = {"image": datasets.Image(), "other": undecoded, "label": datasets.ClassLabel(names=["a", "b"])}
    columns = {"image": [*map(picture, range(10))], "other": [{"bytes": b"damaged", "path": None}] * 10}
    columns |= {"label": [0, 1] * 5, "text": ["grey"] * 10}
    features = datasets.Features(features | {"text": datasets.Value("string")})
    table = datasets.Dataset.from_dict(columns, features=features)
    table.cast_column("other", getattr(datasets, request.param)()).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("open_", [open_data, open_captions])
def test_other_columns_are_not_decoded(saved, open_):
    split = open_(saved, image_column="image").splits["all"]
    (batch,) = make_loader(split, GREY8, 10)
    assert batch["label"].tolist() == split.labels.tolist()
    assert torch.equal(batch["image"][:, 0, 0, 0], torch.arange(10, dtype=torch.uint8))
    assert split.channels() == 1 and split.read.table.column_names == ["image"]
