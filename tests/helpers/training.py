"""What the tests of training share: a tiny model, a task that trains in no time, what a folder holds."""

import os

import torch
from torch import nn

from gspn.data.labelled import open_data
from gspn.data.loader import make_loader
from gspn.options import Options
from gspn.tasks.classify import Classification, settle
from gspn.train.loop import make_accelerator
from gspn.train.run import Run

TINY = dict(depths=[1], width=16, global_levels=[0], stem_stride=4)


def tiny_options(**more):
    return Options(**{"model_args": TINY, "epochs": 1, "batch_size": 128, "workers": 0, **more})


class OneLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(64), nn.Linear(64, 10)

    def forward(self, x):
        return self.head(self.norm(x.flatten(1)))


def one_layer_task(path, **more):
    """(task, loader, settled options, run, accelerator) for a OneLayer on the digits."""
    data = open_data("digits")
    options = Options(
        **{"batch_size": 256, "epochs": 2, "lr": 1e-2, "warmup": 1.0, "ema": 0.9, "augment": "none"} | more
    )
    preprocessing, options, _ = settle(options, "digits", data.splits["train"])
    accelerator, size = make_accelerator(), options.batch_size
    loaders = [make_loader(data.splits[name], preprocessing, size, train=name == "train") for name in ("train", "test")]
    names = data.splits["train"].class_names
    task = Classification(*data.splits.values(), accelerator.prepare(loaders[1]), preprocessing, names, options)
    return task, loaders[0], options, Run.create(path, {"task": "classification"}), accelerator


def tree(folder):
    """What a folder holds: the content of every file by its path, but for the lock."""
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != ".lock")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of tensors by name are equal to the last bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def other_byte(file, at=-1):
    """Changes one byte of a file, whose name, size and time stay."""
    before, content = file.stat(), bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size and file.stat().st_mtime_ns == before.st_mtime_ns
