"""Where swapped layers start, in two small text-to-image UNets on CIFAR-10's photos: how far each layer's output is
from that of the attention it replaces, by its start and its form, before and after the layer-wise fit.

python -m benchmarks.quality.swap_start_photos --photos FOLDER --teachers FILE... --stem STEM

The teachers are those of text_to_image_sizes. The starts are random weights; those that gspn.swap makes of the
attention's weights; and the same with constant gates, which read nothing of Q and K. The feature maps are those of the
teacher on noisy training photos, with timesteps drawn uniformly; the fit judges on maps that it does not learn from.
Writes STEM.json and STEM.md.
"""

import argparse
import statistics
from pathlib import Path
from unittest import mock

import torch

import gspn
from benchmarks.harness import harness
from benchmarks.quality.denoising import pixels
from benchmarks.quality.mixers.tasks import Photos
from benchmarks.quality.text_to_image_teacher import BATCH, Teacher, open_teacher
from gspn.stable_diffusion import fit
from gspn.stable_diffusion import init as swap_init

FORMS = {
    "pure": {"form": "pure"},
    "qkv": {"form": "qkv"},
    "qkv, proxy_dim=16": {"form": "qkv", "proxy_dim": 16},
    "qkv, segment 4": {"form": "qkv", "segment": 4},
}
STARTS = ("random", "pretrained", "pretrained, constant gates")


class Feeder:
    """Runs a teacher's UNet on new noisy photos at each call."""

    def __init__(self, teacher: Teacher, photos: Photos, seed: int):
        self.teacher, (self.images, self.labels) = teacher, photos["train"]
        self.draw = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def __call__(self) -> None:
        teacher, draw = self.teacher, self.draw
        index = torch.randint(len(self.images), (BATCH,), generator=draw)
        start = teacher.latents(pixels(self.images[index]))
        t = torch.randint(teacher.objective.steps, (BATCH,), generator=draw)
        noisy = teacher.objective.noisy(start, torch.randn(start.shape, generator=draw), t)
        teacher.predict(noisy, t, teacher.states(self.labels[index]))


def measure(file: Path, photos: Photos, form: str, start: str, maps: int, steps: int) -> dict:
    """The mean over the layers of their relative errors before and after a fit."""
    teacher, made = open_teacher(file)
    torch.manual_seed(0)
    slight = 0.0 if start.endswith("constant gates") else swap_init.SLIGHT
    with mock.patch.object(swap_init, "SLIGHT", slight):
        swapped = gspn.swap(teacher.unet, init="random" if start == "random" else "pretrained", **FORMS[form])
    errors = fit(swapped, Feeder(teacher, photos, seed=0), maps=maps, steps=steps)
    before, after = (statistics.fmean(each[i] for each in errors.values()) for i in range(2))
    return {"teacher": made["seed"], "form": form, "start": start, "before": before, "after": after, "layers": errors}


def report(content: dict) -> str:
    """Markdown."""
    rows = []
    for form in FORMS:
        for start in STARTS:
            of = [row for row in content["rows"] if (row["form"], row["start"]) == (form, start)]
            cells = [f"{row['before']:.3f}, {row['after']:.3f}" for row in sorted(of, key=lambda row: row["teacher"])]
            rows.append([form, start, *cells])
    seeds = sorted({row["teacher"] for row in content["rows"]})
    return (
        "# Where swapped layers start, in two teachers\n\nRelative error of a layer's output against the attention it "
        "replaces, the mean of all layers; a zero output has error 1. The first figure is that of the start, the "
        f"second that after a fit of {content['steps']} steps with {content['maps']} feature maps of each layer, of "
        "which an eighth was held out for these figures. Made by `python -m benchmarks.quality.swap_start_photos`.\n\n"
        f"{harness.table(['form', 'start', *(f'teacher {seed}' for seed in seeds)], rows)}\n"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="the folder of CIFAR-10")
    parser.add_argument("--teachers", type=Path, nargs="+", required=True, metavar="FILE", help="their files")
    parser.add_argument("--stem", type=Path, required=True, help="of the files to write")
    parser.add_argument("--maps", type=int, default=256, help="feature maps of each layer (default: 256)")
    parser.add_argument("--steps", type=int, default=200, help="steps of the fit (default: 200)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    photos, rows = Photos.open(arguments.photos), []
    environment = harness.environment()
    for file in arguments.teachers:
        for form in FORMS:
            for start in STARTS:
                rows.append(measure(file, photos, form, start, arguments.maps, arguments.steps))
                told = "teacher {teacher}, {form}, {start}: {before:.3f}, {after:.3f}"
                print(told.format(**rows[-1]), flush=True)
    content = {"maps": arguments.maps, "steps": arguments.steps, "rows": rows, "environment": environment}
    harness.write_json(arguments.stem.with_suffix(".json"), content)
    arguments.stem.with_suffix(".md").write_text(report(content))


if __name__ == "__main__":
    main()
