"""The training loop, for any task: AdamW or Muon, warm-up and cosine, accumulation, clipping, EMA, bfloat16,
evaluation, checkpoints from which a training resumes exactly.

A Task defines the loss of a batch and the evaluation; the modules of gspn.tasks have one each. There may be several
processes (torchrun, accelerate launch): the loader's batch is the global one, which accelerate splits over them.

Random numbers are functions of what a resumed training has again: the order of (seed, epoch), augmentation of
(seed, epoch, index), drop path and mixing of (seed, step, process).
"""

import math
import random
import time
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain
from typing import Protocol

import accelerate
import numpy as np
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from gspn.data.images import mixed_seed
from gspn.data.loader import batches, untold_workers
from gspn.memory import is_out_of_memory
from gspn.names import reason_of
from gspn.progress import Progress
from gspn.train.board import Board
from gspn.train.optim import Ema, frozen_modules, learning_rate, make_optimizer, running_statistics
from gspn.train.run import RunError
from gspn.train.state import full_state_dict, restore

LOOK_EVERY = 16  # steps between readings of the losses on a GPU, which has to wait for each


class TrainingError(RuntimeError):
    """The training cannot continue. The checkpoints written before are good."""


class Task(Protocol):
    """What is trained. A batch is a dict of tensors, one row an item, with "index" among them, the item's number."""

    def prepare(self, batch: dict) -> dict:
        """A batch of the loader, on the device, as `loss` wants it; may draw from torch's random state."""

    def count(self, batch: dict) -> Tensor:
        """The number of items of a prepared batch that count; it divides the sum of the losses."""

    def loss(self, model, batch: dict) -> Tensor:
        """The sum of the losses over a prepared batch, or a part of one; a scalar."""

    def evaluate(self, model, accelerator) -> dict:
        """Metrics by name, JSON-able, "val_loss" among them. The model is in evaluation mode."""

    def score(self, metrics: dict) -> list[float]:
        """The best checkpoint has the largest score, compared number by number."""

    def line(self, row: dict) -> str:
        """The line to print after an epoch, from its row of metrics."""

    def pictures(self) -> dict:
        """The PIL images that the last evaluation drew, by name, in the main process."""

    def state(self) -> dict:
        """The task's own state for a checkpoint, JSON-able. All processes call it."""

    def restore(self, state: dict) -> None:
        """Restores what `state` returned."""


@dataclass
class Position:
    """How far a training is, with sums over the current epoch; a checkpoint stores it."""

    epoch: int = 0  # epochs done
    batch: int = 0  # batches done of the current one
    step: int = 0
    loss: float = 0.0  # summed over these batches, as are
    images: int = 0
    seconds: float = 0.0
    waiting: float = 0.0  # seconds until the next batch was there
    best: list[float] = field(default_factory=list)


def train(task, model, loader, options, run, accelerator, console=None, checkpoint=None):
    """Trains `model` on the batches of `loader` and keeps its progress in `run`.

    Args:
        task: a Task. model: any module. loader: of make_loader. options: LoopOptions, resolved.
        run: the Run, in the main process. It gets the checkpoint "last" at intervals and after every epoch, "best"
            after the best epoch, "epoch-0010" with keep_every, and a row of metrics after every epoch.
        accelerator: of make_accelerator. console: rich's, for the progress; None is silent.
        checkpoint: of Run.load_checkpoint, to resume from.
    Errors: TrainingError if the loss is not finite or memory does not suffice; SaveError if the disk is full; DataError
        if a process that reads images dies; RunError if the checkpoint belongs to another training.
    """
    frozen = frozen_modules(model, options.freeze or ())
    model = distribute(model, options.fsdp, accelerator)
    plain = accelerator.unwrap_model(model)
    optimizer, prepared = accelerator.prepare(make_optimizer(plain, options), loader)
    ema = Ema(plain, options.ema, options.ema_device or accelerator.device) if options.ema else None
    at = Position()
    if checkpoint is not None:
        saved, state = checkpoint
        restore(saved, plain, optimizer, ema)
        try:
            task.restore(state["task"])
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"the checkpoint is damaged or foreign: {type(error).__name__}: {error}") from error
        at = Position(**state["position"])
    steps, losses = len(prepared), []
    look_every = 1 if accelerator.device.type == "cpu" else LOOK_EVERY
    board = Board(run.path / "tensorboard" if run and options.tensorboard else None, at.step)
    tensors = partial(full_state_dict, plain, optimizer, ema, accelerator.is_main_process)
    saver = Saver(task, run, options, accelerator, tensors)
    if checkpoint is not None:
        saver.has_saved(at)

    console = console if accelerator.is_main_process else None
    bar = Progress("training", options.epochs * steps, "steps", done=at.step, console=console)
    with closing(board), explained(), bar:
        for epoch in range(at.epoch, options.epochs):
            loader.begin(epoch, at.batch)
            model.train()
            for module in frozen:
                module.eval()
            clock = Clock(at)
            for batch in batches(prepared):
                clock.batch_is_there()
                seed_everything(mixed_seed(options.seed, at.step, accelerator.process_index))
                lr = learning_rate(at.step, steps, options)
                for group in optimizer.param_groups:
                    group["lr"] = lr * group["lr_scale"]
                losses.append(backward(task, model, batch, options, accelerator))
                if options.clip:
                    accelerator.clip_grad_norm_(model.parameters(), options.clip)
                optimizer.step()
                optimizer.zero_grad()
                share_statistics(plain, accelerator)
                if ema is not None:
                    ema.update(at.step)
                at.step += 1
                at.batch += 1
                at.images += len(batch["index"]) * accelerator.num_processes

                last_one = at.batch == steps
                if last_one or len(losses) >= look_every or saver.is_due_by_steps(at.step):
                    save_now = look(losses, at, lr, saver, board, accelerator)
                    if save_now and not last_one:
                        saver.save(["last"], at, plain)
                    told = f"epoch {epoch + 1}/{options.epochs}, loss {at.loss / at.batch:.3f}"
                    bar.update(at.step, f"{told}, {at.images / clock.seconds():.3g} images/s")
                clock.asks_for_a_batch()

            rate = at.images / clock.seconds()
            bar.update(details=f"evaluating epoch {epoch + 1}/{options.epochs}")
            with ema.applied() if ema is not None else nullcontext(), autocast(accelerator.device, options.precision):
                metrics = task.evaluate(plain.eval(), accelerator)
                reshard(plain)
            if not math.isfinite(metrics["val_loss"]):
                raise _diverged(f"the validation loss is {metrics['val_loss']} after epoch {epoch + 1}", saver)
            row = {"epoch": epoch + 1, "step": at.step, "train_loss": at.loss / steps, **metrics, "lr": lr}
            row |= {"images_per_second": round(rate, 1), "data_seconds": round(at.waiting, 3)}
            row |= {"seconds": round(clock.seconds(), 3)}

            # "last" is written last: after a kill before it, resuming writes the same files again.
            score, names = task.score(metrics), []
            if score > at.best:
                names.append("best")
            if options.keep_every and (epoch + 1) % options.keep_every == 0:
                names.append(f"epoch-{epoch + 1:04}")
            at = Position(epoch=epoch + 1, step=at.step, best=max(score, at.best))
            board.epoch(row, task.pictures())  # before "last", so that no kill leaves the epoch out
            saver.save([*names, "last"], at, plain, row)
            bar.say(task.line(row))


def backward(task, model, batch, options, accelerator):
    """Accumulates the gradients of a global batch's mean loss; returns this process's part of that mean."""
    batch = task.prepare(batch)
    count = accelerator.reduce(task.count(batch), "sum").clamp(min=1)
    parts = [dict(zip(batch, rows, strict=True)) for rows in zip(*_chunks(batch, options.accumulate), strict=True)]
    total = torch.zeros((), device=accelerator.device)
    for part in parts:
        with nullcontext() if part is parts[-1] else no_sync(model, accelerator):
            with autocast(accelerator.device, options.precision):
                loss = task.loss(model, part) / count
            accelerator.backward(loss * accelerator.num_processes)  # as gradients are averaged over the processes
        total += loss.detach()
    return total


def _chunks(batch, parts):
    return [rows.chunk(parts) for rows in batch.values()]


def look(losses, at, lr, saver, board, accelerator):
    """Adds up the losses of the last steps, the same in all processes. Returns whether it is time to save.
    Errors: TrainingError if one is not finite."""
    wanted = float(saver.is_due_by_time())
    *values, wanted = accelerator.reduce(torch.stack([*losses, losses[0].new_tensor(wanted)]), "sum").tolist()
    for step, value in enumerate(values, at.step - len(values) + 1):
        if not math.isfinite(value):
            raise _diverged(f"the loss is {value} at step {step} (epoch {at.epoch + 1}, learning rate {lr:g})", saver)
        at.loss += value
    board.steps(at.step, values, lr)
    losses.clear()
    return wanted > 0 or saver.is_due_by_steps(at.step)


class Saver:
    """Writes checkpoints, in the main process, and knows when the next one is due."""

    def __init__(self, task, run, options, accelerator, tensors):
        self.task, self.run, self.options, self.accelerator, self.tensors = task, run, options, accelerator, tensors
        every = options.save_every
        self.steps = int(every) if every.isdecimal() else 0
        self.minutes = float(every.removesuffix("min")) if every.endswith("min") else math.inf
        self.saved, self.time = "", time.monotonic()

    def has_saved(self, at):
        """Remembers the last checkpoint."""
        self.saved, self.time = f"step {at.step} (epoch {at.epoch + bool(at.batch)})", time.monotonic()

    def is_due_by_steps(self, step):
        return self.steps > 0 and step % self.steps == 0

    def is_due_by_time(self):
        """By the main process's clock, which the others follow."""
        return self.accelerator.is_main_process and time.monotonic() - self.time > 60 * self.minutes

    def save(self, names, at, model, row=None):
        """Writes the checkpoints `names`, the row of metrics before the last of them. All processes call it.
        Errors: TrainingError if a weight, or a running statistic, is not finite; SaveError."""
        saved = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
        finite = torch.stack([_local(tensor).isfinite().all() for tensor in saved]).all()
        if self.accelerator.reduce((~finite).float(), "sum").item():
            raise _diverged(f"weights or running statistics are not finite after step {at.step}", self)
        tensors, own = self.tensors(), self.task.state()  # to which all processes contribute
        self.has_saved(at)
        if self.run is None:
            return
        state = {"epoch": at.epoch, "step": at.step, "metrics": row, "position": asdict(at), "task": own}
        state["processes"] = self.accelerator.num_processes
        *others, last = names
        for name in others:
            self.run.save_checkpoint(name, tensors, state)
        if row is not None:
            self.run.append_metrics(row)
        self.run.save_checkpoint(last, tensors, state)
        self.run.prune(self.options.keep)


def _local(parameter):
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def distribute(model, fsdp, accelerator):
    """The model over the processes: a copy in each (DDP), or a part of every block in each (FSDP)."""
    if accelerator.num_processes == 1:
        return accelerator.prepare(model)
    if not fsdp:
        for parameter in model.parameters():
            if parameter.requires_grad and 1 in parameter.shape:
                parameter.register_hook(partial(with_strides, parameter.stride()))
        return accelerator.prepare(model)
    model.to(accelerator.device)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    for module in chain.from_iterable(reversed(lists)):  # inner ones first
        fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@torch.no_grad()
def share_statistics(model, accelerator):
    """Gives all processes the same running statistics of batch norm: the mean of what their parts of a batch gave."""
    if accelerator.num_processes == 1 or not (own := list(running_statistics(model, training_only=True).values())):
        return
    mean = accelerator.reduce(torch.cat([each.flatten() for each in own]), "mean")
    for each, part in zip(own, mean.split([each.numel() for each in own]), strict=True):
        each.copy_(part.view_as(each))


def with_strides(strides, gradient):
    """The gradient with the strides of its parameter, where they differ in dimensions of length 1 only. Strides mean
    nothing there, but DDP compares them and warns of another layout."""
    pairs = zip(gradient.shape, gradient.stride(), strides, strict=True)
    same = all(own == wanted for side, own, wanted in pairs if side > 1)
    return gradient.as_strided(gradient.shape, strides) if same else gradient


def reshard(model):
    """Frees the whole parameters that FSDP keeps after a forward pass for a backward pass, which evaluation has not."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def no_sync(model, accelerator):
    """Within the block, gradients are not reduced over processes."""
    if not isinstance(model, FSDPModule):
        with accelerator.no_sync(model):
            yield
        return
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


class Clock:
    """Adds the seconds of the epoch to a Position, and those spent waiting for batches."""

    def __init__(self, at):
        self.at, self.before, self.start = at, at.seconds, time.perf_counter()
        self.asked = self.start

    def batch_is_there(self):
        self.at.waiting += time.perf_counter() - self.asked

    def asks_for_a_batch(self):
        self.asked = time.perf_counter()
        self.seconds()

    def seconds(self):
        self.at.seconds = self.before + time.perf_counter() - self.start
        return self.at.seconds


def _diverged(what, saver):
    kept = f"the checkpoint `last` is good: after {saver.saved}" if saver.saved else "there is no checkpoint yet"
    return TrainingError(f"{what}; training stopped, {kept}. A lower learning rate may help.")


@contextmanager
def explained():
    """Turns what options can mend, too little memory or too few values for batch norm, into a TrainingError that names
    these options."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise TrainingError(
            "batch norm has one value a channel in a training step, and so no variance: expected several images, or "
            f"maps of several pixels. Use a larger --size or --batch-size, or a lower --accumulate. ({error})"
        ) from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(
            "memory does not suffice: cut a step into parts with --accumulate 2, 4, ..., or lower --batch-size or "
            f"--size, or use --precision bf16. The checkpoints are good. ({reason_of(error)})"
        ) from error


def seed_everything(seed: int) -> None:
    """Seeds the random states of torch (all devices), numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def make_accelerator() -> accelerate.Accelerator:
    """accelerate's Accelerator; a loader's batch is split over the processes."""
    # accelerate does not notice by itself that processes of torchrun on a machine without a GPU belong together
    cpu = torch.distributed.is_torchelastic_launched() and not torch.accelerator.is_available()
    return _Accelerator(cpu=cpu, dataloader_config=accelerate.DataLoaderConfiguration(split_batches=True))


class _Accelerator(accelerate.Accelerator):
    """Keeps the DataLoader that accelerate makes of a Loader from warning of too many workers again."""

    def prepare_data_loader(self, data_loader, *args, **kwargs):
        with untold_workers():
            prepared = super().prepare_data_loader(data_loader, *args, **kwargs)
        for loader in (prepared, getattr(prepared, "base_dataloader", prepared)):
            loader.check_worker_number_rationality = lambda: None
        return prepared


def autocast(device: torch.device, precision: str):
    """The context in which a model runs with `precision`, "fp32" or "bf16"."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
