"""The teacher of the study text_to_image_sizes: a small text-to-image UNet on CIFAR-10's photos.

It is a UNet2DConditionModel with attention at 16x16 and 8x8, on blocks of 2x2 pixels in the place of latents; a caption
is a class, with states that are learned.
"""

import math
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.quality.denoising import pixels
from benchmarks.quality.mixers.tasks import Photos
from gspn.tasks.objective import Objective

CAPTIONS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TOKENS, WIDTH = 4, 64  # states of a caption
SIDE, BLOCK = 32, 2  # pixels; a "latent" is a block of BLOCK x BLOCK of them: nothing is lost
BATCH, RATE, EMA, DROPPED = 8, 2e-3, 0.995, 0.1


class Teacher(nn.Module):
    """The UNet, the states of its captions and its noise: what gspn.tasks.student needs of a TextToImage."""

    def __init__(self):
        super().__init__()
        widths = (32, 64)
        self.unet = UNet2DConditionModel(
            sample_size=SIDE // BLOCK,
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
        self.captions = nn.Embedding(len(CAPTIONS) + 1, TOKENS * WIDTH)  # the last is the empty caption
        scheduler = DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction"
        )
        self.objective = Objective(scheduler)

    def latents(self, images: Tensor, *, draw: bool = False) -> Tensor:
        """(B,12,H/2,W/2) of images (B,3,H,W) in [-1, 1]."""
        return F.pixel_unshuffle(images, BLOCK)

    def states(self, labels: Tensor) -> dict[str, Tensor]:
        return {"text": self.captions(labels).unflatten(1, (TOKENS, WIDTH))}

    def conditions(self, captions: list[str | None], size: tuple[int, int]) -> dict[str, Tensor]:
        index = [len(CAPTIONS) if caption is None else CAPTIONS.index(caption) for caption in captions]
        return self.states(torch.tensor(index))

    def predict(self, noisy: Tensor, timestep: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        return self.unet(noisy, timestep, encoder_hidden_states=conditions["text"], return_dict=False)[0]


def train_teacher(photos: Photos, file: Path, minutes: float, seed: int = 0) -> None:
    """Trains, averages and saves the teacher, in that time: the learning rate falls along it as a cosine. Saves what
    there is every 100 steps."""
    torch.manual_seed(seed)
    teacher, (images, labels) = Teacher().train(), photos["train"]
    optimizer = torch.optim.AdamW(teacher.parameters(), RATE, betas=(0.9, 0.99), weight_decay=0.01)
    averaged = {name: value.clone() for name, value in teacher.state_dict().items()}
    began, recent, step, part = time.time(), [], 0, 0.0
    while part < 1:
        part = min(1.0, (time.time() - began) / 60 / minutes)
        rate = RATE * min(1.0, (step + 1) / 100) * (0.02 + 0.49 * (1 + math.cos(math.pi * part)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        index = torch.randint(len(images), (BATCH,))
        x, label = pixels(images[index]), labels[index].where(torch.rand(BATCH) >= DROPPED, len(CAPTIONS))
        start = teacher.latents(torch.where(torch.rand(BATCH, 1, 1, 1) < 0.5, x.flip(3), x))
        noise, t = torch.randn(start.shape), torch.randint(teacher.objective.steps, (BATCH,))
        output = teacher.predict(teacher.objective.noisy(start, noise, t), t, teacher.states(label))
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
        step += 1
        if step % 100 == 0 or part == 1:
            save_file(averaged, file, {"steps": str(step), "seed": str(seed)})
            print(f"step {step}  loss {statistics.fmean(recent):.4f}  {part:.0%} of {minutes} minutes", flush=True)
            recent = []


def open_teacher(file: Path) -> tuple[Teacher, dict[str, int]]:
    """(the teacher, the "steps" that it was trained for and the "seed" of its training)."""
    teacher = Teacher().eval().requires_grad_(False)
    teacher.load_state_dict(load_file(file))
    with safe_open(file, "pt") as opened:
        return teacher, {name: int(value) for name, value in opened.metadata().items()}
