"""Compares a teacher, its students and untrained swaps of the teacher: images by caption, distances from the training
images at the trained size and at unseen sizes, and how far a student's prediction is from the teacher's.

    gspn distill TEACHER/pipeline --data DATA --size 64 --form qkv --segment 4 --out RUN4
    python -m benchmarks.quality.text_to_image_compare --stem benchmarks/results/quality/text-to-image \\
        --teacher TEACHER/pipeline --data DATA --student "segment 4=RUN4" --student "global=RUN" \\
        --features "a classifier=classifier:RUN" --work DIR --commit HASH

TEACHER and DATA are made by examples/emoji. A student is a run of gspn distill or a file written by Swap.save. Beside
each student stands the swap that gspn.swap makes from the teacher's weights, untrained. The n-th caption has the same
noise for all models. DIR keeps the samples, so that the command can be stopped and started again. Writes STEM.json,
STEM.md, STEM-captions.png and STEM-sizes.png.
"""

import argparse
import contextlib
import hashlib
import json
import textwrap
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from matplotlib.figure import Figure
from PIL import Image

import gspn
from benchmarks.harness import harness
from examples.emoji.text_to_image import SHOWN, draw, read_data, to_images, to_model
from gspn.data.images import decode, generator
from gspn.metrics.features import load_extractor
from gspn.metrics.fid import evaluate_samples

FACTORS = {"1x": (1, 1), "1.5x": (1.5, 1.5), "2x": (2, 2), "2:1": (1, 2)}  # of height and width
TEACHER, FLOOR = "teacher", "training images through the autoencoder"
SIZED = SHOWN[5::6]  # captions shown at every size


class Models:
    """One pipeline that becomes the teacher, a student, or the teacher swapped as that student was, untrained."""

    def __init__(self, teacher: Path, students: dict[str, Path]):
        self.pipe = StableDiffusionPipeline.from_pretrained(teacher)
        self.students, self.about = students, {}
        count = sum(p.numel() for p in self.pipe.unet.parameters())
        self.about[TEACHER] = {"parameters": count}
        for name, path in students.items():
            with gspn.load_swap(self.pipe, path) as swap:
                made = {"form": swap.form, "segment": swap.segment}
                count = sum(p.numel() for p in self.pipe.unet.parameters())
            for each in (name, f"{name}, gspn.swap alone"):
                self.about[each] = {"parameters": count, **made}

    @property
    def names(self) -> list[str]:
        return list(self.about)

    def use(self, name: str) -> contextlib.AbstractContextManager:
        """A context in which the pipeline is that model."""
        if name == TEACHER:
            return contextlib.nullcontext()
        if name in self.students:
            return gspn.load_swap(self.pipe, self.students[name])
        return gspn.swap(self.pipe, form=self.about[name]["form"], segment=self.about[name]["segment"])

    def size(self, factor: str) -> tuple[int, int]:
        """(H, W) in pixels."""
        side = self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor
        return tuple(round(side * each) for each in FACTORS[factor])


def check_folder(arguments) -> None:
    """Refuses a folder with samples of other models or settings."""
    files = {"teacher": arguments.teacher / "unet" / "diffusion_pytorch_model.safetensors"}
    for name, path in (each.partition("=")[::2] for each in arguments.student):
        files[name] = Path(path) / "gspn_swap.safetensors" if Path(path).is_dir() else Path(path)
    made = {name: getattr(arguments, name) for name in ("guidance", "steps", "seed", "bf16")}
    for name, path in files.items():
        with open(path, "rb") as file:
            made[name] = hashlib.file_digest(file, "sha256").hexdigest()
    known = arguments.work / "samples.json"
    if known.exists() and (found := json.loads(known.read_text())) != made:
        differing = [name for name in found | made if found.get(name) != made.get(name)]
        raise SystemExit(f"{arguments.work} holds samples of another {', '.join(differing)}: give another --work")
    arguments.work.mkdir(parents=True, exist_ok=True)
    harness.write_json(known, made, quiet=True)


def sample(models: Models, name: str, captions: list[str], size: tuple[int, int], folder: Path, arguments) -> None:
    """An image for each caption in `folder`; images that exist already are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    if (more := len(list(folder.glob("*.png"))) - len(captions)) > 0:
        raise SystemExit(f"{folder} holds {more} images more than --counts asks for: give another --work")
    with models.use(name):
        for first in range(0, len(captions), arguments.batch):
            part = captions[first : first + arguments.batch]
            files = [folder / f"{number:05d}.png" for number in range(first, first + len(part))]
            if all(file.exists() for file in files):
                continue
            with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bf16):
                options = {"guidance_scale": arguments.guidance, "num_inference_steps": arguments.steps}
                images = draw(models.pipe, part, arguments.seed, first=first, height=size[0], width=size[1], **options)
            for file, image in zip(files, images, strict=True):
                image.save(file)
    print(f"{name}: {len(captions)} images of {size[0]}x{size[1]}", flush=True)


@torch.no_grad()
def rebuild(vae, pixels: torch.Tensor, folder: Path) -> None:
    """Training images through the autoencoder: the distance that real images have behind the same decoder."""
    folder.mkdir(parents=True, exist_ok=True)
    found = torch.cat([vae.decode(vae.encode(to_model(part)).latent_dist.mean).sample for part in pixels.split(64)])
    for number, image in enumerate(to_images(found)):
        image.save(folder / f"{number:05d}.png")


@torch.no_grad()
def features_of(network: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.cat([network(part)[0] for part in pixels.split(64)]), dim=1)


def found_again(network, known: torch.Tensor, folder: Path, chosen: list[int], size) -> dict[str, float]:
    """Shares of the samples for which their caption's own image is the nearest of all training images, or one of the
    ten nearest."""
    images = [decode(folder / f"{number:05d}.png").convert("RGB") for number in range(len(chosen))]
    pixels = []
    for image in images:
        left, top = (image.width - min(image.size)) / 2, (image.height - min(image.size)) / 2
        box = (left, top, left + min(image.size), top + min(image.size))
        image = image.resize(size[::-1], Image.Resampling.BICUBIC, box=box)
        pixels.append(torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(*size, 3).permute(2, 0, 1))
    near = features_of(network, torch.stack(pixels)) @ known.T
    own = near.gather(1, torch.tensor(chosen)[:, None])
    rank = (near > own).sum(1)
    return {"first": (rank < 1).float().mean().item(), "ten": (rank < 10).float().mean().item()}


@torch.no_grad()
def errors(models: Models, pixels: torch.Tensor, captions: list[str], chosen: list[int], seed: int) -> list[dict]:
    """The relative squared error of each model's prediction against the teacher's, on noisy training images enlarged to
    every size, timesteps evenly spread."""
    pipe, rows = models.pipe, []
    text = pipe.encode_prompt([captions[n] for n in chosen], "cpu", 1, False)[0]
    steps = torch.linspace(0, pipe.scheduler.config.num_train_timesteps - 1, len(chosen)).long()
    for factor in FACTORS:
        enlarged = torch.nn.functional.interpolate(
            to_model(pixels[chosen]), models.size(factor), mode="bicubic", antialias=True
        )
        start = pipe.vae.encode(enlarged.clamp(-1, 1)).latent_dist.mean * pipe.vae.config.scaling_factor
        noisy = pipe.scheduler.add_noise(start, torch.randn(start.shape, generator=generator(seed)), steps)
        found = {}
        for name in models.names:
            with models.use(name):
                found[name] = pipe.unet(noisy, steps, text).sample
        wanted = found[TEACHER]
        rows += [
            {"model": name, "factor": factor, "error": ((y - wanted).square().sum() / wanted.square().sum()).item()}
            for name, y in found.items()
            if name != TEACHER
        ]
    return rows


def compare(models: Models, pixels, captions: list[str], chosen: list[int], arguments) -> list[dict]:
    """A row for each size and model."""
    rows, networks = [], {name: load_extractor(name) for name in arguments.features}
    size = models.size("1x")
    known = {name: features_of(extractor.network, pixels) for name, extractor in networks.items()}
    for factor, count in zip(FACTORS, arguments.counts, strict=True):
        for name in [*models.names, *[FLOOR][: factor == "1x"]]:
            folder = arguments.work / f"{name}-{factor}"
            if name == FLOOR:
                rebuild(models.pipe.vae, pixels[chosen[:count]], folder)
            else:
                sample(models, name, [captions[n] for n in chosen[:count]], models.size(factor), folder, arguments)
            for features, extractor in networks.items():
                found = evaluate_samples(folder, arguments.data, extractor, size=size, cache=arguments.work, workers=0)
                row = {"model": name, "factor": factor, "size": models.size(factor), "images": count}
                row |= {"features": arguments.features[features], "notes": found["notes"]}
                row |= {"frechet": found["frechet_distance"], "kernel": found["kernel_distance"]["mean"]}
                row |= found_again(extractor.network, known[features], folder, chosen[:count], size)
                rows.append(row)
                print(row, flush=True)
    return rows


def table(rows: list[dict], key: str, form: str) -> str:
    """Markdown: a line for each model, a column for each size."""
    cells = {(row["model"], row["factor"]): format(row[key], form) for row in rows}
    models = dict.fromkeys(row["model"] for row in rows)
    lines = [[model, *(cells.get((model, factor), "") for factor in FACTORS)] for model in models]
    return harness.table(["", *FACTORS], lines)


def picture(blocks: list[list[tuple[str, list[Path]]]], lines: list[str], path: Path) -> None:
    """In each block, one above the other, a column of image files under each title; names to the left of the lines."""
    columns, ratios = len(blocks[0]), []
    for _, files in blocks[0]:
        with Image.open(files[0]) as image:
            ratios.append(image.width / image.height)
    figure = Figure(figsize=(0.95 * sum(ratios) + 1.5, 1.05 * len(lines) * len(blocks) + 0.3), layout="constrained")
    all_panels = figure.subplots(len(lines) * len(blocks), columns, squeeze=False, width_ratios=ratios)
    for number, block in enumerate(blocks):
        panels = all_panels[number * len(lines) : (number + 1) * len(lines)]
        for across, (title, files) in enumerate(block):
            panels[0, across].set_title(textwrap.fill(title, 16), fontsize=7.5)
            for panel, file in zip(panels[:, across], files, strict=True):
                with Image.open(file) as image:
                    panel.imshow(image.convert("RGB"), interpolation="lanczos")
                panel.set(xticks=[], yticks=[])
                panel.spines[:].set_visible(False)
        for line, panel in zip(lines, panels[:, 0], strict=True):
            panel.set_ylabel(line.replace(", ", ",\n"), rotation=0, ha="right", va="center", fontsize=7.5)
    figure.savefig(path, dpi=90, facecolor="white")


def pictures(models: Models, arguments) -> None:
    """STEM-captions.png: models by captions. STEM-sizes.png: models by a few captions at every size."""
    stem, work, half = arguments.stem, arguments.work, len(SHOWN) // 2
    for name in models.names:
        sample(models, name, SHOWN, models.size("1x"), work / f"{name}-1x-shown", arguments)
        for factor in FACTORS:
            sample(models, name, SIZED, models.size(factor), work / f"{name}-{factor}-sized", arguments)

    def column(title, kind, n):
        return title, [work / f"{name}-{kind}" / f"{n:05d}.png" for name in models.names]

    blocks = [[column(SHOWN[n], "1x-shown", n) for n in range(first, first + half)] for first in (0, half)]
    picture(blocks, models.names, Path(f"{stem}-captions.png"))
    titles = {factor: "{}x{}".format(*models.size(factor)) for factor in FACTORS}
    blocks = [
        [column(f"{titles[factor]}, {SIZED[n]}", f"{factor}-sized", n) for n in pair for factor in FACTORS]
        for pair in zip(range(0, len(SIZED), 2), range(1, len(SIZED), 2), strict=True)
    ]
    picture(blocks, models.names, Path(f"{stem}-sizes.png"))


def report(models: Models, rows, drift, arguments) -> None:
    stem, trained = arguments.stem, "x".join(map(str, models.size("1x")))
    result = {
        "commands": arguments.command,
        "commit": arguments.commit,
        "environment": harness.environment(),
        "models": models.about,
        "unet": dict(models.pipe.unet.config),
        "guidance": arguments.guidance,
        "steps": arguments.steps,
        "bf16": arguments.bf16,
        "rows": rows,
        "errors": drift,
        "notes": arguments.note,
    }
    harness.write_json(Path(f"{stem}.json"), result, quiet=True)
    told = [f"{name} {about['parameters']:,} parameters" for name, about in models.about.items()]
    counts = ", ".join(f"{count} at {factor}" for factor, count in zip(FACTORS, arguments.counts, strict=True))
    text = [
        f"{'; '.join(told)}. Trained at {trained}; all other sizes are unseen. Samples of training captions: {counts}; "
        f"guidance {arguments.guidance:g}, {arguments.steps} steps of DPM-Solver++ in "
        f"{'bf16' if arguments.bf16 else 'fp32'}, the same noise for all; their middle square is resized to {trained} "
        f"before it is compared with the training images. Commit {arguments.commit[:12]}.",
        *["```sh\n" + "\n".join(arguments.command) + "\n```"][: bool(arguments.command)],
        f"![Images by caption]({stem.name}-captions.png)",
    ]
    for features in dict.fromkeys(row["features"] for row in rows):
        of = [row for row in rows if row["features"] == features]
        for key, form, title in (
            ("frechet", ".1f", f"Frechet distance ({features}), not FID, comparable only within a column"),
            ("kernel", ".4f", f"Kernel distance ({features})"),
            ("ten", ".1%", "The caption's own emoji is among the ten nearest of all training images, same features"),
        ):
            text += [title + ":", table(of, key, form)]
    text += [
        "Relative squared error of the prediction against the teacher's, on noisy training images enlarged to a size:",
        table(drift, "error", ".4f"),
        *dict.fromkeys(note for row in rows for note in row["notes"]),
        *arguments.note,
        f"![Images at every size]({stem.name}-sizes.png)",
    ]
    Path(f"{stem}.md").write_text("\n\n".join(text) + "\n")
    print(f"wrote {stem}.json, .md and pictures")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stem", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--student", action="append", default=[], metavar="NAME=RUN")
    parser.add_argument(
        "--features",
        action="append",
        default=[],
        metavar="NAME=NETWORK",
        help="named as for gspn fid",
    )
    counts = "samples at " + ", ".join(FACTORS)
    parser.add_argument("--counts", type=int, nargs=len(FACTORS), default=[200, 100, 100, 100], help=counts)
    parser.add_argument("--guidance", type=float, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--errors", type=int, default=64, help="number of images for the error of the prediction")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast for the samples")
    parser.add_argument("--command", action="append", default=[], help="a command that made the models")
    parser.add_argument("--commit", required=True, help="the commit of the code that made the students")
    parser.add_argument("--note", action="append", default=[], help="a sentence for the report")
    parser.add_argument("--work", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.features = {network: name for name, _, network in (each.partition("=") for each in arguments.features)}
    students = {name: Path(path) for name, _, path in (each.partition("=") for each in arguments.student)}

    check_folder(arguments)
    models = Models(arguments.teacher, students)
    pixels, captions = read_data(arguments.data)
    chosen = torch.randperm(len(captions), generator=generator(arguments.seed)).tolist()
    drift = errors(models, pixels, captions, chosen[: arguments.errors], arguments.seed)
    print(json.dumps(drift), flush=True)
    rows = compare(models, pixels, captions, chosen, arguments)
    pictures(models, arguments)
    report(models, rows, drift, arguments)


if __name__ == "__main__":
    main()
