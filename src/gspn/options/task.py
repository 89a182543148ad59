"""What the command, the run folder and the readers of runs know of a task without importing it."""

from collections.abc import Callable
from dataclasses import dataclass

from gspn.options.base import OptionSet


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """A task: what `gspn COMMAND` trains, and what its runs hold.

    Attributes:
        name: the task in config.json. command: the command of gspn that trains it. help: the command's help text.
        module: the module with the class Setup, a gspn.tasks.base.Setup. extra: the extra of gspn that it needs.
        options: the class of its options.
        data_help: what DATA may be. label: gives what the default run folder is named after, beside the data.
        written: the files of a run beside config.json, options.yaml, metrics.jsonl and checkpoints, from its first
            epoch on. drawn: those that the end of the training adds. Both are patterns.
        taken_by: what takes such a run; {} stands for its path. takes_own_runs: whether --init-from takes such a run.
    """

    name: str
    command: str
    help: str
    module: str
    extra: str = "train"
    options: type[OptionSet]
    data_help: str
    label: Callable[[OptionSet], str]
    written: tuple[str, ...] = ()
    drawn: tuple[str, ...] = ()
    taken_by: str
    takes_own_runs: bool = False
