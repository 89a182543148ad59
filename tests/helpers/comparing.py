"""What the tests of `gspn fid` share: pictures that are compared by their colours, and a classifier's run."""

import types

import numpy as np
import torch
from PIL import Image
from torch import nn

from gspn.metrics.features import Extractor
from gspn.metrics.fid import evaluate_samples
from gspn.models import create_model
from gspn.train.run import Run

NAMES = ["blue", "green", "red"]


class Colours(nn.Module):
    """Features: mean and deviation of each colour. Answers: which colour there is most of (blue, green, red)."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.seen, self.stop = [], None

    def forward(self, pixels):
        if self.stop is not None and len(self.seen) >= self.stop:
            raise KeyboardInterrupt
        x = pixels.double() * self.weight  # rounded to float32 once, so that the order of the sums does not show
        self.seen.append(tuple(pixels.shape))
        return torch.cat([x.mean((2, 3)), x.std((2, 3))], 1).float(), x.mean((2, 3)).flip(1).float()


def colour_extractor(**more):
    return Extractor("colours", Colours(), 3, "as they are", **{"class_names": NAMES} | more)


def paint(folder, seed, count=12, size=(10, 8), scale=1):
    """A folder of class folders with noisy one-coloured pictures; returns them, (N, H, W, 3), in the order of NAMES."""
    draw, images = np.random.RandomState(seed), []
    for name in NAMES:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            colour = np.array([name == "red", name == "green", name == "blue"]) * 100 + 60 + draw.randint(0, 40, 3)
            pixels = (colour + draw.randint(-20, 20, (*size, 3))).astype(np.uint8)
            images.append(pixels.repeat(scale, 0).repeat(scale, 1))
            Image.fromarray(images[-1]).save(folder / name / f"{i:02}.png")
    return np.stack(images)


def colour_features(images):
    x = torch.from_numpy(images).permute(0, 3, 1, 2).double()
    return torch.cat([x.mean((2, 3)), x.std((2, 3))], 1).float().double().numpy()


def paint_both(at):
    """(samples, reference): folders, and their images."""
    drawn, real = paint(at / "drawn", 1), paint(at / "real", 2, 20)
    return types.SimpleNamespace(drawn=at / "drawn", real=at / "real", images=(drawn, real), at=at)


def compare(samples, reference, extractor=None, **more):
    return evaluate_samples(
        samples, reference, extractor or colour_extractor(), **{"workers": 0, "batch_size": 7} | more
    )


def as_npz(path, images, save=np.savez, **more):
    save(path, images, **more)
    return path


def looked_at(extractor):
    count = sum(shape[0] for shape in extractor.network.seen)
    extractor.network.seen.clear()
    return count


def classifier_run(path):
    """A run of `gspn train` with random weights, and its model."""
    torch.manual_seed(3)
    model = create_model("gspn_micro", num_classes=3, depths=[1], width=8, global_levels=[0], stem_stride=4).eval()
    how = {"channels": 3, "size": [12, 16], "mean": [0.4] * 3, "std": [0.2] * 3, "crop": 1.0}
    config = {"task": "classification", "preprocessing": how, "model": model.config, "class_names": NAMES}
    config |= {"data": {"where": "nowhere"}, "options": {"precision": "fp32"}}
    made = Run.create(path, config)
    made.save_checkpoint("best", {"model": model.state_dict()}, {})
    return types.SimpleNamespace(path=made.path, model=model)
