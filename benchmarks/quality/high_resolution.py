"""Images many times larger than a small text-to-image model was trained for, made stage by stage with attention and
with GSPN: each stage's picture and its seconds, from the end of the stage before until its file is written. The first
stage includes the planning.

    python -m benchmarks.quality.high_resolution --stem benchmarks/results/quality/high-resolution \\
        --teacher TEACHER/pipeline --student "GSPN=RUN" --sides 512 1024 --work DIR --commit HASH

TEACHER is made by examples/emoji/text_to_image.py, RUN by gspn distill. --sides are the sides of the largest images,
the teacher's first, then each student's. DIR keeps the stages, so that the command can be stopped and started again;
use one DIR for each setting. Beside the stages stands an image that the model makes at once, at four times its trained
side, with the same scheduler, steps and seed. Writes STEM.json, STEM.md, STEM.png and, of the last model,
STEM-largest.jpg.
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
from benchmarks.harness import harness
from gspn.files import write_json

CAPTIONS = ("blue heart", "clock face three oclock", "grinning face")
AT_ONCE, CELL = 4, 256  # times the trained side; pixels of an image in the picture


def make(pipe, caption: str, side: int, workdir: Path, arguments) -> list[dict]:
    """A row for each stage, with the file of its image; stages that exist already are kept."""
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
    """The image that the pipeline makes without stages."""
    if not file.exists():
        source, scale = torch.Generator().manual_seed(arguments.seed), arguments.guidance
        pipe(caption, side, side, guidance_scale=scale, generator=source).images[0].save(file)
    return file


def picture(lines: dict[str, list[Path]], titles: list[str], path: Path) -> None:
    """Lines of images at one size, under `titles`; the name of a line stands to its left."""
    figure = Figure(figsize=(1.95 * len(titles) + 0.6, 1.95 * len(lines) + 0.3), layout="constrained")
    panels = figure.subplots(len(lines), len(titles), squeeze=False)
    for panel, title in zip(panels[0], titles, strict=True):
        panel.set_title(title, fontsize=9)
    for (name, files), line in zip(lines.items(), panels, strict=True):
        line[0].set_ylabel(name, fontsize=9)
        for panel in line:
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_visible(False)
        for panel, file in zip(line, files, strict=False):
            with Image.open(file) as image:
                shown = image.convert("RGB").resize((CELL, CELL), Image.Resampling.BICUBIC)
            panel.imshow(shown, interpolation="antialiased")
    figure.savefig(path, dpi=100, facecolor="white")


def table(rows: list[dict]) -> str:
    """Markdown: seconds of each stage, the mean over the captions."""
    models, sides = (list(dict.fromkeys(row[key] for row in rows)) for key in ("model", "side"))
    lines = []
    for model in models:
        cells = []
        for side in sides:
            found = [row["seconds"] for row in rows if (row["model"], row["side"]) == (model, side)]
            cells.append(f"{sum(found) / len(found):.1f}" if found else "not run")
        lines.append([model, *cells])
    return harness.table(["seconds of a stage", *(f"{side}x{side}" for side in sides)], lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stem", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--student", action="append", default=[], metavar="NAME=RUN")
    parser.add_argument(
        "--sides",
        type=int,
        nargs="+",
        required=True,
        help="sides of the largest images: the teacher's, then each student's",
    )
    parser.add_argument("--caption", action="append", default=[], help=f"default: {', '.join(CAPTIONS)}")
    parser.add_argument("--guidance", type=float, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--command", action="append", default=[], help="a command that made the models")
    parser.add_argument("--commit", required=True, help="the commit of the code that made the images")
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
    rows, lines, big = [], {}, AT_ONCE * trained
    for (name, run), side in zip(models.items(), arguments.sides, strict=True):
        half = torch.autocast("cpu", torch.bfloat16, enabled=arguments.bf16)
        with contextlib.nullcontext() if run is None else gspn.load_swap(pipe, run), half:
            for caption in captions:
                folder = arguments.work / f"{name}-{caption.replace(' ', '-')}-{side}"
                for row in make(pipe, caption, side, folder, arguments):
                    rows.append({"model": name, "caption": caption, "side": row["size"][0], **row})
                    print(rows[-1], flush=True)
                single = at_once(pipe, caption, big, folder / "at-once.png", arguments)
                mine = [row for row in rows if (row["model"], row["caption"]) == (name, caption)]
                lines[f"{caption}\n{name}"] = [single, *(Path(row["file"]) for row in mine)]
    sides = list(dict.fromkeys(row["side"] for row in rows))
    by_caption = sorted(lines.items(), key=lambda line: captions.index(line[0].partition("\n")[0]))
    picture(dict(by_caption), [f"{big}x{big} at once", *(f"{s}x{s}" for s in sides)], Path(f"{stem}.png"))
    with Image.open(rows[-1]["file"]) as image:
        image.save(f"{stem}-largest.jpg", quality=88)
    for row in rows:
        del row["file"]
    result = {"commands": arguments.command, "commit": arguments.commit, "environment": harness.environment()}
    result |= {"trained": trained, "guidance": arguments.guidance, "bf16": arguments.bf16, "rows": rows}
    harness.write_json(Path(f"{stem}.json"), result | {"notes": arguments.note}, quiet=True)
    largest = rows[-1]
    text = [
        f"Trained at {trained}x{trained}, made at up to {max(sides)}x{max(sides)}. Guidance {arguments.guidance:g}, "
        f"{type(pipe.scheduler).__name__}, the defaults otherwise (the images made at once: 50 steps); "
        f"{arguments.threads} thread{'s' * (arguments.threads > 1)}, {'bf16' if arguments.bf16 else 'fp32'}, one model "
        f"after the other. Commit {arguments.commit[:12]}.",
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
