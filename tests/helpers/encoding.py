"""What the tests of latents share: a tiny VAE and pictures; conftest.py has what was encoded of them."""

import diffusers
import numpy as np
import torch
from PIL import Image

SIZE = dict(size=(16, 8), workers=0)  # latents of 3x8x4


def make_vae(seed=0, **config):
    torch.manual_seed(seed)
    tiny = dict(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=3, sample_size=16)
    tiny |= dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    return diffusers.AutoencoderKL(**{**tiny, "scaling_factor": 0.5, "shift_factor": 0.25, **config})


def make_pictures(root):
    """Two classes, 13 training and 3 test images of 24x20; one training image is damaged."""
    for split, name, count in (("train", "cat", 7), ("train", "dog", 6), ("test", "dog", 3)):
        (root / split / name).mkdir(parents=True)
        for i in range(count):
            noise = np.random.RandomState(len(split) * 100 + i).randint(0, 255, (24, 20, 3), np.uint8)
            Image.fromarray(noise).save(root / split / name / f"{i}.png")
    bad = root / "train" / "cat" / "5.png"
    bad.write_bytes(bad.read_bytes()[:100])
    return root
