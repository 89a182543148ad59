"""The options of the commands. Each is defined once, as a field of an OptionSet: its flag with help, type, default and
range, its key in a configuration file and what a run keeps of it all follow from the field.

    base       what an option and a set of options are; configuration files
    task       TaskSpec: what the rest of gspn knows of a task without importing it
    training   the options that several tasks share
    classify, diffusion, distill      one task each: its options, and SPEC, its TaskSpec
    classifiers, generators, bench, demo    the commands that do not train: one set for each

Nothing here is slow to import. Every module with a SPEC is a task: `TASKS` finds it.
"""

import pkgutil
from importlib import import_module

from gspn.options.base import (
    OptionError,
    OptionSet,
    far_from,
    file_text,
    flags,
    option,
    parse_model_args,
    parse_names,
    parse_size,
    read_file,
)
from gspn.options.classify import Options
from gspn.options.diffusion import GeneratorOptions
from gspn.options.distill import DistillOptions
from gspn.options.task import TaskSpec
from gspn.options.training import DataOptions, LoopOptions

__all__ = [
    "TASKS",
    "DataOptions",
    "DistillOptions",
    "GeneratorOptions",
    "LoopOptions",
    "OptionError",
    "OptionSet",
    "Options",
    "TaskSpec",
    "far_from",
    "file_text",
    "flags",
    "option",
    "parse_model_args",
    "parse_names",
    "parse_size",
    "read_file",
]

_modules = [import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
# Every task, by its name in config.json.
TASKS: dict[str, TaskSpec] = {spec.name: spec for spec in (getattr(each, "SPEC", None) for each in _modules) if spec}
