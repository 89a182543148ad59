"""The loop, the optimizer and the averages."""

import copy
from dataclasses import replace

import pytest
import torch
from helpers.training import OneLayer, one_layer_task, same
from torch import nn

import gspn
from gspn.data.images import UNREADABLE, mixed_seed
from gspn.files import writing
from gspn.metrics.classification import classify
from gspn.options import LoopOptions, OptionError
from gspn.train.loop import TrainingError, backward, explained, train
from gspn.train.optim import Ema, frozen_modules, layer_scales, learning_rate, make_optimizer
from gspn.train.run import Run, RunError


def trained(path, **options):
    """(model, run) of a OneLayer trained from the same start."""
    torch.manual_seed(0)
    task, loader, options, run, accelerator = one_layer_task(path, **options)
    model = OneLayer()
    train(task, model, loader, options, run, accelerator)
    return model, run


def test_loop_trains_any_task(tmp_path):
    _, run = trained(tmp_path / "run")
    assert run.metrics[-1]["top1"] > 0.7 and run.metrics[-1]["step"] == 10
    assert run.metrics[-1]["lr"] == pytest.approx(
        learning_rate(9, 5, LoopOptions(epochs=2, lr=1e-2, warmup=1.0).resolved())
    )
    assert 0 < run.metrics[-1]["data_seconds"] < run.metrics[-1]["seconds"]


# -- what goes wrong --


def test_nan_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    task, loader, options, run, accelerator = one_layer_task(tmp_path / "run", epochs=3)
    good, count = task.loss, [0]

    def bad_at_step_8(model, batch):
        count[0] += 1
        return good(model, batch) * (float("nan") if count[0] == 8 else 1)

    task.loss = bad_at_step_8
    message = r"nan at step 8 \(epoch 2, .*0\.009\d*\).*`last`.* step 5 \(epoch 1\)"
    with pytest.raises(TrainingError, match=message):
        train(task, OneLayer(), loader, options, run, accelerator)
    tensors, state = run.load_checkpoint("last")
    assert state["epoch"] == 1 and all(value.isfinite().all() for value in tensors["model"].values())


def test_weights_that_are_no_numbers_are_not_saved(tmp_path):
    """The loss of step 7 is finite and its gradient is not; a checkpoint is due right after it."""
    task, loader, options, run, accelerator = one_layer_task(tmp_path / "run", epochs=3, save_every="1", clip=0.0)
    model, count = OneLayer(), [0]

    def spoil(gradient):
        count[0] += 1
        return gradient * float("inf") if count[0] == 7 else gradient

    model.head.weight.register_hook(spoil)
    with pytest.raises(TrainingError, match=r"step 7; .*`last`.* step 6"):
        train(task, model, loader, options, run, accelerator)
    tensors, state = run.load_checkpoint("last")
    assert state["step"] == 6 and all(value.isfinite().all() for value in tensors["model"].values())


def test_running_statistics_that_are_no_numbers_are_not_saved(tmp_path):
    """The loss stays finite: in training, batch norm does not read them."""
    task, loader, options, run, accelerator = one_layer_task(tmp_path / "run", epochs=3, save_every="1", clip=0.0)
    model, count = OneLayer(), [0]

    def spoil(gradient):
        count[0] += 1
        if count[0] == 7:
            model.norm.running_var = torch.full((64,), float("inf"))

    model.head.weight.register_hook(spoil)
    with pytest.raises(TrainingError, match=r"step 7; .*`last`.* step 6"):
        train(task, model, loader, options, run, accelerator)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        MemoryError("Unable to allocate"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to"),
    ],
)
def test_too_little_memory_says_what_to_lower(tmp_path, error):
    task, loader, options, run, accelerator = one_layer_task(tmp_path / "run")

    def fail(model, batch):
        raise error

    task.loss = fail
    with pytest.raises(TrainingError, match=r"--accumulate 2.*--batch-size.*--size.*bf16.*good\. \(.*llocat"):
        train(task, OneLayer(), loader, options, run, accelerator)


def test_memory_that_the_system_refuses_is_recognised(tmp_path):
    task, loader, options, run, accelerator = one_layer_task(tmp_path / "run")
    task.loss = lambda model, batch: torch.empty(2**60).sum()
    with pytest.raises(TrainingError, match="memory"):
        train(task, OneLayer(), loader, options, run, accelerator)


def test_other_errors_stay_what_they_are(tmp_path):
    task, loader, options, run, accelerator = one_layer_task(tmp_path / "run")

    def fail(model, batch):
        raise RuntimeError("a kernel")

    task.loss = fail
    with pytest.raises(RuntimeError, match=r"^a kernel$"):
        train(task, OneLayer(), loader, options, run, accelerator)


# -- steps --


def test_accumulation_gives_the_same_step(tmp_path):
    """Also where the parts hold different numbers of unreadable images: the sum is divided by the whole count."""
    task, loader, options, _, accelerator = one_layer_task(tmp_path / "run")
    batch = next(iter(loader))
    batch["label"][:40] = UNREADABLE
    gradients = []
    for parts in (1, 3, 256):
        torch.manual_seed(0)
        model = OneLayer()
        model.norm = nn.Identity()  # its statistics are those of a part
        loss = backward(task, model, batch, replace(options, accumulate=parts), accelerator)
        gradients.append((loss, model.head.weight.grad))
    for loss, gradient in gradients[1:]:
        torch.testing.assert_close(loss, gradients[0][0])
        torch.testing.assert_close(gradient, gradients[0][1])


def test_unreadable_images_count_for_nothing(tmp_path):
    task, loader, _, _, accelerator = one_layer_task(tmp_path / "run")
    model = OneLayer().eval()
    batch = next(iter(loader))
    some = task.prepare({key: value[:100] for key, value in batch.items()})
    marked = task.prepare(dict(batch, label=torch.cat([batch["label"][:100], torch.full((156,), UNREADABLE)])))
    assert task.count(marked) == task.count(some) == 100
    torch.testing.assert_close(task.loss(model, marked), task.loss(model, some))
    task.unreadable.look()
    assert len(task.unreadable.problems) == 156
    outcome = classify(model, [batch], task.preprocessing, accelerator)
    assert outcome.metrics(task.class_names)["images"] == 256


def test_mixed_targets(tmp_path):
    """What a mixing makes of labels is what the loss is of: here one class for each image, and none for ten of them."""
    task, loader, _, _, _ = one_layer_task(tmp_path / "run", label_smoothing=0.0)
    model, batch = OneLayer().eval(), next(iter(loader))
    plain = task.prepare({key: value[10:] for key, value in batch.items()})
    task.mixing = lambda images, labels: (
        images,
        nn.functional.one_hot(labels, 10) * (torch.arange(256) >= 10)[:, None],
    )
    mixed = task.prepare(batch)
    assert set(mixed) == {"image", "target"} and task.count(mixed) == task.count(plain) == 246
    torch.testing.assert_close(task.loss(model, mixed), task.loss(model, plain))


def test_learning_rate():
    options = LoopOptions(epochs=2, lr=1.0, warmup=0.8).resolved()
    rate = lambda step, **more: learning_rate(step, 5, LoopOptions(epochs=2, lr=1.0, **more).resolved())  # noqa: E731
    assert rate(0, warmup=0.8) == 0.25 and rate(3, warmup=0.8) == rate(4, warmup=0.8) == 1
    assert rate(9) < rate(8) and rate(10) == pytest.approx(0.01)
    assert rate(10, min_lr=0.2) == pytest.approx(0.2)
    assert rate(0, warmup=0.8, warmup_lr=0.5) == pytest.approx(0.5 + 0.5 / 4)
    assert learning_rate(3, 5, options) == 1


def test_optimizer_groups():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    options = LoopOptions(lr=1.0, weight_decay=0.1, beta1=0.8, beta2=0.99, eps=1e-6).resolved()
    assert [group["weight_decay"] for group in make_optimizer(model, options).param_groups] == [0.1, 0]
    model.no_weight_decay = lambda: {"0.weight"}
    (group,) = make_optimizer(model, options).param_groups
    assert len(group["params"]) == 4 and group["betas"] == (0.8, 0.99) and group["eps"] == 1e-6
    with pytest.raises(OptionError, match=r"layer_decay.*group_matcher"):
        make_optimizer(model, LoopOptions(lr=1.0, layer_decay=0.5).resolved())
    model.requires_grad_(False)
    with pytest.raises(OptionError, match="frozen"):
        make_optimizer(model, options)


def test_layer_decay_goes_by_depth():
    model = gspn.create_model("gspn_micro", depths=[2, 1], global_levels=[0], num_classes=3)
    scales = layer_scales(model, 0.5)
    expected = {  # stem, three blocks (with the last norm), head
        "stem.0.weight": 1 / 16,
        "levels.0.blocks.0": 1 / 8,
        "levels.0.blocks.1": 1 / 4,
        "levels.1.downsample": 1 / 2,
        "levels.1.blocks.0": 1 / 2,
        "norm.": 1 / 2,
        "head.": 1,
    }
    for prefix, scale in expected.items():
        found = {value for name, value in scales.items() if name.startswith(prefix)}
        assert found == {scale}, prefix
    assert len(scales) == len(list(model.named_parameters()))
    groups = make_optimizer(model, LoopOptions(lr=1.0, layer_decay=0.5).resolved()).param_groups
    assert {group["lr_scale"] for group in groups} == {1 / 16, 1 / 8, 1 / 4, 1 / 2, 1}


def test_frozen_parts_stay(tmp_path):
    torch.manual_seed(0)
    before = OneLayer()
    model, run = trained(tmp_path / "run", freeze=("norm",))
    assert same(model.norm.state_dict(), before.norm.state_dict())  # its running statistics too
    assert not torch.equal(model.head.weight, before.head.weight)
    assert not any(key.startswith("norm") for key in run.load_checkpoint("last")[0]["optimizer"])
    with pytest.raises(OptionError, match=r"'levels\.0'; there are norm, head"):
        frozen_modules(model, ("levels.0",))


# -- averages --


def test_ema_averages_parameters_and_running_statistics():
    """Not the count of batches, which is the model's own, as buffers are that are not saved."""
    model = OneLayer()
    model.register_buffer("cache", torch.zeros(1), persistent=False)
    before = copy.deepcopy(model.state_dict())
    ema = Ema(model, 0.75, "cpu")
    averaged = {name for name in before if "num_batches" not in name}
    assert set(ema.means) == averaged and "norm.running_var" in averaged
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(1)
    ema.update(1000)
    now = copy.deepcopy(model.state_dict())
    with ema.applied():
        for name, tensor in model.state_dict().items():
            expected = 0.75 * before[name] + 0.25 * now[name] if name in averaged else now[name]
            torch.testing.assert_close(tensor, expected)
    assert same(model.state_dict(), now)


def test_ema_of_the_first_steps_is_short():
    model = OneLayer()
    ema = Ema(model, 0.99, "cpu")
    nn.init.constant_(model.head.bias, 1.0)
    before = ema.means["head.bias"].clone()
    ema.update(0)
    torch.testing.assert_close(ema.means["head.bias"], 0.1 * before + 0.9)


def test_ema_on_another_device():
    """ "meta" stands for it: nothing of the average is on the model's device."""
    ema = Ema(OneLayer(), 0.9, "meta")
    ema.update(5)
    assert {mean.device.type for mean in ema.means.values()} == {"meta"}


def test_no_averages(tmp_path):
    _, run = trained(tmp_path / "run", ema=0.0)
    assert set(run.load_checkpoint("best")[0]) == {"model", "optimizer"}


def test_mixed_seed_tells_its_numbers_apart():
    assert len({mixed_seed(a, b) for a in range(30) for b in range(30)}) == 900


def test_too_little_memory_is_told_whatever_the_error_says():
    """Python's MemoryError has no text."""
    for error in (MemoryError(), RuntimeError("out of memory\nand so on")):
        with (
            pytest.raises(TrainingError, match=r"memory does not suffice.*\((MemoryError|out of memory)\)"),
            explained(),
        ):
            raise error


def test_a_full_disk_does_not_hinder_the_lock(tmp_path, monkeypatch):
    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tmp_path), "write_text", full)
    with writing(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").exists()


def test_a_folder_that_may_not_be_read_is_refused_clearly(tmp_path, monkeypatch):
    """Without rights of its own: tests may run as root, whom nothing hinders."""

    def forbidden(path, **_options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.stat", forbidden)
    with pytest.raises(RunError, match=r"cannot make the folder .*: Permission denied"):
        Run.check_free(tmp_path / "private" / "run")
