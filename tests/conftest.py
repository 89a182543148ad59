"""Fixtures that the tests share, and the backends that run here. What tests import stands in helpers/."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import gspn

# Only the Makefile's copy of timm gets operators that its torchvision lacks.
if (Path(__file__).parent.parent / ".timm").resolve() in (Path(p).resolve() for p in sys.path):
    from benchmarks.harness import torchvision_schemas

    torchvision_schemas.define()

# CI needs the CPU kernel; where it cannot be built, its tests are skipped by name.
HERE = [name for name in ("reference", "cpu") if name == "reference" or gspn.available_backends()[name].available]


@pytest.fixture(params=["reference", "cpu"])
def backend(request) -> str:
    if request.param not in HERE:
        pytest.skip(gspn.available_backends()[request.param].reason)
    return request.param


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# -- training; its modules are imported inside, because they need an extra --


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
    """(Run, metrics) of a tiny model trained on the digits."""
    from helpers.training import tiny_options

    from gspn.tasks.classify import train_classifier

    path = tmp_path_factory.mktemp("runs") / "digits"
    run, metrics, warnings = train_classifier("digits", path, tiny_options(epochs=3, warmup=1.0, lr=2e-2, ema=0.8))
    assert warnings == []
    return run, metrics


@pytest.fixture
def colours(tmp_path):
    """A folder with red, green and blue pictures, 24x20; one of the red ones is damaged."""
    from PIL import Image

    for name, colour in {"red": (200, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 200)}.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(12):
            noisy = np.clip(np.random.RandomState(i).randint(-20, 20, (24, 20, 3)) + colour, 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(tmp_path / "data" / name / f"{i}.png")
    bad = tmp_path / "data" / "red" / "3.png"
    bad.write_bytes(bad.read_bytes()[:100])
    return tmp_path / "data"


# -- segmentation --


@pytest.fixture(scope="session")
def masked(tmp_path_factory):
    """A folder with 20 images and masks, see helpers.masks."""
    from helpers.masks import make_masked

    return make_masked(tmp_path_factory.mktemp("data") / "shapes", 20)


@pytest.fixture(scope="session")
def masked_run(tmp_path_factory, masked):
    """The Run of a tiny segmenter trained on them."""
    from helpers.masks import masked_options

    from gspn.tasks import base
    from gspn.tasks.segment import Setup

    chosen = masked_options(epochs=10, min_scale=1.0, max_scale=1.0, val_fraction=0.2, class_weights="balanced")
    run, warnings = base.start(Setup, masked, tmp_path_factory.mktemp("runs") / "shapes", chosen)
    assert warnings == []
    return run


# -- latents; their modules are imported inside, because they need an extra --


@pytest.fixture(scope="session")
def vae(tmp_path_factory):
    """The folder of a tiny AutoencoderKL."""
    from helpers.encoding import make_vae

    path = tmp_path_factory.mktemp("models") / "vae"
    make_vae().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """The folder that helpers.encoding.make_pictures makes."""
    from helpers.encoding import make_pictures

    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def latents(tmp_path_factory, pictures, vae):
    """(the result of encode, its folder), with mirrored images and 5 images in each shard."""
    from helpers.encoding import SIZE

    from gspn.sampling.encode import encode

    out = tmp_path_factory.mktemp("latents") / "made"
    return encode(pictures, vae, out, flip=True, shard_size=5, batch_size=2, **SIZE), out


@pytest.fixture
def copied(latents, tmp_path):
    return shutil.copytree(latents[1], tmp_path / "copy")


# -- high resolution --


def pytest_configure(config):
    config.addinivalue_line("markers", "estimates: is about estimates of memory, which other tests do without")


@pytest.fixture
def no_estimates(request, monkeypatch):
    """Everything fits, and no time is spent on finding that out, except in tests marked `estimates`."""
    from gspn.stable_diffusion.highres import memory

    if request.node.get_closest_marker("estimates") is None:
        monkeypatch.setattr(memory, "peak_bytes", lambda *args, **kwargs: 0)


@pytest.fixture(scope="module")
def sd():
    from helpers.stable_diffusion import tiny_sd

    return tiny_sd()


@pytest.fixture(scope="module")
def sdxl():
    from helpers.stable_diffusion import tiny_sdxl

    return tiny_sdxl()


@pytest.fixture(params=["sd", "sdxl"])
def pipe(request):
    return request.getfixturevalue(request.param)
