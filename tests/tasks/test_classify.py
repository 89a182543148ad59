"""Training a classifier, and what a run leaves behind."""

import json
import os

import numpy as np
import pytest
import torch
from helpers.training import TINY, same, tiny_options
from PIL import Image

import gspn
from gspn import plots
from gspn.data.labelled import DataError, open_data
from gspn.files import write_json
from gspn.metrics.classification import evaluate
from gspn.options import OptionError, Options, read_file
from gspn.runs import load_classifier
from gspn.tasks.classify import build_model, settle, train_classifier
from gspn.train.run import FORMAT, Run, RunError

# -- a run --


def test_run_folder_has_everything(digits_run):
    run, _ = digits_run
    names = {str(file.relative_to(run.path)) for file in run.path.rglob("*") if file.is_file()}
    parts = {"model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"}
    assert names == {
        ".lock",
        "config.json",
        "options.yaml",
        "metrics.jsonl",
        "curves.png",
        "predictions.png",
        "context.png",
    } | {f"checkpoints/{name}/{part}" for name in ("last", "best") for part in parts}
    config = json.loads((run.path / "config.json").read_text())
    assert config["format"] == FORMAT and config["task"] == "classification"
    assert config["model"]["name"] == "gspn_micro" and config["class_names"] == [str(i) for i in range(10)]
    assert config["preprocessing"]["size"] == [8, 8] and 0.2 < config["preprocessing"]["mean"][0] < 0.4
    assert config["options"]["lr"] == 2e-2 and config["options"]["augment"] == "shift"
    assert set(config["versions"]) == {"gspn", "torch", "accelerate", "python"}
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
    trained = {name for name, _ in classifier.model.named_parameters()}
    slots = ("exp_avg", "exp_avg_sq", "step")
    assert set(tensors["optimizer"]) == {f"{name}.{slot}" for name in trained for slot in slots}
    assert all(tensors["optimizer"][f"{name}.step"] == 33 for name in trained)


def test_same_seed_same_run(colours, tmp_path, monkeypatch):
    for picture in ("curves", "predictions", "context"):
        monkeypatch.setattr(plots, picture, lambda *args: None)  # they take longer than the training
    args = dict(TINY, drop_path_rate=0.3, depths=[2], width=8)
    options = dict(model_args=args, epochs=2, batch_size=8, augment="crop", flip=True)
    for name, seed in (("one", 5), ("two", 5), ("other", 6)):
        train_classifier(colours, tmp_path / name, tiny_options(seed=seed, **options))
    one, two, other = (Run.open(tmp_path / name).load_checkpoint("last")[0] for name in ("one", "two", "other"))
    assert all(same(one[part], two[part]) for part in one)
    assert not torch.equal(one["model"]["head.weight"], other["model"]["head.weight"])


def test_evaluate_again(digits_run):
    run, metrics = digits_run
    again, warnings = evaluate(run.path, "digits", workers=0)
    assert warnings == [] and again["split"] == "test" and again["images_per_second"] > 0
    assert again["top1"] == pytest.approx(metrics["top1"]) and again["loss"] == pytest.approx(metrics["loss"], rel=1e-5)
    assert evaluate(run.path, "digits", split="train", batch_size=500)[0]["images"] == 1438
    with pytest.raises(DataError, match=r"split 'val'.*train, test"):
        evaluate(run.path, "digits", split="valid")


def test_predict_agrees_with_evaluation(digits_run):
    run, metrics = digits_run
    classifier = load_classifier(run.path)
    split = open_data("digits").splits["test"]
    answers = classifier.rank(torch.stack([classifier.preprocessing(split.image(i)) for i in range(len(split))]), top=3)
    right = sum(answer[0][0] == str(int(label)) for answer, label in zip(answers, split.labels, strict=True))
    assert right / len(split) == pytest.approx(metrics["top1"])
    assert len(answers[0]) == 3 and answers[0][0][1] >= answers[0][1][1]


@pytest.mark.slow
def test_compiled_and_channels_last_change_nothing_but_rounding(tmp_path, monkeypatch):
    for picture in ("curves", "predictions", "context"):
        monkeypatch.setattr(plots, picture, lambda *args: None)
    options = dict(batch_size=359, lr=1e-2)
    plain = train_classifier("digits", tmp_path / "plain", tiny_options(**options))[0]
    fast = train_classifier("digits", tmp_path / "fast", tiny_options(compile=True, channels_last=True, **options))[0]
    assert fast.metrics[-1]["train_loss"] == pytest.approx(plain.metrics[-1]["train_loss"], abs=1e-4)
    one, other = (run.load_checkpoint("last")[0]["model"] for run in (plain, fast))
    assert one.keys() == other.keys()


def test_bf16_and_no_ema(tmp_path):
    args = dict(TINY, backend="reference")
    options = tiny_options(precision="bf16", ema=0.0, clip=0.0, model_args=args)
    run, _, _ = train_classifier("digits", tmp_path / "run", options)
    assert not (run.path / "checkpoints" / "last" / "ema.safetensors").exists()
    weights = run.load_checkpoint("best")[0]["model"]
    assert all(value.dtype == torch.float32 for value in weights.values())
    assert evaluate(run.path, "digits")[0]["images"] == 359


# -- folders of images --


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
    for name in ("a/0", "a/1", "a/2", "b/0", "b/1", "b/2"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / f"{name}.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"none of 4 images .*png"):
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
    with pytest.raises(DataError, match="3 classes: blue, green, red "):
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
    with pytest.raises(DataError, match=r"1 channels .*3; --channels 1"):
        evaluate(digits_run[0].path, tmp_path / "numbered")
    assert evaluate(digits_run[0].path, tmp_path / "numbered", channels=1, workers=0)[0]["images"] == 35
    with pytest.raises(OptionError, match=r"3 channels.* 1; --channels 3"):
        train_classifier("digits", tmp_path / "run", tiny_options(model_args=dict(TINY, in_chans=3)))
    with pytest.raises(OptionError, match=r"channels .*3, .* 1"):
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
        with pytest.raises(RunError, match=f"KeyError: '{missing}'"):
            evaluate(run.path, colours)


def test_one_image_a_class_cannot_be_trained_on_but_evaluated(colours, tmp_path):
    run, _, _ = train_classifier(colours, tmp_path / "run", tiny_options(batch_size=16))
    for file in colours.rglob("*.png"):
        if file.stem != "5":
            file.unlink()
    with pytest.raises(DataError, match="3 images with one image"):
        train_classifier(colours, tmp_path / "other", tiny_options())
    assert not (tmp_path / "other").exists()
    assert evaluate(run.path, colours, split="all", workers=0)[0]["images"] == 3


def test_models_that_cannot_be(tmp_path):
    for model, args, message in [
        ("gspn_huge", {}, "'gspn_huge'.*'gspn_base'"),
        ("gspn_micro", {"colour": 1}, "argument 'colour'"),
        ("gspn_micro", {"stem_stride": 3}, "stem_stride.*3"),
        ("gspn_micro", {"num_classes": 7}, "7 classes.*10"),
        ("gspn_micro", {"backend": "gpu"}, "backend 'gpu'"),
        ("gspn_micro", {"backend": "triton"}, "8x8, grey on cpu: backend 'triton'"),
    ]:
        with pytest.raises(OptionError, match=message):
            train_classifier("digits", tmp_path / "run", Options(model=model, model_args=args))
    assert not (tmp_path / "run").exists()


def test_presets_and_small_inputs():
    split = open_data("digits").splits["train"]
    preprocessing, options, _ = settle(Options(), "digits", split)
    assert options.flip is False and options.model_args == {"stem_stride": 1} and options.size == (8, 8)
    assert {name for name, value in vars(options).items() if value is None} == {
        *("init_from", "min_lr", "ema_device", "freeze", "class_names", "image_column", "label_column"),
    }
    assert settle(Options(size=(28, 20), epochs=7), "idx", split)[0].size == (28, 20)
    tiny_input = settle(Options(size=(2, 1), model="gspn_tiny", model_args={"backend": "reference"}), "digits", split)
    assert build_model(tiny_input[1], tiny_input[0], 10).num_classes == 10  # smaller than the model's stride: works
    assert preprocessing.crop == 1
    models = [settle(Options(channels=channels), "digits", split)[1].model for channels in (None, 3)]
    assert [options.model, *models] == ["gspn_micro", "gspn_micro", "gspn_mobile"]  # grey, grey, colour


def test_picture_of_the_context_at_a_place(digits_run, tmp_path):
    classifier = load_classifier(digits_run[0].path)
    image = open_data("digits").splits["test"].image(0)
    plots.context(tmp_path / "a.png", classifier, image, (0, 7), block=0)
    assert (tmp_path / "a.png").stat().st_size > 10_000
    plots.context(tmp_path / "n.png", classifier, image, (0, 7), block=0, narrowest=True)
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "n.png").read_bytes()
    with pytest.raises(ValueError, match=r"pixel.*8x8"):
        plots.context(tmp_path / "b.png", classifier, image, (8, 0))
    shared = gspn.create_model("gspn_mobile", num_classes=10)
    with pytest.raises(ValueError, match=r"all channels of levels\.2\.blocks\.1 share their weights"):
        gspn.models.context_maps(shared, torch.zeros(3, 32, 32), (0, 0), narrowest=True)
    assert sorted(os.listdir(tmp_path)) == ["a.png", "n.png"]


def test_a_model_without_a_number_for_each_class_is_refused(tmp_path):
    with pytest.raises(OptionError, match=r"global_pool='' gives an output of shape \(1, 10, .*expected \(1, 10\)"):
        train_classifier("digits", tmp_path / "run", tiny_options(model_args=dict(TINY, global_pool="")))
    assert not (tmp_path / "run").exists()


def test_the_file_of_options_converts_images_only_if_that_was_asked_for(colours, tmp_path):
    for channels, kept in ((None, None), (1, 1)):
        run, _, _ = train_classifier(
            colours, tmp_path / f"run{channels}", tiny_options(channels=channels, batch_size=16, epochs=1)
        )
        assert read_file(run.path / "options.yaml")["channels"] == kept
