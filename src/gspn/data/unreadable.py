"""The images that training could not read, and what was wrong with them."""

from accelerate.utils import gather_object
from torch import Tensor

from gspn.data.images import UNREADABLE, DataError, Split


class Unreadable:
    """Records unreadable images during training.

    Args:
        splits: the splits by name: "train" and, where its images count too, "evaluation".
        strict: an unreadable image is a DataError.

    Attributes:
        problems: an image's name and what is wrong with it, by (name of the split, index).
    """

    def __init__(self, splits: dict[str, Split], strict: bool = False):
        self.splits, self.strict = splits, strict
        self.seen: list[tuple[Tensor, Tensor]] = []
        self.problems: dict[tuple[str, int], str] = {}

    def saw(self, batch: dict) -> None:
        """Records a training batch. Errors: DataError if strict."""
        self.seen.append((batch["index"], batch["label"]))
        if self.strict:
            self.look()

    def look(self) -> None:
        """Examines the batches recorded since the last call. It is called seldom, as a GPU has to wait for it.
        Errors: DataError if strict."""
        for index, label in self.seen:
            self.note("train", index[label == UNREADABLE].tolist())
        self.seen.clear()

    def note(self, split: str, index: list[int]) -> None:
        """Records unreadable images of a split. Errors: DataError if strict."""
        for i in index:
            if (split, i) not in self.problems:
                self.problems[split, i] = self.splits[split].problem(i)
            if self.strict:
                raise DataError(f"unreadable image (--strict): {self.problems[split, i]}")

    def gather(self) -> int:
        """Shares with all processes what each of them recorded. Returns the number of training images among it."""
        for problems in gather_object([self.problems]):
            self.problems |= problems
        return sum(split == "train" for split, _ in self.problems)

    def state(self) -> list:
        """What a checkpoint keeps: what any process recorded. All processes call it."""
        self.look()
        self.gather()
        return [[*key, problem] for key, problem in self.problems.items()]

    def restore(self, state: list) -> None:
        """Puts back what `state` gave."""
        self.problems = {(split, i): problem for split, i, problem in state}


def warning_of(problems: list[str]) -> str:
    """A warning about unreadable images, from what is wrong with each."""
    shown = "".join(f"\n  {problem}" for problem in problems[:20]) + ("\n  ..." if len(problems) > 20 else "")
    return f"{len(problems)} unreadable image{'s' * (len(problems) > 1)} left out:{shown}"
