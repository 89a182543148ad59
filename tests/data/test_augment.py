"""Presets and augmentation that need torch only; test_recipe_timm.py has the rest."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gspn.data import augment
from gspn.data.augment import PRESETS, Augmentation, Mixing, preset_for, seeded
from gspn.data.images import Preprocessing
from gspn.options import OptionError

COLOUR = Preprocessing(3, (32, 32), (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
NOT_HERE = "timm is not there: install gspn[imagenet]"


@pytest.fixture
def without_timm(monkeypatch):
    monkeypatch.setattr(augment, "timm_problem", lambda: NOT_HERE)


# -- presets --


def test_presets_by_kind_size_and_number_of_images(monkeypatch):
    monkeypatch.setattr(augment, "timm_problem", lambda: None)
    assert preset_for("digits", (8, 8), 1438, "gspn_micro")[0] == "digits"
    assert preset_for("idx", (28, 28), 60000, "gspn_micro") == ("idx", PRESETS["idx"], [])
    assert preset_for("folder", (64, 64), 1852, "gspn_micro")[0] == "small"
    assert preset_for("folder", (224, 224), 5000, "gspn_tiny")[0] == "photos"
    name, values, notes = preset_for("datasets", (224, 224), 1_281_167, "gspn_tiny")
    assert name == "imagenet" and notes == []
    published = dict(epochs=300, warmup=20, clip=5.0, ema=0.9999, precision="bf16", batch_size=1024, erase=0.25)
    published |= dict(rand_augment="m9-mstd0.5-inc1", color_jitter=0.4, mixup=0.8, cutmix=1.0, flip=True)
    published |= dict(lr=5e-4, min_lr=5e-6, warmup_lr=5e-7, scale_lr=512)
    assert published.items() <= values.items()
    assert preset_for("datasets", (224, 224), 1_281_167, "gspn_small")[1]["lr"] == 3e-4
    mobile = preset_for("datasets", (32, 32), 50_000, "gspn_mobile")[1]
    own = {"lr": mobile["lr"], "warmup": mobile["warmup"], "optimizer": "muon"}
    assert mobile == PRESETS["small"] | own != PRESETS["small"]
    assert preset_for("idx", (28, 28), 60000, "gspn_micro", "fashion")[1]["flip"] is True
    with pytest.raises(OptionError, match=r"'cifar'.*digits, idx, fashion, small, photos, imagenet"):
        preset_for("idx", (28, 28), 60000, "gspn_micro", "cifar")


def test_without_timm_the_default_runs_and_says_so(without_timm):
    name, values, notes = preset_for("folder", (224, 224), 5000, "gspn_tiny")
    assert name == "photos" and values["mixup"] == 0 and values["rand_augment"] == "none" and values["erase"] == 0.25
    assert len(notes) == 1 and "gspn[imagenet]" in notes[0]
    _, values, notes = preset_for("folder", (224, 224), 5000, "gspn_tiny", "photos")
    assert values["mixup"] == 0.8 and notes == []  # asked for: then it is an error, below


def test_asking_for_what_needs_timm_names_the_extra(without_timm):
    for wanted in (dict(rand_augment="m9"), dict(color_jitter=0.4)):
        with pytest.raises(OptionError, match=r"timm.*gspn\[imagenet\]"):
            Augmentation(**wanted)
    with pytest.raises(OptionError, match=r"gspn\[imagenet\]"):
        Mixing(10, 0.8, 0.0)


def test_faults_of_options(monkeypatch):
    monkeypatch.setattr(augment, "timm_problem", lambda: None)
    with pytest.raises(OptionError, match=r"RandAugment.*'x9'"):
        Augmentation(rand_augment="x9")
    options = SimpleNamespace(mixup=0.8, cutmix=0.0, batch_size=33)
    with pytest.raises(OptionError, match=r"even batch size.*33"):
        Mixing.of(options, 10)
    assert Mixing.of(SimpleNamespace(mixup=0.0, cutmix=0.0, batch_size=33), 10) is None


def test_what_options_mean():
    options = dict(flip=True, crop_area=0.1, erase=0.25, rand_augment="none", color_jitter=0.0)
    shifted = Augmentation.of(SimpleNamespace(augment="shift", **options), "idx", (28, 28))
    assert shifted == Augmentation(shift=3, fill="zero", flip=True, crop_area=0.1, erase=0.25) and not shifted.slow
    of_size = {
        size: Augmentation.of(SimpleNamespace(augment="shift", **options), "folder", size).shift
        for size in ((8, 128), (1, 5), (96, 20), *((n, n) for n in range(2, 100)))
    }
    assert (of_size[8, 128], of_size[1, 5], of_size[96, 20]) == ((1, 16), (0, 1), (12, 2))
    assert all(of_size[n, n] == (max(n // 8, 1),) * 2 for n in range(2, 100))
    cropped = Augmentation.of(SimpleNamespace(augment="crop", **options), "folder", (224, 224))
    assert cropped == Augmentation(crop=True, flip=True, crop_area=0.1, erase=0.25) and cropped.slow


# -- the global generators --


def test_seeded_repeats_and_restores():
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draw()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with seeded(2**62 + 5):
        inside = draw()
    assert draw() == expected
    with pytest.raises(KeyError), seeded(2**62 + 5):
        assert draw() == inside
        raise KeyError
    with seeded(3):
        assert draw() != inside


# -- shift and flip --


def test_shift_moves_and_fills():
    image = torch.arange(1, 26, dtype=torch.uint8).view(1, 1, 5, 5)
    right_most = torch.tensor([[0.5, 0.99, 0.9]])  # no rows, one column to the left
    zero = Augmentation(shift=1, fill="zero").move(image, right_most)
    assert torch.equal(zero[..., :4], image[..., 1:]) and (zero[..., 4] == 0).all()
    reflect = Augmentation(shift=1).move(image, right_most)
    assert torch.equal(reflect[..., 4], image[..., 3])
    flipped = Augmentation(flip=True).move(image, torch.tensor([[0.5, 0.5, 0.9]]))
    assert torch.equal(flipped, image.flip(-1))
    one = torch.ones(1, 1, 1, 1, dtype=torch.uint8)
    assert Augmentation(shift=1).move(one, right_most).item() == 1


def test_rows_and_columns_are_shifted_by_their_own_numbers():
    image = torch.arange(1, 8 * 30 + 1, dtype=torch.uint8).view(1, 1, 8, 30)
    far = torch.tensor([[0.99, 0.99, 0.9]])
    moved = Augmentation(shift=(1, 3), fill="zero").move(image, far)
    assert torch.equal(moved[..., :7, :27], image[..., 1:, 3:]) and not moved[..., 7, :].any()
    for size in (7, 8, 28, 96):  # both numbers alike give the pixels that one number gave
        numbers = torch.rand(200, 3, generator=torch.Generator().manual_seed(size))
        pixels = torch.randint(255, (200, 1, size, size), generator=torch.Generator().manual_seed(1)).byte()
        shift = max(size // 8, 1)
        source = torch.arange(size)[:, None] + ((numbers[:, :2] * (2 * shift + 1)).long() - shift)[:, None]
        y, x = ((size - 1 - (size - 1 - each.abs()).abs()) for each in source.unbind(2))
        expected = pixels[torch.arange(200)[:, None, None], 0, y[:, :, None], x[:, None]]
        assert torch.equal(Augmentation(shift=shift).move(pixels, numbers)[:, 0], expected)


# -- random erasing --


def erase(count=2000, probability=1.0, epoch=0):
    image = torch.full((3, 32, 32), 7, dtype=torch.uint8)
    augmentation = Augmentation(erase=probability)
    return torch.stack([augmentation.erased(image, (0, epoch, i), COLOUR) for i in range(count)])


def test_erasing_replaces_one_box_of_the_right_size_by_noise():
    erased = erase()
    assert torch.equal(erased, erase()) and not torch.equal(erased, erase(epoch=1))
    changed = (erased != 7).any(1)
    areas, ratios = [], []
    for mask in changed:
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        h, w = int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1
        assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].float().mean() > 0.9  # one full box
        areas.append(h * w / 1024)
        ratios.append(h / w)
    areas, ratios = torch.tensor(areas), torch.tensor(ratios)
    assert areas.min() > 0.01 and areas.max() < 0.37 and 0.1 < areas.mean() < 0.2
    assert ratios.min() < 0.4 and ratios.max() > 2.5 and 0.9 < ratios.log().mean().exp() < 1.1
    assert changed[:, 0].any() and changed[:, -1].any() and changed[:, :, 0].any() and changed[:, :, -1].any()
    noise = erased.permute(1, 0, 2, 3)[:, changed].float() / 255
    assert torch.allclose(noise.mean(1), torch.tensor(COLOUR.mean), atol=0.02)
    assert torch.allclose(noise.std(1), torch.tensor(COLOUR.std), atol=0.02)


def test_erasing_happens_as_often_as_asked_and_leaves_the_rest():
    share = (erase(probability=0.25) != 7).flatten(1).any(1).float().mean()
    assert 0.22 < share < 0.28
    image = torch.full((3, 32, 32), 7, dtype=torch.uint8)
    assert Augmentation(erase=1e-9).erased(image, (0, 0, 0), COLOUR) is image
    tiny = torch.zeros(1, 1, 1, dtype=torch.uint8)  # no box fits
    assert torch.equal(Augmentation(erase=1.0).erased(tiny, (0, 0, 0), Preprocessing(1, (1, 1), (0.5,), (0.2,))), tiny)
