"""The training loop: AdamW, warm-up and cosine, clipping, EMA, bfloat16, evaluation and checkpoints, for any task.

A task says what a batch's loss is and how to evaluate; classify.py is one. One process or several (torchrun): the
loader's batch is the global one, which accelerate splits over the processes.
"""

import copy
import json
import math
import time
from contextlib import nullcontext
from typing import Protocol

import accelerate
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from gspn.train.images import mixed_seed


class TrainingError(RuntimeError):
    """Training cannot go on. The checkpoints written before are good."""


class Task(Protocol):
    """What is trained."""

    best: str  # the metric whose largest value makes the best checkpoint

    def loss(self, model, batch):
        """The mean loss of a batch (a dict with "index", the number of each item), a scalar tensor."""

    def evaluate(self, model, accelerator) -> dict:
        """Metrics by name, JSON-able; among them "val_loss" and `best`. The model is in evaluation mode."""

    def line(self, row) -> str:
        """What to say about an epoch, from its row of metrics."""


def train(task, model, loader, options, run, accelerator, console=None):
    """Trains `model` on the batches of `loader` and keeps its progress in `run`.

    Args:
        task: a Task. model: any module. loader: images.make_loader's. options: options.LoopOptions, settled.
        run: checkpoint.Run, in the main process; gets a row of metrics and the checkpoint "last" after every epoch,
            "best" if it was that.
        accelerator: accelerate's, with split_batches. console: rich's, for the progress bar; None is silent.
    Errors: TrainingError if the loss stops being a number; SaveError if the disk is full.
    """
    ema = copy.deepcopy(model).eval().requires_grad_(False) if options.ema else None
    optimizer = make_optimizer(model, options.lr, options.weight_decay)
    batches = loader
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    plain = accelerator.unwrap_model(model)
    if ema is not None:
        ema.to(accelerator.device)
    steps = len(loader)
    step, best = 0, ()

    with progress_bar(console if accelerator.is_main_process else None, options.epochs * steps) as bar:
        for epoch in range(options.epochs):
            start, images, total = time.perf_counter(), 0, 0.0
            batches.begin(epoch)
            model.train()
            for batch in loader:
                torch.manual_seed(mixed_seed(options.seed, step, accelerator.process_index))
                lr = options.lr * schedule(step, round(options.warmup * steps), options.epochs * steps)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                with autocast(accelerator.device, options.precision):
                    loss = task.loss(model, batch)
                value = accelerator.reduce(loss.detach(), "mean").item()
                if not math.isfinite(value):
                    raise _diverged(f"the loss is {value} at step {step + 1} (epoch {epoch + 1})", epoch)
                accelerator.backward(loss)
                if options.clip:
                    accelerator.clip_grad_norm_(model.parameters(), options.clip)
                optimizer.step()
                optimizer.zero_grad()
                if ema is not None:
                    update_ema(ema, plain, min(options.ema, (1 + step) / (10 + step)))
                step += 1
                total += value
                images += len(batch["index"]) * accelerator.num_processes
                rate = images / (time.perf_counter() - start)
                bar.update(0, advance=1, epoch=f"{epoch + 1}/{options.epochs}", loss=f"{value:.3f}", rate=f"{rate:.0f}")

            evaluated = ema if ema is not None else plain
            with autocast(accelerator.device, options.precision):
                metrics = task.evaluate(evaluated.eval(), accelerator)
            if not math.isfinite(metrics["val_loss"]):
                raise _diverged(f"the validation loss is {metrics['val_loss']} after epoch {epoch + 1}", epoch)
            seconds = time.perf_counter() - start
            row = {"epoch": epoch + 1, "step": step, "train_loss": total / steps, **metrics, "lr": lr}
            row |= {"images_per_second": round(rate, 1), "seconds": round(seconds, 3)}
            if accelerator.is_main_process:
                tensors = {"model": plain.state_dict(), "optimizer": optimizer_tensors(optimizer)}
                if ema is not None:
                    tensors["ema"] = ema.state_dict()
                state = {"epoch": epoch + 1, "step": step, "metrics": row, "optimizer": optimizer_state(optimizer)}
                run.save_checkpoint("last", tensors, state)
                score = (metrics[task.best], -metrics["val_loss"])  # of equally good ones, that of the lower loss
                if score > best:
                    best = score
                    run.save_checkpoint("best", tensors, state)
                run.append_metrics(row)
                bar.console.print(task.line(row), highlight=False)


def _diverged(what, epochs_done):
    kept = f"the checkpoint `last` is good: epoch {epochs_done}" if epochs_done else "there is no checkpoint yet"
    return TrainingError(f"{what}; training stopped, {kept}. A lower learning rate may help.")


def schedule(step, warmup, total, floor=0.01):
    """The learning rate at `step` as a part of the highest one: linear up to step `warmup`, then a cosine to `floor`.

    >>> [round(schedule(step, 2, 6), 2) for step in range(6)]
    [0.5, 1.0, 1.0, 0.86, 0.51, 0.15]
    """
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def make_optimizer(model, lr, weight_decay):
    """AdamW that does not decay 1-D parameters (biases and norms among them) nor what model.no_weight_decay() names."""
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (others if parameter.ndim <= 1 or name in exempt else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr)


def optimizer_tensors(optimizer):
    """The optimizer's state as {"parameter number.name": tensor}."""
    state = optimizer.state_dict()["state"]
    return {f"{number}.{name}": tensor for number, named in state.items() for name, tensor in named.items()}


def optimizer_state(optimizer):
    """The optimizer's options of each parameter group, JSON-able."""
    groups = optimizer.state_dict()["param_groups"]
    return json.loads(json.dumps(groups))


@torch.no_grad()
def update_ema(ema, model, decay):
    """ema = decay * ema + (1 - decay) * model, for parameters; buffers are copied."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    for mean, buffer in zip(ema.buffers(), model.buffers(), strict=True):
        mean.copy_(buffer)


def make_accelerator():
    """accelerate's Accelerator; a loader's batch is split over the processes."""
    return accelerate.Accelerator(dataloader_config=accelerate.DataLoaderConfiguration(split_batches=True))


def autocast(device, precision):
    """The context in which a model runs with `precision`."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def progress_bar(console, total):
    """A bar with epoch, loss, images/s and time left; silent without a console."""
    bar = Progress(
        TextColumn("epoch {task.fields[epoch]}"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]}  {task.fields[rate]} images/s "),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
        console=console or Console(quiet=True),
        transient=True,
    )
    bar.add_task("train", total=total, epoch="-", loss="-", rate="-")
    return bar
