"""The loop, the run folder and what a run leaves behind."""

import copy
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from gspn.train import pictures
from gspn.train.checkpoint import FORMAT, Run, RunError, SaveError, atomic, write_json
from gspn.train.classify import (
    Classification,
    OptionError,
    Options,
    build_model,
    classify,
    evaluate,
    load_classifier,
    make_accelerator,
    predict,
    settle,
    train_classifier,
)
from gspn.train.data import DataError, open_data
from gspn.train.images import UNREADABLE, make_loader, mixed_seed
from gspn.train.loop import (
    LoopOptions,
    TrainingError,
    make_optimizer,
    optimizer_tensors,
    schedule,
    train,
    update_ema,
)

TINY = dict(depths=[1], width=16, global_levels=[0], stem_stride=2, backend="reference")


def tiny_options(**more):
    return Options(**{"model_args": TINY, "epochs": 1, "batch_size": 128, "workers": 0, **more})


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "digits"
    run, metrics, warnings = train_classifier("digits", path, tiny_options(epochs=3, warmup=1.0, lr=2e-2, ema=0.8))
    assert warnings == []
    return run, metrics


# -- a run --


def test_run_folder_has_everything(digits_run):
    run, _ = digits_run
    names = {str(file.relative_to(run.path)) for file in run.path.rglob("*") if file.is_file()}
    parts = {"model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"}
    assert names == {"config.json", "metrics.jsonl", "curves.png", "predictions.png", "context.png"} | {
        f"checkpoints/{name}/{part}" for name in ("last", "best") for part in parts
    }
    config = json.loads((run.path / "config.json").read_text())
    assert config["format"] == FORMAT and config["task"] == "classification"
    assert config["model"]["name"] == "gspn_micro" and config["class_names"] == [str(i) for i in range(10)]
    assert config["preprocessing"]["size"] == [8, 8] and 0.2 < config["preprocessing"]["mean"][0] < 0.4
    assert config["options"]["lr"] == 2e-2 and config["options"]["augment"] == "shift"
    assert set(config["versions"]) == {"gspn", "torch", "python"}
    for name in ("curves", "predictions", "context"):
        with Image.open(run.path / f"{name}.png") as picture:
            assert min(picture.size) > 400 and np.asarray(picture.convert("L")).std() > 10


def test_metrics_of_every_epoch(digits_run):
    run, metrics = digits_run
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3] and rows == run.metrics
    for row in rows:
        assert {"train_loss", "val_loss", "top1", "top5", "lr", "images_per_second", "seconds"} <= set(row)
        assert row["images"] == 359 and row["unreadable"] == 0 and row["missing_classes"] == []
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] and rows[-1]["top1"] > 0.3
    assert metrics["top1"] == max(row["top1"] for row in rows)  # the best checkpoint, read back from the disk


def test_checkpoints_read_back(digits_run):
    run, _ = digits_run
    tensors, state = Run.open(run.path).load_checkpoint("last")
    assert set(tensors) == {"model", "ema", "optimizer"} and state["epoch"] == 3 and state["step"] == 33
    classifier = load_classifier(run.path, "last")
    assert all(torch.equal(classifier.model.state_dict()[name], value) for name, value in tensors["ema"].items())
    optimizer = make_optimizer(classifier.model, 1.0, 0.0)
    flat = {}
    for key, tensor in tensors["optimizer"].items():
        number, _, name = key.partition(".")
        flat.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({"state": flat, "param_groups": state["optimizer"]})
    assert optimizer.param_groups[0]["weight_decay"] == 0.05 and optimizer.param_groups[1]["weight_decay"] == 0
    again = optimizer_tensors(optimizer)
    assert all(torch.equal(again[key], tensor) for key, tensor in tensors["optimizer"].items())


def test_same_seed_same_run(tmp_path):
    args = dict(TINY, drop_path_rate=0.3, depths=[2])
    for name in ("one", "two"):
        train_classifier("digits", tmp_path / name, tiny_options(seed=5, model_args=args))
    one, two = (Run.open(tmp_path / name).load_checkpoint("last")[0] for name in ("one", "two"))
    assert all(torch.equal(one[part][key], two[part][key]) for part in one for key in one[part])


def test_evaluate_again(digits_run):
    run, metrics = digits_run
    again, warnings = evaluate(run.path, "digits", workers=0)
    assert warnings == [] and again["split"] == "test" and again["images_per_second"] > 0
    assert again["top1"] == pytest.approx(metrics["top1"]) and again["loss"] == pytest.approx(metrics["loss"], rel=1e-5)
    assert evaluate(run.path, "digits", split="train", batch_size=500)[0]["images"] == 1438
    with pytest.raises(DataError, match="no split 'val'; it has train, test"):
        evaluate(run.path, "digits", split="valid")


def test_predict_agrees_with_evaluation(digits_run):
    run, metrics = digits_run
    classifier = load_classifier(run.path)
    split = open_data("digits").splits["test"]
    answers = predict(classifier, [split.image(i) for i in range(len(split))], top=3)
    right = sum(answer[0][0] == str(int(label)) for answer, label in zip(answers, split.labels, strict=True))
    assert right / len(split) == pytest.approx(metrics["top1"])
    assert len(answers[0]) == 3 and answers[0][0][1] >= answers[0][1][1]


def test_bf16_and_no_ema(tmp_path):
    run, _, _ = train_classifier("digits", tmp_path / "run", tiny_options(precision="bf16", ema=0.0, clip=0.0))
    assert not (run.path / "checkpoints" / "last" / "ema.safetensors").exists()
    weights = run.load_checkpoint("best")[0]["model"]
    assert all(value.dtype == torch.float32 for value in weights.values())
    assert evaluate(run.path, "digits")[0]["images"] == 359


# -- folders of images --


@pytest.fixture
def colours(tmp_path):
    """Red, green and blue pictures, 24x20; one of the red ones is damaged."""
    for name, colour in {"red": (200, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 200)}.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(12):
            noisy = np.clip(np.random.RandomState(i).randint(-20, 20, (24, 20, 3)) + colour, 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(tmp_path / "data" / name / f"{i}.png")
    bad = tmp_path / "data" / "red" / "3.png"
    bad.write_bytes(bad.read_bytes()[:100])
    return tmp_path / "data"


def test_unreadable_image_is_left_out_named_and_counted(colours, tmp_path):
    run, metrics, warnings = train_classifier(colours, tmp_path / "run", tiny_options(batch_size=16), val_fraction=0.25)
    assert len(warnings) == 1 and "1 unreadable image left out" in warnings[0] and "red/3.png" in warnings[0]
    row = run.metrics[-1]
    assert row["unreadable"] + row["unreadable_in_training"] == 1
    assert metrics["images"] == 9 - row["unreadable"] and metrics["top5"] is None
    assert run.config["preprocessing"]["channels"] == 3 and run.config["preprocessing"]["size"] == [24, 20]
    metrics, warnings = evaluate(run.path, colours, split="all", workers=0)
    assert metrics["unreadable"] == 1 and metrics["images"] == 35 and "red/3.png" in warnings[0]
    assert evaluate(run.path, colours, workers=0)[0]["split"] == "val"


def test_datasets_saved_to_disk(tmp_path):
    import datasets

    images = [Image.fromarray(np.full((9, 11), 20 * i, np.uint8)) for i in range(12)]
    features = datasets.Features({"img": datasets.Image(), "kind": datasets.ClassLabel(names=["dark", "light"])})
    table = datasets.Dataset.from_dict({"img": images, "kind": [i // 6 for i in range(12)]}, features=features)
    datasets.DatasetDict({"train": table, "validation": table, "test": table}).save_to_disk(tmp_path / "saved")
    run, metrics, _ = train_classifier(tmp_path / "saved", tmp_path / "run", tiny_options(batch_size=4, workers=2))
    assert run.config["class_names"] == ["dark", "light"] and run.config["data"]["split"] == "val"
    assert run.config["preprocessing"]["size"] == [9, 11] and metrics["images"] == 12
    assert evaluate(run.path, tmp_path / "saved")[0]["split"] == "test"


def test_strict_makes_it_an_error(colours, tmp_path):
    with pytest.raises(DataError, match=r"--strict\): .*red/3\.png"):
        train_classifier(colours, tmp_path / "run", tiny_options(batch_size=12, strict=True))
    run, _, _ = train_classifier(colours, tmp_path / "other", tiny_options(batch_size=12))
    with pytest.raises(DataError, match=r"red/3\.png"):
        evaluate(run.path, colours, split="all", strict=True, workers=0)


def test_nothing_readable(tmp_path):
    for i in range(4):
        (tmp_path / "data" / "a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / "a" / f"{i}.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"none of 3 images looked at can be read; the first: .*png"):
        train_classifier(tmp_path / "data", tmp_path / "run", tiny_options())
    assert not (tmp_path / "run").exists()


def test_class_missing_in_evaluation_is_named(colours, tmp_path):
    run, _, _ = train_classifier(colours, tmp_path / "run", tiny_options(batch_size=16))
    for file in (colours / "blue").iterdir():
        file.unlink()
    (colours / "blue").rmdir()
    metrics, warnings = evaluate(run.path, colours, split="all", workers=0)
    assert metrics["missing_classes"] == ["blue"] and metrics["images"] == 23
    assert any("accuracy is over the others: blue" in warning for warning in warnings)


def test_class_unknown_to_the_run_is_an_error(colours, digits_run, tmp_path):
    with pytest.raises(DataError, match="3 classes: blue, green, red that the model does not know"):
        evaluate(digits_run[0].path, colours)
    (colours / "train").mkdir()
    (colours / "val").mkdir()
    for name in ("red", "green"):
        (colours / name).rename(colours / "train" / name)
    (colours / "blue").rename(colours / "val" / "blue")
    with pytest.raises(DataError, match="1 class: blue"):
        train_classifier(colours, tmp_path / "run", tiny_options())


def test_channels_that_do_not_match(digits_run, colours, tmp_path):
    for label in range(3):
        (tmp_path / "numbered").mkdir(exist_ok=True)
        (colours / ["red", "green", "blue"][label]).rename(tmp_path / "numbered" / str(label))
    with pytest.raises(DataError, match="takes 1 channels but the images have 3; --channels 1 converts"):
        evaluate(digits_run[0].path, tmp_path / "numbered")
    assert evaluate(digits_run[0].path, tmp_path / "numbered", channels=1, workers=0)[0]["images"] == 35
    with pytest.raises(OptionError, match="to take 3 channels, but the images have 1; --channels 3"):
        train_classifier("digits", tmp_path / "run", tiny_options(model_args=dict(TINY, in_chans=3)))
    run, _, _ = train_classifier("digits", tmp_path / "run", tiny_options(channels=3))
    assert run.config["model"]["in_chans"] == 3


# -- options --


def test_options_that_cannot_be():
    for bad, message in {
        "epochs=0": "epochs must be from 1",
        "lr=-1": "lr must be from 0",
        "precision='fp8'": "precision must be fp32 or bf16, got 'fp8'",
        "channels=2": "channels must be 1 or 3, got 2",
        "label_smoothing=1": "label_smoothing must be from 0",
    }.items():
        with pytest.raises(OptionError, match=message):
            eval(f"Options({bad})")


def test_models_that_cannot_be(tmp_path):
    for model, args, message in [
        ("gspn_huge", {}, "unknown model 'gspn_huge', expected one of"),
        ("gspn_micro", {"colour": 1}, "unexpected keyword argument 'colour'"),
        ("gspn_micro", {"stem_stride": 3}, "stem_stride has to be 1, 2 or 4"),
        ("gspn_micro", {"num_classes": 7}, "tell 7 classes, but the data have 10"),
    ]:
        with pytest.raises(OptionError, match=message):
            train_classifier("digits", tmp_path / "run", Options(model=model, model_args=args))
    assert not (tmp_path / "run").exists()


def test_presets_and_small_inputs():
    split = open_data("digits").splits["train"]
    preprocessing, options = settle(Options(), "digits", split)
    assert options.flip is False and options.model_args == {"stem_stride": 1} and options.size == (8, 8)
    assert None not in vars(options).values()
    assert settle(Options(size=(28, 20), epochs=7), "idx", split)[0].size == (28, 20)
    tiny_input = settle(Options(size=(2, 1), model="gspn_tiny", model_args={"backend": "reference"}), "digits", split)
    assert build_model(tiny_input[1], tiny_input[0], 10).num_classes == 10  # smaller than the model's stride: works
    assert preprocessing.crop == 1


# -- the loop --


class OneLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(64), nn.Linear(64, 10)

    def forward(self, x):
        return self.head(self.norm(x.flatten(1)))


def one_layer_task(tmp_path, epochs=2, **more):
    data = open_data("digits")
    preprocessing, options = settle(Options(batch_size=256), "digits", data.splits["train"])
    accelerator = make_accelerator()
    loaders = [make_loader(data.splits[name], preprocessing, 256, train=name == "train") for name in ("train", "test")]
    names = data.splits["train"].class_names
    task = Classification(*data.splits.values(), accelerator.prepare(loaders[1]), preprocessing, names, options)
    run = Run.create(tmp_path / "run", {"task": "classification"})
    return task, loaders[0], LoopOptions(epochs, 1e-2, ema=0.9, **more), run, accelerator


def test_loop_trains_any_task(tmp_path):
    task, loader, options, run, accelerator = one_layer_task(tmp_path)
    train(task, OneLayer(), loader, options, run, accelerator)
    assert run.metrics[-1]["top1"] > 0.7 and run.metrics[-1]["step"] == 10
    assert run.metrics[-1]["lr"] == pytest.approx(1e-2 * schedule(9, 5, 10))


def test_nan_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    task, loader, options, run, accelerator = one_layer_task(tmp_path, epochs=3)
    good, count = task.loss, [0]

    def bad_at_step_8(model, batch):
        count[0] += 1
        return good(model, batch) * (float("nan") if count[0] == 8 else 1)

    task.loss = bad_at_step_8
    with pytest.raises(TrainingError, match=r"the loss is nan at step 8 \(epoch 2\).*`last` is good: epoch 1"):
        train(task, OneLayer(), loader, options, run, accelerator)
    tensors, state = run.load_checkpoint("last")
    assert state["epoch"] == 1 and all(value.isfinite().all() for value in tensors["model"].values())


def test_schedule_and_optimizer_groups():
    assert schedule(0, 4, 10) == 0.25 and schedule(3, 4, 10) == schedule(4, 4, 10) == 1
    assert schedule(9, 0, 10) < schedule(8, 0, 10) and schedule(10, 0, 10) == pytest.approx(0.01)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    model.no_weight_decay = lambda: {"0.weight"}
    assert [len(group["params"]) for group in make_optimizer(model, 1, 0.1).param_groups] == [4]
    del model.no_weight_decay
    assert [group["weight_decay"] for group in make_optimizer(model, 1, 0.1).param_groups] == [0.1, 0]


def test_ema_averages_parameters_and_copies_buffers():
    model, ema = OneLayer(), OneLayer()
    before = copy.deepcopy(ema)
    model.norm.running_mean.fill_(3)
    update_ema(ema, model, 0.75)
    assert torch.allclose(ema.head.weight, 0.75 * before.head.weight + 0.25 * model.head.weight)
    assert torch.equal(ema.norm.running_mean, model.norm.running_mean)


def test_unreadable_images_count_for_nothing(tmp_path):
    task, loader, _, _, accelerator = one_layer_task(tmp_path)
    model = OneLayer().eval()
    batch = next(iter(loader))
    some = {key: value[:100] for key, value in batch.items()}
    marked = dict(batch, label=torch.cat([batch["label"][:100], torch.full((156,), UNREADABLE)]))
    torch.testing.assert_close(task.loss(model, marked), task.loss(model, some))
    assert len(task.problems) == 156
    none = dict(some, label=torch.full((100,), UNREADABLE))
    assert task.loss(model, none) == 0
    outcome = classify(model, [batch], task.preprocessing, accelerator)
    assert outcome.metrics(task.class_names)["images"] == 256


def test_mixed_seed_tells_its_numbers_apart():
    assert len({mixed_seed(a, b) for a in range(30) for b in range(30)}) == 900


# -- the run folder --


def test_run_folder_in_the_way(digits_run, tmp_path):
    run, _ = digits_run
    with pytest.raises(RunError, match="is not empty: choose another folder, or --overwrite"):
        train_classifier("digits", run.path, tiny_options())
    (tmp_path / "letters.txt").write_text("dear")
    with pytest.raises(RunError, match="holds no run"):
        train_classifier("digits", tmp_path, tiny_options(), overwrite=True)
    with pytest.raises(RunError, match="is a file"):
        train_classifier("digits", tmp_path / "letters.txt", tiny_options())
    assert (tmp_path / "letters.txt").read_text() == "dear"
    other = Run.create(tmp_path / "other", {"task": "x"})
    (other.path / "mine.txt").write_text("stays")
    other.append_metrics({"epoch": 1})
    Run.create(tmp_path / "other", {"task": "y"}, overwrite=True)
    assert {file.name for file in other.path.iterdir()} == {"config.json", "mine.txt"}


def test_overwrite_with_a_bad_option_keeps_the_earlier_run(digits_run):
    run, _ = digits_run
    with pytest.raises(OptionError):
        train_classifier("digits", run.path, Options(model="gspn_huge"), overwrite=True)
    assert Run.open(run.path).metrics == run.metrics


def test_runs_that_cannot_be_opened(tmp_path):
    with pytest.raises(RunError, match="is no run: there is no"):
        Run.open(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RunError, match="cannot be read"):
        Run.open(tmp_path)
    (tmp_path / "config.json").write_text('{"name": "another program\'s"}')
    with pytest.raises(RunError, match="not the config of a gspn run"):
        Run.open(tmp_path)
    write_json(tmp_path / "config.json", {"format": FORMAT + 1})
    with pytest.raises(RunError, match=f"newer gspn .format {FORMAT + 1}; this one reads up to {FORMAT}"):
        Run.open(tmp_path)
    write_json(tmp_path / "config.json", {"format": FORMAT, "task": "classification"})
    with pytest.raises(RunError, match="damaged or foreign: KeyError: 'preprocessing'"):
        load_classifier(tmp_path)


def test_damaged_checkpoint(tmp_path):
    run = Run.create(tmp_path / "run", {"task": "x"})
    with pytest.raises(RunError, match="no checkpoint 'best'"):
        run.load_checkpoint("best")
    run.save_checkpoint("best", {"model": {"w": torch.ones(100)}}, {"epoch": 1})
    file = run.path / "checkpoints" / "best" / "model.safetensors"
    assert file.stat().st_mode & 0o777 == (file.parent / "state.json").stat().st_mode & 0o777
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(RunError, match="best is damaged"):
        run.load_checkpoint("best")


def test_checkpoint_survives_a_crash_between_the_renames(tmp_path):
    run = Run.create(tmp_path / "run", {"task": "x"})
    run.save_checkpoint("last", {"model": {"w": torch.ones(3)}}, {"epoch": 1})
    folder = run.path / "checkpoints"
    os.rename(folder / "last", folder / ".last.old")
    assert run.load_checkpoint("last")[1] == {"epoch": 1}
    run.save_checkpoint("last", {"model": {"w": torch.zeros(3)}}, {"epoch": 2})
    assert run.load_checkpoint("last")[1] == {"epoch": 2} and os.listdir(folder) == ["last"]


def test_atomic_leaves_nothing_behind(tmp_path):
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(KeyboardInterrupt), atomic(tmp_path / "a.json") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["a.json"] and (tmp_path / "a.json").read_text() == "1\n"
    with pytest.raises(SaveError, match=r"cannot write .*nowhere/a\.json: No such file or directory"):
        write_json(tmp_path / "nowhere" / "a.json", 1)


def test_full_disk_keeps_the_previous_checkpoint(tmp_path):
    """A real one: the system refuses to write a file beyond 100,000 bytes."""
    code = f"""
import resource, signal, torch
from gspn.train.checkpoint import Run, SaveError
run = Run.create({str(tmp_path / "run")!r}, dict(task="x"))
run.save_checkpoint("last", dict(model=dict(w=torch.ones(50_000))), dict(epoch=1))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    run.save_checkpoint("last", dict(model=dict(w=torch.zeros(50_000))), dict(epoch=2))
except SaveError as error:
    print(error)
tensors, state = run.load_checkpoint("last")
assert state == dict(epoch=1) and bool((tensors["model"]["w"] == 1).all())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "checkpoints/last: " in result.stdout and "File too large" in result.stdout
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["last"]


def test_picture_of_the_context_at_a_place(digits_run, tmp_path):
    classifier = load_classifier(digits_run[0].path)
    image = open_data("digits").splits["test"].image(0)
    pictures.context(tmp_path / "a.png", classifier, image, (0, 7), block=0)
    assert (tmp_path / "a.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="is not on the 8x8 image"):
        pictures.context(tmp_path / "b.png", classifier, image, (8, 0))
    assert os.listdir(tmp_path) == ["a.png"]
