"""Draws what trained backbones answer in the task `tracing`: test canvases of several sizes, and their tokens' answers.

python -m benchmarks.quality.mixers.tracing --photos FOLDER --models FOLDER --out FILE

FOLDER of --models holds weights that `study --models` kept, of runs at the first seed. Each contender found there has a
row, at the rate with the best held-out loss among the finished runs.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.quality.mixers.contenders import CONTENDERS, backbone
from benchmarks.quality.mixers.study import RESULTS, SEEDS, Run, best_rate, read
from benchmarks.quality.mixers.tasks import Photos, Tracing

SETTINGS, EACH = ("1", "1.5", "2"), 3  # canvases of each size
RED, BLUE, NOTHING = (0.84, 0.15, 0.16), (0.12, 0.35, 0.85), (0.93, 0.93, 0.93)


def answers(labels: Tensor, given: Tensor) -> Tensor:
    """(H,W,3): red and blue for the answers `given` at the tokens on a curve."""
    colours = torch.tensor([BLUE, RED])[given]
    return torch.where((labels != Tracing.IGNORED)[..., None], colours, torch.tensor(NOTHING))


def draw(task: Tracing, models: dict[str, torch.nn.Module], path: Path) -> None:
    """A row for the canvases, one for the right answers, and one for each model, whose titles are the keys."""
    columns = []
    for setting in SETTINGS:
        x, labels, _ = next(task.test_batches("test", setting, EACH))
        with torch.no_grad():
            given = {title: model(x).argmax(-1) for title, model in models.items()}
        shown = (x * 0.25 + 0.47).clamp(0, 1).permute(0, 2, 3, 1)
        for i in range(EACH):
            rows = [shown[i], answers(labels[i], labels[i].clamp(min=0))]
            columns.append((setting, [*rows, *(answers(labels[i], each[i]) for each in given.values())]))
    names = ["canvas", "right answer", *models]
    figure = Figure(figsize=(1.25 * len(columns) + 1.6, 1.3 * len(names) + 0.3), layout="constrained")
    grid = figure.subplots(len(names), len(columns), squeeze=False)
    for j, (setting, rows) in enumerate(columns):
        for i, image in enumerate(rows):
            axes = grid[i][j]
            axes.imshow(image.numpy(), interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            if i == 0:
                side = image.shape[0]
                axes.set_title(f"{side} x {side}" + (", trained" if setting == task.usual else ""), fontsize=8)
            if j == 0:
                axes.set_ylabel(names[i], fontsize=8, rotation=0, ha="right", va="center")
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="the folder of CIFAR-10")
    parser.add_argument("--models", type=Path, required=True, help="the folder of trained weights")
    parser.add_argument("--runs", type=Path, default=RESULTS, help="the folder of the runs")
    parser.add_argument("--out", type=Path, required=True, help="the picture")
    arguments = parser.parse_args()
    done, found = read(arguments.runs), {}
    for name, contender in CONTENDERS.items():
        rate = best_rate(done, Tracing.name, "bare", name)
        file = arguments.models / f"{Run(Tracing.name, 'bare', name, rate or 0.0, SEEDS[0]).stem}.safetensors"
        if file.exists():
            model = backbone(name, "bare", Tracing.outputs, Tracing.pooled, SEEDS[0])
            model.load_state_dict(load_file(file))
            found[contender.title] = model.eval()
    if not found:
        parser.error(f"{arguments.models} holds no weights of finished runs; study --models keeps them")
    draw(Tracing(Photos.open(arguments.photos)), found, arguments.out)


if __name__ == "__main__":
    main()
