"""Looks into trained backbones of the study: what do the propagation weights do, and what is lost without them?

python -m benchmarks.quality.mixers.analyse --photos FOLDER --models FOLDER --contenders gspn-global gspn-normed

FOLDER of `--photos` holds CIFAR-10, that of `--models` the trained weights; a model that it lacks is trained first, as
the study trains it. The figures go into one JSON, a contender at a time; the report has a section on them.
"""

import argparse
import copy
import json
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from benchmarks.harness import harness
from benchmarks.quality.mixers import inside
from benchmarks.quality.mixers.contenders import CONTENDERS, Backbone, backbone
from benchmarks.quality.mixers.study import BATCH, EXAMPLES, RATES, RESULTS, SEEDS, STEPS, Run, train
from benchmarks.quality.mixers.tasks import TASKS, Photos, Task

INSIDE = RESULTS / "inside"  # not among the runs, which the study reads
# where figures are taken, and the largest that is tested
SETTINGS = {"classes": ("1", "2"), "tracing": ("1", "2"), "far": ("32", "128")}
PHOTOS = {"figures": 300, "growth": 100, "test": 1_000, "largest": 300}
GRADIENTS = 16  # batches
FROM_PROXY = ("weight_proj", "input_proj", "output_proj", "skip_proj", "ray_bias")


def open_model(run: Run, task: Task, models: Path) -> tuple[Backbone, Backbone]:
    """The backbone as it starts and as trained; trains it first if its weights are not in the folder."""
    file = models / f"{run.stem}.safetensors"
    if not file.exists():
        print(f"{time.strftime('%H:%M')} trains {run.stem}", flush=True)
        train(run, task, dict.fromkeys(EXAMPLES, 100), models=models)  # what it measures is not kept
    start = backbone(run.contender, run.form, task.outputs, task.pooled, run.seed)
    trained = copy.deepcopy(start)
    trained.load_state_dict(load_file(file))
    return start, trained.eval()


def projections(model: Backbone) -> dict[str, nn.Parameter]:
    """The projections from the proxy in every block, by BLOCK.NAME."""
    return {
        f"{i}.{name.rsplit('.', 1)[-1]}": parameter
        for i, block in enumerate(model.blocks)
        for name, parameter in block.mixer.named_parameters()
        if name.rsplit(".", 1)[-1] in FROM_PROXY
    }


def gradients(model: Backbone, task: Task, seed: int, count: int, batch_size: int = BATCH) -> dict[str, dict]:
    """Of the loss over `count` training batches, for each projection: `relative`, the root mean square of the
    gradient's norm over the projection's own norm; `element`, that of a single element, to be compared with AdamW's
    epsilon of 1e-8; and `agreement`, the norm of the mean gradient over that root mean square: 1 where all batches want
    the same, count ** -0.5 where nothing but noise is left."""
    found = projections(model)
    sums = {name: torch.zeros_like(parameter) for name, parameter in found.items()}
    squares = dict.fromkeys(found, 0.0)
    for batch in task.batches(seed, count, batch_size):
        loss = task.loss(model, batch)
        for (name, _), gradient in zip(found.items(), torch.autograd.grad(loss, list(found.values())), strict=True):
            sums[name] += gradient
            squares[name] += gradient.square().sum().item()
    result = {}
    for name, parameter in found.items():
        size = (squares[name] / count) ** 0.5
        agreement = sums[name].norm().item() / count / size if size else 0.0
        relative, element = size / parameter.norm().item(), size / parameter.numel() ** 0.5
        result[name] = {"relative": relative, "element": element, "agreement": agreement}
    return result


def moved(start: Backbone, trained: Backbone) -> dict[str, float]:
    """How far training took each projection, over the norm that it started with."""
    before = projections(start)
    return {name: ((p - before[name]).norm() / before[name].norm()).item() for name, p in projections(trained).items()}


def photos_of(task: Task, setting: str, count: int) -> list[torch.Tensor]:
    """The first inputs of the test batches, `count` photos in all."""
    return [batch[0] for batch in task.test_batches("test", setting, count)]


def replaced(model: Backbone, task: Task, setting: str, count: int, means: list[inside.Means]) -> dict[str, dict]:
    """What the model reaches without retraining when a part of every layer is replaced."""
    found = {}
    for name, replace in inside.REPLACEMENTS.items():
        with torch.no_grad(), inside.Calls(lambda block, call, to=replace: to(call, means[block])):
            found[name] = task.measure(model, "test", setting, count)
        print(f"      {setting}, {name}: {found[name][task.better]:.4f}", flush=True)
    return found


def look_into(
    run: Run,
    task: Task,
    models: Path,
    counts: dict[str, int] = PHOTOS,
    batches: int = GRADIENTS,
    batch_size: int = BATCH,
) -> dict:
    """All figures of one trained backbone."""
    start, trained = open_model(run, task, models)
    if "0.weight_proj" not in projections(trained):
        raise ValueError(
            f"the weights of {run.contender!r} do not depend on the input: expected a mixer whose weights do"
        )
    usual, largest = SETTINGS[task.name]
    calls = inside.calls_of(trained, photos_of(task, usual, counts["figures"]))
    means = [inside.means(call) for call in calls]
    blocks = [
        inside.figures(call) | {"output changes": inside.output_changes(call, mean), "levers": inside.levers(call)}
        for call, mean in zip(calls, means, strict=True)
    ]
    for block, call in zip(blocks, inside.calls_of(trained, photos_of(task, largest, counts["growth"])), strict=True):
        block["state by line, largest"] = inside.growth(call)
    return {
        **run._asdict(),
        "settings": [usual, largest],
        "photos": counts,
        "gradient batches": batches,
        "blocks": blocks,
        "moved": moved(start, trained),
        "gradients": {
            "start": gradients(start, task, run.seed, batches, batch_size),
            "trained": gradients(trained, task, run.seed, batches, batch_size),
        },
        "replaced": {
            setting: replaced(trained, task, setting, count, means)
            for setting, count in ((usual, counts["test"]), (largest, counts["largest"]))
        },
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="the folder of CIFAR-10")
    parser.add_argument(
        "--models", type=Path, required=True, help="the folder of trained weights; missing ones are made"
    )
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, required=True, metavar="MIXER")
    parser.add_argument("--task", choices=SETTINGS, default="classes")
    parser.add_argument(
        "--rate", type=float, default=RATES[1], help="learning rate of the models (default: %(default)g)"
    )
    parser.add_argument("--seed", type=int, default=SEEDS[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, help="the JSON; contenders that it has already stay in it")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    task = TASKS[arguments.task](Photos.open(arguments.photos))
    out = arguments.out or INSIDE / f"{task.name}-bare.json"
    for name in arguments.contenders:
        run = Run(task.name, "bare", name, arguments.rate, arguments.seed, arguments.steps)
        found = look_into(run, task, arguments.models)
        content = json.loads(out.read_text()) if out.exists() else {}  # another process may have written meanwhile
        key = name if run.rate == RATES[1] else f"{name}, rate {run.rate:g}"
        content[key] = found | {"environment": harness.environment()}
        harness.write_json(out, content, quiet=True)
        print(f"{time.strftime('%H:%M')} {out}: {key}", flush=True)


if __name__ == "__main__":
    main()
