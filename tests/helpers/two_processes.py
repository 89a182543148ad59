"""What test_distributed.py runs, in one process by itself and in two by torchrun: `two_processes.py WHAT FOLDER`, where
WHAT is a function of this module."""

import json
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate.utils import gather_object
from helpers.training import TINY

from gspn import plots
from gspn.options import OptionError, Options
from gspn.options.diffusion import GeneratorOptions
from gspn.tasks.classify import resume_classifier, train_classifier
from gspn.tasks.diffusion import train_generator
from gspn.train import loop
from gspn.train.optim import running_statistics

SMALL = dict(TINY, width=8)
OPTIONS = dict(model_args=SMALL, epochs=1, batch_size=56, lr=5e-3, ema=0.9, seed=3, workers=0)  # 25 steps an epoch
SHARDED = OPTIONS | dict(epochs=2, batch_size=350, accumulate=2, save_every="3", fsdp=True)  # 4 steps an epoch

# at a learning rate of 0 what is random in training changes nothing, and validation and samples have to be the same
GENERATOR = dict(model_args={"hidden_size": 16, "depth": 2}, epochs=1, batch_size=350, lr=0.0, eval_images=51)


class Stopped(BaseException):
    """What stands for a kill."""


def losses_of(training):
    """(result, the loss of each step as the loop saw it) of a function that trains."""
    seen, look = [], loop.look

    def recording(losses, at, *more):
        before = at.loss
        result = look(losses, at, *more)
        seen.append(at.loss - before)
        return result

    loop.look = recording
    try:
        return training(), seen
    finally:
        loop.look = look


def stopped_and_resumed(path, data="digits", options=SHARDED):
    """Stops before the 8th step, the second after a checkpoint, where one is written every three steps."""
    count, backward, parameters = [0], loop.backward, []

    def stopping(task, model, *more):
        count[0] += 1
        if count[0] == 8:
            parameters.extend(type(p).__name__ for p in model.parameters())
            raise Stopped
        return backward(task, model, *more)

    loop.backward = stopping
    try:
        train_classifier(data, path, Options(**options))
    except Stopped:
        pass
    loop.backward = backward
    return resume_classifier(path)[1], sorted(set(parameters))


def main(what, folder):
    """What the function `what` finds, in a process that goes on as it was."""
    torch.set_num_threads(1)
    seeds, seed = [], loop.seed_everything

    def recording(value):
        seeds.append(value)
        seed(value)

    slow = dict.fromkeys(("curves", "predictions", "context", "losses"), lambda *args: None)  # slower than the training
    with patch.multiple(plots, **slow), patch.object(loop, "seed_everything", recording):
        return what(folder) | {"seeds": seeds}


def copies(folder):
    found = {}
    (_, found["metrics"], _), found["losses"] = losses_of(
        lambda: train_classifier("digits", folder / "copies", Options(**OPTIONS))
    )
    if torch.distributed.is_initialized():  # one process takes it
        try:
            train_classifier("digits", folder / "odd", Options(**OPTIONS | dict(batch_size=31)))
        except OptionError as error:
            found["refusal"] = str(error)
    return found


def statistics(folder):
    """Batch norm: what each process has of its running statistics and their averages, and what is written of them."""
    found, seen, update = {}, [], loop.Ema.update

    def recording(ema, step):
        update(ema, step)
        seen.append([tensor.sum().item() for tensor in running_statistics(ema.model).values()])
        seen[-1] += [mean.sum().item() for name, mean in ema.means.items() if "running" in name]

    options = OPTIONS | dict(model="gspn_mobile", model_args=SMALL | {"scan_dim": 4})
    with patch.object(loop.Ema, "update", recording):
        for fsdp in (False, True):
            train_classifier("digits", folder / f"statistics-{fsdp}", Options(**options, fsdp=fsdp))
    found["statistics"] = gather_object([seen])
    return found


def damaged(folder):
    """A training on damaged pictures, and one that is stopped and resumed."""
    for file in (folder / "data").rglob("[1-4].png"):
        file.write_bytes(b"damaged")
    options = OPTIONS | dict(batch_size=4, save_every="3", model="gspn_micro")
    train_classifier(folder / "data", folder / "whole", Options(**options))
    stopped_and_resumed(folder / "resumed", folder / "data", options)
    return {}


def others(folder):
    """Damaged pictures, shards of a model, generators."""
    found = {}
    options = Options(**OPTIONS | dict(batch_size=16, model="gspn_micro"))  # without batch norm, which differs
    _, found["of damaged"], found["warnings"] = train_classifier(folder / "data", folder / "damaged", options)
    (found["sharded"], found["parameters"]), found["sharded losses"] = losses_of(
        lambda: stopped_and_resumed(folder / "sharded")
    )
    for name, fsdp in (("generator", False), ("sharded generator", True)):
        train_generator("digits", folder / name, GeneratorOptions(**GENERATOR, fsdp=fsdp, sample_steps=3))
    return found


if __name__ == "__main__":
    found = main(globals()[sys.argv[1]], Path(sys.argv[2]))
    found["seeds of all"] = gather_object([found["seeds"]])
    if loop.make_accelerator().is_main_process:
        print(json.dumps(found))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # else its threads may abort the process at its end
