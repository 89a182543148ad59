"""The loop, the run folder and what a run leaves behind."""

import copy
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from gspn.files import SaveError, atomic, write_json
from gspn.train import checkpoint, pictures
from gspn.train.checkpoint import FORMAT, Run, RunError
from gspn.train.classify import Classification, build_model, settle, train_classifier
from gspn.train.data import DataError, open_data
from gspn.train.evaluate import classify, evaluate, load_classifier, predict
from gspn.train.images import UNREADABLE, mixed_seed
from gspn.train.loader import make_loader
from gspn.train.loop import (
    TrainingError,
    make_accelerator,
    make_optimizer,
    optimizer_tensors,
    schedule,
    train,
    update_ema,
)
from gspn.train.options import LoopOptions, OptionError, Options

TINY = dict(depths=[1], width=16, global_levels=[0], stem_stride=4)


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
    assert names == {"config.json", "options.yaml", "metrics.jsonl", "curves.png", "predictions.png", "context.png"} | {
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


def test_same_seed_same_run(colours, tmp_path, monkeypatch):
    for picture in ("curves", "predictions", "context"):
        monkeypatch.setattr(pictures, picture, lambda *args: None)  # they take longer than the training
    args = dict(TINY, drop_path_rate=0.3, depths=[2], width=8)
    options = dict(model_args=args, epochs=2, batch_size=8, augment="crop", flip=True)
    for name, seed in (("one", 5), ("two", 5), ("other", 6)):
        train_classifier(colours, tmp_path / name, tiny_options(seed=seed, **options))
    one, two, other = (Run.open(tmp_path / name).load_checkpoint("last")[0] for name in ("one", "two", "other"))
    assert all(torch.equal(one[part][key], two[part][key]) for part in one for key in one[part])
    assert not torch.equal(one["model"]["head.weight"], other["model"]["head.weight"])


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
    args = dict(TINY, backend="reference")
    options = tiny_options(precision="bf16", ema=0.0, clip=0.0, model_args=args)
    run, _, _ = train_classifier("digits", tmp_path / "run", options)
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
    run, metrics, warnings = train_classifier(colours, tmp_path / "run", tiny_options(batch_size=16, val_fraction=0.25))
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
    with pytest.raises(OptionError, match=r"channels is 3, but the model of .* takes 1"):
        evaluate(digits_run[0].path, "digits", channels=3)


def test_run_that_converted_its_images_converts_in_evaluation_too(colours, tmp_path):
    run, _, _ = train_classifier(colours, tmp_path / "run", tiny_options(channels=1, batch_size=16))
    assert run.config["model"]["in_chans"] == 1
    assert evaluate(run.path, colours, workers=0)[0]["split"] == "val"
    colours.rename(tmp_path / "moved")
    assert evaluate(run.path, tmp_path / "moved", workers=0)[0]["images"] == 35


def test_evaluation_of_the_runs_own_data_reads_them_as_training_did(tmp_path):
    import datasets

    images = [Image.fromarray(np.full((9, 11), 20 * i, np.uint8)) for i in range(12)]
    columns = {"a": images, "b": images, "kind": [i // 6 for i in range(12)], "other": [0, 1] * 6}
    features = datasets.Features(
        {name: datasets.Image() for name in "ab"}
        | {name: datasets.ClassLabel(names=["dark", "light"]) for name in ("kind", "other")}
    )
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "saved")
    chosen = dict(image_column="b", label_column="kind", class_names=["black", "white"], val_fraction=0.4)
    options = tiny_options(batch_size=4, **chosen)
    run, metrics, _ = train_classifier(tmp_path / "saved", tmp_path / "run", options)
    again = evaluate(run.path, tmp_path / "saved", workers=0, image_column=None)[0]
    assert again["images"] == metrics["images"] == 4 and again["loss"] == pytest.approx(metrics["loss"], rel=1e-5)


def test_run_of_a_backend_that_is_not_here_can_be_used(colours, tmp_path):
    run, _, _ = train_classifier(colours, tmp_path / "run", tiny_options(batch_size=16))
    config = run.config | {"model": run.config["model"] | {"backend": "triton"}}
    write_json(run.path / "config.json", config)
    assert evaluate(run.path, colours, workers=0)[0]["split"] == "val"
    for missing in ("data", "options"):
        write_json(run.path / "config.json", {key: value for key, value in config.items() if key != missing})
        with pytest.raises(RunError, match=f"damaged or foreign: KeyError: '{missing}'"):
            evaluate(run.path, colours)


def test_one_image_a_class_cannot_be_trained_on_but_evaluated(colours, tmp_path):
    run, _, _ = train_classifier(colours, tmp_path / "run", tiny_options(batch_size=16))
    for file in colours.rglob("*.png"):
        if file.stem != "5":
            file.unlink()
    with pytest.raises(DataError, match="none can be held out of 3 images with one image a class: expected two"):
        train_classifier(colours, tmp_path / "other", tiny_options())
    assert not (tmp_path / "other").exists()
    assert evaluate(run.path, colours, split="all", workers=0)[0]["images"] == 3


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


def test_evaluation_options_that_cannot_be(digits_run):
    for bad, message in {
        "batch_size": "batch_size must be from 1 .* got -1",
        "workers": "workers must be from 0",
    }.items():
        with pytest.raises(OptionError, match=message):
            evaluate(digits_run[0].path, "digits", **{bad: -1})


def test_models_that_cannot_be(tmp_path):
    for model, args, message in [
        ("gspn_huge", {}, "unknown model 'gspn_huge', expected one of"),
        ("gspn_micro", {"colour": 1}, "unexpected keyword argument 'colour'"),
        ("gspn_micro", {"stem_stride": 3}, "stem_stride has to be 1, 2 or 4"),
        ("gspn_micro", {"num_classes": 7}, "tell 7 classes, but the data have 10"),
        ("gspn_micro", {"backend": "gpu"}, "cannot be made: unknown backend 'gpu'"),
        ("gspn_micro", {"backend": "triton"}, "fails when tried with an image of 8x8, grey on cpu: backend 'triton'"),
    ]:
        with pytest.raises(OptionError, match=message):
            train_classifier("digits", tmp_path / "run", Options(model=model, model_args=args))
    assert not (tmp_path / "run").exists()


def test_presets_and_small_inputs():
    split = open_data("digits").splits["train"]
    preprocessing, options = settle(Options(), "digits", split)
    assert options.flip is False and options.model_args == {"stem_stride": 1} and options.size == (8, 8)
    assert {name for name, value in vars(options).items() if value is None} == {
        "class_names",
        "image_column",
        "label_column",
    }
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
    return (
        task,
        loaders[0],
        LoopOptions(epochs=epochs, lr=1e-2, warmup=1.0, ema=0.9, **more).settled(),
        run,
        accelerator,
    )


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
    run = Run.create(tmp_path / "other", {"task": "y"}, overwrite=True)
    run.save_checkpoint("best", {}, {"epoch": 1})
    assert {file.name for file in other.path.iterdir()} == {"config.json", "checkpoints", "mine.txt"}


def test_overwrite_with_a_bad_option_keeps_the_earlier_run(digits_run):
    run, _ = digits_run
    with pytest.raises(OptionError):
        train_classifier("digits", run.path, Options(model="gspn_huge"), overwrite=True)
    assert Run.open(run.path).metrics == run.metrics


def tree(folder):
    """What a folder holds: the content of every file by its path."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def full_run(tmp_path):
    """A run with one of everything, each file of its own content."""
    run = Run.create(tmp_path / "run", {"task": "old"})
    for name in ("last", "best"):
        run.save_checkpoint(name, {"model": {"w": torch.ones(3)}}, {"epoch": 1, "name": name})
    run.append_metrics({"epoch": 1})
    for name in ("curves", "predictions", "context", "context-old"):
        (run.path / f"{name}.png").write_text(name)
    (run.path / "mine.txt").write_text("not the run's")
    return run


def test_overwritten_run_waits_until_the_new_one_has_a_checkpoint(full_run):
    before = tree(full_run.path)
    run = Run.create(full_run.path, {"task": "new"}, overwrite=True)
    assert {name for name in tree(run.path) if ".earlier" not in name} == {"config.json", "mine.txt"}
    assert tree(run.path / ".earlier") == {name: data for name, data in before.items() if name != "mine.txt"}
    assert Run.open(run.path / ".earlier").load_checkpoint("best")[1]["name"] == "best"
    with pytest.raises(RunError, match=r"no checkpoint 'best'.*; the run that it was to replace is .*\.earlier"):
        run.load_checkpoint("best")
    run.save_checkpoint("last", {"model": {}}, {"epoch": 1})
    assert (run.path / ".earlier").exists()
    run.save_checkpoint("best", {"model": {}}, {"epoch": 1})
    assert {name.split("/")[0] for name in tree(run.path)} == {"config.json", "mine.txt", "checkpoints"}
    assert not run.restore_earlier()


def test_overwritten_run_comes_back_when_the_new_one_fails(full_run):
    before = tree(full_run.path)
    run = Run.create(full_run.path, {"task": "new"}, overwrite=True)
    run.save_checkpoint("last", {"model": {}}, {"epoch": 1})
    assert run.restore_earlier() and tree(run.path) == before
    assert not run.restore_earlier() and tree(run.path) == before


def test_overwritten_run_that_a_crash_did_not_get_to_remove_is_not_put_back(full_run, tmp_path):
    run = Run.create(full_run.path, {"task": "new"}, overwrite=True)
    shutil.copytree(run.path / ".earlier", tmp_path / "left")
    run.save_checkpoint("best", {"model": {}}, {"epoch": 1})
    before = tree(run.path)
    (tmp_path / "left").rename(run.path / ".earlier")
    assert Run.create(run.path, {"task": "newer"}, overwrite=True).restore_earlier() and tree(run.path) == before


def test_training_that_diverges_at_once_leaves_the_run_it_was_to_overwrite(colours, tmp_path):
    options = dict(batch_size=16)
    run, _, _ = train_classifier(colours, tmp_path / "run", tiny_options(**options))
    before = tree(run.path)
    with pytest.raises(TrainingError, match="there is no checkpoint yet"):
        train_classifier(colours, run.path, tiny_options(lr=1e30, clip=0.0, **options), overwrite=True)
    assert tree(run.path) == before and evaluate(run.path, colours, workers=0)[0]["split"] == "val"


class Killed(BaseException):
    """What stands for a kill: nothing may catch it and go on."""


def test_kill_at_any_step_of_overwriting_loses_nothing(full_run, monkeypatch):
    """Killed before each rename or removal of a file in turn, overwriting can be done again and can be undone."""
    before = tree(full_run.path)
    steps = {name: getattr(os, name) for name in ("rename", "replace", "unlink", "rmdir")}
    for kill_at in range(40):
        count = [0]

        def step(name, count=count, kill_at=kill_at):
            def run(*args, **more):
                count[0] += 1
                if count[0] > kill_at:  # everything after it fails too: a dead process does no cleaning up
                    raise Killed
                return steps[name](*args, **more)

            return run

        with monkeypatch.context() as patch:
            for name in steps:
                patch.setattr(os, name, step(name))
            try:
                Run.create(full_run.path, {"task": "new"}, overwrite=True).restore_earlier()
                done = True
            except Killed:
                done = False
        Run.create(full_run.path, {"task": "newer"}, overwrite=True).restore_earlier()
        assert tree(full_run.path) == before, f"killed at step {kill_at}"
        if done:
            return
    pytest.fail("overwriting never came to its end")


def test_overwriting_that_the_system_refuses_is_an_error_that_tells_and_undoes(full_run, monkeypatch):
    before, rename = tree(full_run.path), os.rename

    def refuse(source, target):
        if str(source).endswith("metrics.jsonl"):
            raise PermissionError(13, "Permission denied", str(source))
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse)
        with pytest.raises(SaveError, match=r"cannot set the earlier run aside in .*Permission denied.* Nothing of it"):
            Run.create(full_run.path, {"task": "new"}, overwrite=True)
    assert tree(full_run.path) == before

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(
        SaveError, match=r"config\.json: No space left on device\. What was saved there before is untou"
    ):
        Run.create(full_run.path, {"task": "new"}, overwrite=True)
    assert tree(full_run.path) == before


def test_runs_that_cannot_be_opened(tmp_path):
    with pytest.raises(RunError, match="is no run: there is no"):
        Run.open(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RunError, match="cannot be read"):
        Run.open(tmp_path)
    (tmp_path / "config.json").write_text('{"name": "another program\'s"}')
    with pytest.raises(RunError, match="not the config of a gspn run"):
        Run.open(tmp_path)
    write_json(tmp_path / "config.json", {"format": "1"})
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


def test_checkpoint_survives_a_crash_between_the_renames_and_readers_change_nothing(tmp_path):
    run = Run.create(tmp_path / "run", {"task": "x"})
    run.save_checkpoint("last", {"model": {"w": torch.ones(3)}}, {"epoch": 1})
    folder = run.path / "checkpoints"
    os.rename(folder / "last", folder / ".last.old")
    assert run.load_checkpoint("last")[1] == {"epoch": 1} and os.listdir(folder) == [".last.old"]
    run.save_checkpoint("last", {"model": {"w": torch.zeros(3)}}, {"epoch": 2})
    assert run.load_checkpoint("last")[1] == {"epoch": 2} and os.listdir(folder) == ["last"]


def test_second_crash_between_the_renames_loses_nothing_either(tmp_path, monkeypatch):
    run = Run.create(tmp_path / "run", {"task": "x"})
    run.save_checkpoint("last", {"model": {"w": torch.ones(3)}}, {"epoch": 1})
    folder = run.path / "checkpoints"
    os.rename(folder / "last", folder / ".last.old")  # the first crash
    rename = os.rename

    def crash(source, target):
        if source.name == ".last.new":
            raise Killed
        rename(source, target)

    monkeypatch.setattr(os, "rename", crash)
    with pytest.raises(Killed):
        run.save_checkpoint("last", {"model": {"w": torch.zeros(3)}}, {"epoch": 2})
    assert run.load_checkpoint("last")[1] == {"epoch": 1}


def test_checkpoint_replaced_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    run = Run.create(tmp_path / "run", {"task": "x"})
    run.save_checkpoint("last", {"model": {"w": torch.zeros(3)}}, {"epoch": 0})
    load, count = checkpoint.load_file, [0]

    def load_while_training_goes_on(file):
        count[0] += 1
        if count[0] < 3:
            run.save_checkpoint("last", {"model": {"w": torch.full((3,), float(count[0]))}}, {"epoch": count[0]})
        return load(file)

    monkeypatch.setattr(checkpoint, "load_file", load_while_training_goes_on)
    tensors, state = run.load_checkpoint("last")
    assert state["epoch"] == 2 and (tensors["model"]["w"] == 2).all()


def test_tied_weights_are_stored_under_both_names(tmp_path):
    run, layer = Run.create(tmp_path / "run", {"task": "x"}), nn.Linear(4, 4)
    tied = {"a": layer.weight, "b": layer.weight, "c": layer.weight[1:].t(), "d": layer.bias}
    run.save_checkpoint("last", {"model": tied}, {})
    stored = run.load_checkpoint("last")[0]["model"]
    assert set(stored) == set(tied) and all(torch.equal(stored[name], tied[name]) for name in tied)


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
from gspn.files import SaveError
from gspn.train.checkpoint import Run
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
