"""RandAugment, colour jitter, mixup and cutmix by timm, made repeatable."""

import json
import random

import numpy as np
import pytest
import torch
from helpers.training import TINY

from gspn import plots
from gspn.data.augment import Augmentation, Mixing
from gspn.data.images import UNREADABLE, Numbered, Preprocessing, Split
from gspn.data.loader import make_loader
from gspn.options import OptionError, Options
from gspn.tasks.classify import settle, train_classifier

pytest.importorskip("timm")
pytestmark = pytest.mark.timm

COLOUR = Preprocessing(3, (32, 32), (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
PAPER = Augmentation(flip=True, erase=0.25, rand_augment="m9-mstd0.5-inc1", color_jitter=0.4)


def photos(count=24, channels=3):
    pixels = torch.from_numpy(np.random.RandomState(0).randint(0, 255, (count, channels, 8, 8), np.uint8))
    pixels = pixels.repeat_interleave(4, 2).repeat_interleave(4, 3)
    return Split(torch.arange(count) % 5, list("abcde"), pixels=pixels, names=Numbered("photo"))


def epoch_of(split, preprocessing, augmentation, *, seed=1, epoch=3, workers=0, batch_size=6):
    loader = make_loader(
        split, preprocessing, batch_size, train=True, augmentation=augmentation, seed=seed, workers=workers
    )
    loader.begin(epoch)
    return {int(i): image for batch in loader for i, image in zip(batch["index"], batch["image"], strict=True)}


def test_images_belong_to_seed_epoch_and_index_whatever_reads_them():
    split = photos()
    images = epoch_of(split, COLOUR, PAPER)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    for other in (dict(workers=2), dict(batch_size=8)):
        again = epoch_of(split, COLOUR, PAPER, **other)
        assert all(torch.equal(images[i], again[i]) for i in range(24))
    for other in (dict(seed=2), dict(epoch=4)):
        again = epoch_of(split, COLOUR, PAPER, **other)
        assert sum(torch.equal(images[i], again[i]) for i in range(24)) < 8


def test_the_global_generators_are_left_alone():
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = random.random(), np.random.rand(), torch.rand(()).item()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    PAPER(photos().pixels, torch.rand(24, 3, generator=torch.Generator()), [(0, 0, i) for i in range(24)], COLOUR)
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == expected


def test_rand_augment_is_timms_own():
    from PIL import Image
    from timm.data.auto_augment import rand_augment_transform

    from gspn.data.augment import seeded
    from gspn.data.images import mixed_seed

    mean = tuple(round(255 * value) for value in COLOUR.mean)
    params = dict(translate_const=int(32 * 0.45), img_mean=mean, interpolation=Image.Resampling.BICUBIC)
    theirs = rand_augment_transform("rand-m9-mstd0.5-inc1", params)
    painted = 0
    for i, image in enumerate(photos().pixels):
        with seeded(mixed_seed(0, 0, i, 2)):
            expected = np.array(theirs(Image.fromarray(image.permute(1, 2, 0).numpy())))
        ours = PAPER.paint(image, (0, 0, i), COLOUR)
        assert torch.equal(ours, torch.from_numpy(expected).permute(2, 0, 1))
        painted += not torch.equal(ours, image)
    assert painted > 12


def test_colour_jitter_alone_and_grey_images():
    jittered = Augmentation(color_jitter=0.4).paint(photos().pixels[0], (0, 0, 0), COLOUR)
    assert jittered.shape == (3, 32, 32) and not torch.equal(jittered, photos().pixels[0])
    grey = Preprocessing(1, (32, 32), (0.5,), (0.2,))
    images = epoch_of(photos(channels=1), grey, PAPER)
    assert images[0].shape == (1, 32, 32) and images[0].dtype == torch.uint8


# -- mixing --


def mix(mixing, images, labels, seed=0):
    torch.manual_seed(seed)
    return mixing(images.clone(), labels)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_targets_say_what_is_in_the_images(mixup, cutmix):
    mixing = Mixing(8, mixup, cutmix, smoothing=0.0)
    labels = torch.arange(8)
    images = labels.float().view(8, 1, 1, 1).expand(8, 3, 16, 16)  # an image is its label: then the mean is the mixture
    for seed in range(10):
        mixed, targets = mix(mixing, images, labels, seed)
        assert torch.allclose(mixed.mean((1, 2, 3)), targets @ labels.float(), atol=1e-5)
        assert torch.allclose(targets.sum(1), torch.ones(8))
        assert torch.equal(mix(mixing, images, labels, seed)[0], mixed)
    assert not torch.equal(mix(mixing, images, labels, 1)[0], mix(mixing, images, labels, 2)[0])


def test_both_kinds_of_mixing_occur_and_smoothing_is_in_the_targets():
    mixing = Mixing(4, 0.8, 1.0, smoothing=0.1)
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 16, 16)
    kinds = set()
    for seed in range(20):
        mixed, targets = mix(mixing, images, torch.arange(4), seed)
        kinds.add(bool(torch.equal(mixed, mixed.round())))  # cutmix leaves every pixel one of the two
        assert targets.min() == pytest.approx(0.1 / 4) and targets.max() <= 0.925 + 1e-6
    assert kinds == {True, False}


def test_unreadable_images_and_their_partners_count_for_nothing():
    labels = torch.tensor([1, UNREADABLE, 2, 3, 4, 5])
    _, targets = mix(Mixing(6, 0.8, 1.0, smoothing=0.1), torch.rand(6, 3, 8, 8), labels)
    assert torch.allclose(targets.sum(1), torch.tensor([1.0, 0, 1, 1, 0, 1]))
    with pytest.raises(OptionError, match=r"even.*5"):
        mix(Mixing(6, 0.8, 1.0), torch.rand(5, 3, 8, 8), labels[:5])


def test_mixing_draws_one_number_of_torchs_and_none_of_the_others():
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = random.random(), np.random.rand()
    torch.randint(2**62, ())
    after = torch.rand(()).item()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    Mixing(6, 0.8, 1.0)(torch.rand(6, 3, 8, 8, generator=torch.Generator()), torch.arange(6))
    assert (random.random(), np.random.rand()) == expected and torch.rand(()).item() == after


# -- in training --


def test_a_run_with_the_whole_recipe_repeats_bit_for_bit(tmp_path, monkeypatch):
    for name in ("curves", "predictions", "context"):
        monkeypatch.setattr(plots, name, lambda *args: None)
    split = photos(count=40)
    for i in range(40):
        (tmp_path / "data" / "abcde"[i % 5]).mkdir(parents=True, exist_ok=True)
        split.image(i).save(tmp_path / "data" / "abcde"[i % 5] / f"{i}.png")
    runs = {}
    for name, more in {"one": {}, "two": dict(workers=2), "other": dict(mixup=0.0)}.items():
        options = dict(preset="photos", size=(32, 32), epochs=1, batch_size=16, model_args=TINY, workers=0) | more
        run, _, _ = train_classifier(tmp_path / "data", tmp_path / name, Options(**options))
        runs[name] = run.load_checkpoint("last")[0]["model"]
    chosen = json.loads((tmp_path / "one" / "config.json").read_text())["options"]
    recipe = dict(rand_augment="m9-mstd0.5-inc1", color_jitter=0.4, erase=0.25, mixup=0.8, cutmix=1.0, augment="crop")
    assert recipe.items() <= chosen.items() and chosen["preset"] == "photos"
    assert all(torch.equal(runs["one"][key], runs["two"][key]) for key in runs["one"])
    assert not torch.equal(runs["one"]["head.weight"], runs["other"]["head.weight"])


def test_photos_get_the_recipe_by_default(tmp_path):
    split = Split(torch.zeros(8), ["a"], pixels=torch.zeros(8, 3, 128, 128, dtype=torch.uint8))
    _, options, notes = settle(Options(model="gspn_tiny"), "folder", split)
    assert (options.preset, options.mixup, options.rand_augment, notes) == ("photos", 0.8, "m9-mstd0.5-inc1", [])
    assert Mixing.of(options, 5) is not None and Augmentation.of(options, "folder", (128, 128)).slow
