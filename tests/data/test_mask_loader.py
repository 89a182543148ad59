"""Batches of images with masks: whatever changes an image changes its mask alike; an evaluation resizes no mask."""

import errno
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from helpers.masks import make_masked, pair, save_pair
from PIL import Image

from gspn.data.images import UNREADABLE, DataError, Preprocessing
from gspn.data.loader import batches
from gspn.data.mask_classes import IGNORED, Classes
from gspn.data.mask_loader import MaskAugmentation, MaskedDataset, make_masked_loader
from gspn.data.masks import open_masked

THREE = Classes(("a", "b", "c"), (0, 1, 2), ((0, 0, 0),) * 3, (255,))


def prepared(size=(20, 24)):
    return Preprocessing(3, size, (0.5,) * 3, (0.5,) * 3)


def dataset(folder, augmentation=None, size=(20, 24), scale=1.0, seed=0):
    return MaskedDataset(open_masked(folder).splits["all"], THREE, prepared(size), scale, augmentation, seed)


def by_colour(image):
    """The classes that the colours of a pair tell: red 1, blue 2, else 0."""
    red, _, blue = image.long()
    return torch.where(red - blue > 60, 1, torch.where(blue - red > 60, 2, 0))


@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.5, 0.5), (2.0, 2.0), (0.5, 2.0)])
@pytest.mark.parametrize("flip", [False, True])
def test_image_and_mask_stay_together(tmp_path, scales, flip):
    data = dataset(make_masked(tmp_path / "data", 8), MaskAugmentation(scales, flip, 0.2))
    for epoch in range(3):
        batch = data.__getitems__([(epoch, i) for i in range(8)])
        assert batch["image"].shape == (8, 3, 20, 24) and batch["mask"].shape == (8, 20, 24)
        for image, mask in zip(batch["image"], batch["mask"], strict=True):
            counted = mask != IGNORED
            assert (by_colour(image) == mask)[counted].float().mean() > 0.9  # edges are blurred in the image


def test_a_crop_larger_than_the_image_is_filled_and_not_counted(tmp_path):
    data = dataset(make_masked(tmp_path / "data", 3), MaskAugmentation(), size=(40, 50))
    batch = data.__getitems__([(0, 0), (0, 1), (0, 2)])
    assert ((batch["mask"] != IGNORED).sum((1, 2)) == 23 * 32).all()  # 24x32, without the row of 255
    outside = batch["mask"][:, 0, 0] == IGNORED
    assert outside.any() and (batch["image"][outside][:, :, 0, 0] == 128).all()
    corners = [(mask != IGNORED).nonzero()[0].tolist() for mask in batch["mask"]]
    assert len({tuple(corner) for corner in corners}) > 1


def test_augmentation_follows_from_seed_epoch_and_index(tmp_path):
    folder, augmentation = make_masked(tmp_path / "data", 4), MaskAugmentation((0.5, 2.0), True, 0.4)
    one = dataset(folder, augmentation).__getitems__([(2, 0), (2, 1)])
    other = dataset(folder, augmentation).__getitems__([(2, 1), (2, 3), (2, 0)])
    assert torch.equal(one["image"][0], other["image"][2]) and torch.equal(one["mask"][1], other["mask"][0])
    for changed in (dataset(folder, augmentation, seed=1).__getitems__([(2, 0)]), one | {"image": one["image"][1:]}):
        assert not torch.equal(one["image"][0], changed["image"][0])
    assert not torch.equal(one["image"][0], dataset(folder, augmentation).__getitems__([(3, 0)])["image"][0])


def test_evaluation_resizes_images_and_no_mask_whatever_their_sizes(tmp_path):
    folder = make_masked(tmp_path / "data", 2)
    save_pair(folder, "zz", *pair(9, height=30, width=20))
    batch = dataset(folder, scale=0.5).__getitems__([(0, 0), (0, 2)])
    assert batch["inner"].tolist() == [[12, 16], [15, 10]] and batch["outer"].tolist() == [[24, 32], [30, 20]]
    assert batch["image"].shape == (2, 3, 15, 16) and batch["mask"].shape == (2, 30, 32)
    assert np.array_equal(batch["mask"][1, :30, :20], pair(9, height=30, width=20)[1])
    assert (batch["mask"][1, :, 20:] == IGNORED).all()


def test_unreadable_pairs_and_pairs_that_do_not_fit(tmp_path):
    folder = make_masked(tmp_path / "data", 3)
    (folder / "masks/01.png").write_bytes(b"no")
    split = open_masked(folder).splits["all"]
    loader = make_masked_loader(split, THREE, prepared(), 3, augmentation=MaskAugmentation())
    (batch,) = batches(loader)
    split.masks, masks = Mock(side_effect=OSError(errno.EMFILE, "too many open files")), split.masks
    with pytest.raises(OSError, match="too many open files"):
        list(batches(loader))
    split.masks = masks
    row = batch["index"].tolist().index(1)
    assert batch["label"][row] == UNREADABLE and (batch["mask"][row] == IGNORED).all()
    assert (batch["label"] == 0).sum() == 2
    Image.fromarray(pair(1)[1][:9]).save(folder / "masks/01.png")
    with pytest.raises(DataError, match=r"01\.png.*32x9"):
        list(batches(loader))
