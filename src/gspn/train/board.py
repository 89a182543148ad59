"""Logs for TensorBoard: losses and learning rate of every step, metrics and pictures of every epoch."""

from pathlib import Path

import numpy as np

from gspn.options import OptionError


def check_tensorboard() -> None:
    """Raises OptionError where tensorboard is not installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise OptionError(f'--tensorboard needs tensorboard ({error}): pip install "gspn[diffusion]"') from error


class Board:
    """Writes RUN/tensorboard; without a folder it writes nothing.

    Args:
        folder: the folder to write to, or None. step: the training starts or resumes after it; TensorBoard then hides
            what a killed training wrote for later steps.
    """

    def __init__(self, folder: Path | None, step: int = 0):
        self.writer = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

            self.writer = SummaryWriter(str(folder), purge_step=step + 1, filename_suffix=".gspn")

    def steps(self, last: int, losses: list[float], lr: float) -> None:
        """The losses of consecutive steps, the last of which is `last`, and its learning rate."""
        if self.writer is None:
            return
        for step, loss in enumerate(losses, last - len(losses) + 1):
            self.writer.add_scalar("step/loss", loss, step)
        self.writer.add_scalar("step/lr", lr, last)

    def epoch(self, row: dict, pictures: dict) -> None:
        """A row of metrics, and PIL images by name."""
        if self.writer is None:
            return
        for name, value in row.items():
            if isinstance(value, int | float) and name != "step":
                self.writer.add_scalar(f"epoch/{name}", value, row["step"])
        for name, picture in pictures.items():
            self.writer.add_image(name, np.asarray(picture.convert("RGB")), row["step"], dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
