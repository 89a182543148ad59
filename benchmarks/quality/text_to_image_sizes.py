"""Distils a small text-to-image UNet for sizes nobody trained it at, and compares denoising losses there.

python -m benchmarks.quality.text_to_image_sizes --photos FOLDER --teacher FILE --train  trains the teacher
"""

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.quality.mixers.tasks import Photos
from gspn.tasks.objective import Objective

CAPTIONS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TOKENS, WIDTH = 4, 64  # states of a caption
BLOCK = 2  # a "latent" is a block of so many pixels squared: nothing is lost
BATCH, RATE, EMA, DROPPED = 16, 2e-3, 0.998, 0.1


class Captions(nn.Module):
    """The states of captions (B,TOKENS,WIDTH), a table; its last line is the empty caption."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(len(CAPTIONS) + 1, TOKENS * WIDTH)

    def forward(self, labels: Tensor) -> Tensor:
        return self.table(labels).unflatten(1, (TOKENS, WIDTH))


class Teacher(nn.Module):
    """The UNet, its captions and its noise: what gspn.tasks.student needs of a TextToImage."""

    def __init__(self):
        super().__init__()
        widths = (32, 64)
        self.unet = UNet2DConditionModel(
            sample_size=32 // BLOCK,
            in_channels=3 * BLOCK**2,
            out_channels=3 * BLOCK**2,
            block_out_channels=widths,
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D",) * len(widths),
            up_block_types=("CrossAttnUpBlock2D",) * len(widths),
            attention_head_dim=tuple(width // 16 for width in widths),  # diffusers' name for the number of heads
            cross_attention_dim=WIDTH,
            norm_num_groups=16,
        )
        self.captions = Captions()
        scheduler = DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type="v_prediction",
        )
        self.scheduler, self.objective = scheduler, Objective(scheduler)

    def latents(self, images: Tensor, *, draw: bool = False) -> Tensor:
        """(B,12,H/2,W/2) of images (B,3,H,W) in [-1, 1]."""
        return F.pixel_unshuffle(images, BLOCK)

    def conditions(self, captions: list[str | None], size: tuple[int, int]) -> dict[str, Tensor]:
        index = [CAPTIONS.index(c) if c is not None else len(CAPTIONS) for c in captions]
        return {"text": self.captions(torch.tensor(index))}

    def predict(self, noisy: Tensor, timestep: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        return self.unet(noisy, timestep, encoder_hidden_states=conditions["text"], return_dict=False)[0]


def resized(photos: Tensor, size: tuple[int, int] = (32, 32)) -> Tensor:
    """uint8 photos (B,3,32,32) in [-1, 1] at `size`."""
    x = photos.float() / 127.5 - 1
    return x if tuple(x.shape[2:]) == size else F.interpolate(x, size, mode="bicubic", antialias=True).clamp(-1, 1)


def train_teacher(photos: Photos, file: Path, steps: int, seed: int = 0) -> None:
    """Trains, averages and saves the teacher. Saves what there is every 100 steps."""
    torch.manual_seed(seed)
    teacher, (images, labels) = Teacher().train(), photos["train"]
    optimizer = torch.optim.AdamW(teacher.parameters(), RATE, betas=(0.9, 0.99), weight_decay=0.01)
    averaged = {name: value.clone() for name, value in teacher.state_dict().items()}
    began, recent = time.time(), []
    for step in range(steps):
        rate = RATE * min(1.0, (step + 1) / 200) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        index = torch.randint(len(images), (BATCH,))
        x, label = resized(images[index]), labels[index].where(torch.rand(BATCH) >= DROPPED, len(CAPTIONS))
        start = teacher.latents(torch.where(torch.rand(BATCH, 1, 1, 1) < 0.5, x.flip(3), x))
        noise, t = torch.randn(start.shape), torch.randint(teacher.objective.steps, (BATCH,))
        output = teacher.predict(teacher.objective.noisy(start, noise, t), t, {"text": teacher.captions(label)})
        loss = teacher.objective.losses(output, start, noise, t)[0].mean()
        loss.backward()
        nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        with torch.no_grad():
            keep = min(EMA, (1 + step) / (10 + step))
            for name, value in teacher.state_dict().items():
                averaged[name].lerp_(value, 1 - keep)
        if (step + 1) % 100 == 0 or step + 1 == steps:
            save_file(averaged, file, {"steps": str(step + 1), "seed": str(seed)})
            mean, minutes = sum(recent) / len(recent), (time.time() - began) / 60
            print(f"step {step + 1}  loss {mean:.4f}  {minutes:.1f} min", flush=True)
            recent = []


def open_teacher(file: Path) -> Teacher:
    teacher = Teacher().eval().requires_grad_(False)
    teacher.load_state_dict(load_file(file))
    return teacher


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--steps", type=int, default=4000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    train_teacher(Photos.open(arguments.photos), arguments.teacher, arguments.steps)


if __name__ == "__main__":
    main()
