"""Images many times as large as a small text-to-image model was trained for, stage by stage, with attention and with
GSPN in its place: every stage's picture, its seconds and the memory that was expected.

    python -m benchmarks.high_resolution --stem benchmarks/results/high-resolution --teacher TEACHER/pipeline \\
        --student "GSPN=RUN" --sides 512 1024 --work DIR --commit HASH

TEACHER is benchmarks/text_to_image.py's, RUN one of gspn distill; --sides are of the images of each, the teacher's
first. DIR keeps the stages, so that what was stopped goes on. Beside them is what the model makes at once, without
stages, at four times its trained side. Writes STEM.json, STEM.md, STEM.png and, of the last model, STEM-largest.jpg.
"""

import argparse
import contextlib
import json
import time
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from matplotlib.figure import Figure
from PIL import Image

import gspn
from benchmarks import harness
from benchmarks.text_to_image import draw
from gspn.files import write_json

CAPTIONS = ("blue heart", "clock face three oclock", "grinning face")
AT_ONCE, CELL = 4, 256  # times the trained side; pixels of an image in the picture


def make(pipe, caption: str, side: int, workdir: Path, arguments) -> list[dict]:
    """A row for each stage, with the file of its image; stages that are there stay."""
    known = workdir / "seconds.json"
    seconds = json.loads(known.read_text()) if known.exists() else {}
    began = time.perf_counter()

    def told(pipe, index, image):
        nonlocal began
        seconds.setdefault(str(index), time.perf_counter() - began)
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(known, seconds)
        began = time.perf_counter()

    result = gspn.HighResPipeline(pipe)(
        caption,
        side,
        side,
        seed=arguments.seed,
        guidance_scale=arguments.guidance,
        workdir=workdir,
        callback_on_stage_end=told,
    )
    rows = []
    for index, (stage, images) in enumerate(zip(result.plan, result.stages, strict=True)):
        file = workdir / f"{stage.height}.png"
        images[0].save(file)
        row = {"size": stage.size, "taken": stage.taken, "of": stage.steps, "dilation": stage.dilation}
        row |= {"seconds": seconds[str(index)], "expected_mib": stage.memory_mib, "savers": stage.savers.told()}
        rows.append(row | {"file": str(file)})
    return rows


def at_once(pipe, caption: str, side: int, file: Path, arguments) -> Path:
    """What the pipeline makes without stages."""
    if not file.exists():
        options = {"num_inference_steps": 50, "guidance_scale": arguments.guidance}
        draw(pipe, [caption], arguments.seed, height=side, width=side, **options)[0].save(file)
    return file


def picture(columns: list[tuple[str, list[Path]]], lines: list[str], path: Path) -> None:
    """A column of images for each title, all as large; captions to the left."""
    figure = Figure(figsize=(2.1 * len(columns) + 0.9, 2.1 * len(lines) + 0.35), layout="constrained")
    places = figure.subplots(len(lines), len(columns), squeeze=False)
    for across, (title, files) in enumerate(columns):
        places[0, across].set_title(title, fontsize=8)
        for place, file in zip(places[:, across], files, strict=True):
            place.set(xticks=[], yticks=[])
            place.spines[:].set_visible(False)
            if file is not None:
                with Image.open(file) as image:
                    shown = image.convert("RGB").resize((CELL, CELL), Image.Resampling.BICUBIC)
                place.imshow(shown, interpolation="antialiased")
    for line, place in zip(lines, places[:, 0], strict=True):
        place.set_ylabel(line, fontsize=8)
    figure.savefig(path, dpi=100, facecolor="white")


def table(rows: list[dict]) -> str:
    """Markdown: seconds of each stage, the mean over the captions."""
    models, sides = (list(dict.fromkeys(row[key] for row in rows)) for key in ("model", "side"))
    lines = [f"| seconds of a stage | {' | '.join(f'{side}x{side}' for side in sides)} |"]
    lines.append(f"|---|{'---|' * len(sides)}")
    for model in models:
        cells = []
        for side in sides:
            found = [row["seconds"] for row in rows if (row["model"], row["side"]) == (model, side)]
            cells.append(f"{sum(found) / len(found):.1f}" if found else "not run")
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stem", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--student", action="append", default=[], metavar="NAME=RUN")
    parser.add_argument("--sides", type=int, nargs="+", required=True, help="of the teacher's images, then each one's")
    parser.add_argument("--caption", action="append", default=[], help=f"default: {', '.join(CAPTIONS)}")
    parser.add_argument("--guidance", type=float, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--command", action="append", default=[], help="what made the models")
    parser.add_argument("--commit", required=True, help="of the code that made the images")
    parser.add_argument("--note", action="append", default=[], help="a sentence for the Markdown file")
    parser.add_argument("--work", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    captions, stem = arguments.caption or list(CAPTIONS), arguments.stem
    models = {"attention": None} | {name: Path(run) for name, _, run in (s.partition("=") for s in arguments.student)}
    if len(models) != len(arguments.sides):
        parser.error(f"expected {len(models)} sides, one for each of {', '.join(models)}, got {len(arguments.sides)}")

    pipe = StableDiffusionPipeline.from_pretrained(arguments.teacher)
    pipe.set_progress_bar_config(mininterval=10)
    trained = pipe.unet.config.sample_size * pipe.vae_scale_factor
    rows, columns = [], []
    for (name, run), side in zip(models.items(), arguments.sides, strict=True):
        with (
            contextlib.nullcontext() if run is None else gspn.load_swap(pipe, run),
            torch.autocast("cpu", torch.bfloat16, enabled=arguments.bf16),
        ):
            for caption in captions:
                folder = arguments.work / f"{name}-{caption.replace(' ', '-')}-{side}"
                for row in make(pipe, caption, side, folder, arguments):
                    rows.append({"model": name, "caption": caption, "side": row["size"][0], **row})
                    print(rows[-1], flush=True)
            big = AT_ONCE * trained
            files = [
                at_once(
                    pipe, caption, big, arguments.work / f"{name}-{caption.replace(' ', '-')}-at-once.png", arguments
                )
                for caption in captions
            ]
            pipe.set_progress_bar_config(mininterval=10, disable=False)
        columns.append((f"{name}, {big}x{big}\nat once", files))
        for side in dict.fromkeys(row["side"] for row in rows if row["model"] == name):
            mine = [Path(row["file"]) for row in rows if (row["model"], row["side"]) == (name, side)]
            columns.append((f"{name},\n{side}x{side}", mine))
    picture(columns, captions, Path(f"{stem}.png"))
    with Image.open(rows[-1]["file"]) as image:
        image.save(f"{stem}-largest.jpg", quality=88)
    for row in rows:
        del row["file"]
    result = {"commands": arguments.command, "commit": arguments.commit, "environment": harness.environment()}
    result |= {"trained": trained, "guidance": arguments.guidance, "bf16": arguments.bf16, "rows": rows}
    harness.write_json(Path(f"{stem}.json"), result | {"notes": arguments.note}, quiet=True)
    largest = rows[-1]
    text = [
        f"Trained at {trained}x{trained}, made at up to {largest['side']}x{largest['side']}. Guidance "
        f"{arguments.guidance:g}, the pipeline's defaults otherwise; {arguments.threads} thread"
        f"{'s' * (arguments.threads > 1)}. Commit {arguments.commit[:12]}.",
        *["```sh\n" + "\n".join(arguments.command) + "\n```"][: bool(arguments.command)],
        f"![Stages of each model]({stem.name}.png)",
        table(rows),
        *arguments.note,
        f"The largest, {largest['caption']} by {largest['model']}:",
        f"![The largest]({stem.name}-largest.jpg)",
    ]
    Path(f"{stem}.md").write_text("\n\n".join(text) + "\n")
    print(f"wrote {stem}.json, .md, .png and -largest.jpg")


if __name__ == "__main__":
    main()
