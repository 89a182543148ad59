"""Training a segmenter, and its run: evaluation, resuming, fine-tuning, what cannot be."""

import json
import shutil
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.masks import make_masked, pair
from helpers.masks import masked_options as options
from helpers.training import same
from PIL import Image

import gspn
from gspn import plots, plots_masks
from gspn.data.images import DataError
from gspn.data.mask_classes import IGNORED, Classes
from gspn.metrics.segmentation import evaluate
from gspn.options import OptionError
from gspn.options.segment import SegmentationOptions
from gspn.runs import load_segmenter
from gspn.tasks import base
from gspn.tasks.segment import SegmentationTask, Setup, dice_losses, settle, weights_of
from gspn.train import loop
from gspn.train.run import Run, RunError

PICTURES = ((plots, "curves"), (plots_masks, "pixel_confusion"), (plots_masks, "pairs"))


@pytest.fixture
def without_pictures(monkeypatch):
    for module, name in PICTURES:
        monkeypatch.setattr(module, name, lambda *args: None)


def test_it_learns_and_leaves_a_run(masked_run):
    row = masked_run.metrics[-1]
    assert row["miou"] > 0.7 > masked_run.metrics[0]["miou"] and row["images"] == 4
    assert set(row["iou"]) == {"ground", "disc", "square"} and row["missing_classes"] == []
    assert {"curves.png", "confusion.png", "predictions.png"} <= {file.name for file in masked_run.path.iterdir()}
    assert masked_run.config["classes"]["colours"][1] == [208, 32, 32] and masked_run.config["task"] == "segmentation"
    assert masked_run.config["class_weights"][0] < 1 < masked_run.config["class_weights"][1]


def test_evaluation_gives_what_training_gave_and_more(masked_run, masked, tmp_path):
    metrics, warnings = evaluate(masked_run.path, masked, workers=0, out=tmp_path / "out")
    best = max(masked_run.metrics, key=lambda row: (row["miou"], -row["val_loss"]))
    assert warnings == [] and metrics["split"] == "val" and metrics["images"] == 4
    assert metrics["miou"] == pytest.approx(best["miou"]) and metrics["loss"] == pytest.approx(best["val_loss"])
    assert 0 < metrics["boundary_f1"] <= 1
    assert json.loads((tmp_path / "out/evaluation.json").read_text())["iou"] == metrics["iou"]
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "evaluation.json",
        "confusion.png",
        "predictions.png",
    }
    other = evaluate(masked_run.path, masked, workers=0, split="train", scale=2.0)[0]
    assert other["images"] == 16 and other["scale"] == 2.0 and other["miou"] != metrics["miou"]


def test_evaluation_of_other_sizes_and_a_missing_class(masked_run, tmp_path):
    folder = make_masked(tmp_path / "mixed", 3, height=20, width=40)
    make_masked(folder, 2)  # two of them have another size now
    for file in (folder / "masks").iterdir():
        mask = np.array(Image.open(file))
        Image.fromarray(np.where(mask == 2, 0, mask).astype(np.uint8)).save(file)
    metrics, warnings = evaluate(masked_run.path, folder, workers=0, split="all", batch_size=3)
    alone = evaluate(masked_run.path, folder, workers=0, split="all", batch_size=1)[0]
    assert metrics["images"] == 3 and metrics["iou"]["square"] == 0 and metrics["missing_classes"] == ["square"]
    assert "square" in warnings[-1]
    assert metrics["miou"] == pytest.approx(sum(metrics["iou"].values()) / 3)
    assert metrics["iou"] == alone["iou"]  # what fills up a batch does not count, nor is it seen


def test_masks_that_the_run_does_not_know(masked_run, tmp_path):
    folder = make_masked(tmp_path / "data", 3)
    mask = pair(0)[1]
    mask[4, 4] = 7
    Image.fromarray(mask).save(folder / "masks/00.png")
    with pytest.raises(DataError, match=r"00\.png holds 1 value: 7 .*2 square"):
        evaluate(masked_run.path, folder, workers=0, split="all")


def test_a_stopped_training_goes_on_to_the_same_bits(masked, tmp_path, monkeypatch, without_pictures):
    given = options(precision="bf16", dice=0.5, save_every="3", tensorboard=False)
    whole, _ = base.start(Setup, masked, tmp_path / "whole", given)
    real, calls = loop.backward, []

    def stopping(*args):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(loop, "backward", stopping)
    with pytest.raises(KeyboardInterrupt):
        base.start(Setup, masked, tmp_path / "stopped", given)
    monkeypatch.undo()
    for module, name in PICTURES:
        monkeypatch.setattr(module, name, lambda *args: None)
    assert Run.open(tmp_path / "stopped").load_checkpoint("last")[1]["step"] < 6
    again, _ = base.resume(Setup, tmp_path / "stopped")
    one, other = (run.load_checkpoint("last")[0] for run in (whole, again))
    assert all(same(one[part], other[part]) for part in ("model", "ema", "optimizer"))
    assert not same(one["model"], one["ema"])
    with pytest.raises(OptionError, match=r"dice .*; what can be changed: [a-z_, ]+\.$"):
        base.resume(Setup, tmp_path / "stopped", {"dice": 0.0})
    shutil.copytree(masked, tmp_path / "other")
    mask = Image.fromarray(np.zeros_like(pair(0)[1]))
    mask.save(tmp_path / "other/masks/00.png")
    with pytest.raises(RunError, match=r"have changed$"):
        base.resume(Setup, tmp_path / "stopped", data=tmp_path / "other")
    config = json.loads((tmp_path / "stopped/config.json").read_text())
    config["preprocessing"] |= {"mean": [0.5], "std": [0.5]}
    (tmp_path / "stopped/config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match="takes images of 3 channels"):
        base.resume(Setup, tmp_path / "stopped")


def test_no_advice_to_start_from_a_segmenter_which_init_from_does_not_take(masked_run, tmp_path):
    load_segmenter(masked_run.path).save_pretrained(tmp_path / "saved")
    with pytest.raises(RunError, match=r"saved is a saved model, not a run that could go on$"):
        base.resume(Setup, tmp_path / "saved")


def test_starting_from_a_classifier(masked, colours, tmp_path, without_pictures):
    from helpers.training import TINY, tiny_options

    from gspn.tasks.classify import train_classifier

    more = dict(batch_size=16, model="gspn_micro", model_args={**TINY, "drop_rate": 0.1})  # of its head
    classifier, _, _ = train_classifier(colours, tmp_path / "colours", tiny_options(**more))
    run, _ = base.start(Setup, masked, tmp_path / "run", options(model_args={}, init_from=str(classifier.path), lr=0.0))
    own, weights = run.load_checkpoint("last")[0]["model"], classifier.load_checkpoint("best")[0]["ema"]
    backbone = {name.removeprefix("backbone."): w for name, w in own.items() if name.startswith("backbone.")}
    assert backbone and same(backbone, {name: weights[name] for name in backbone})


def test_python_loads_it_and_segments_any_image(masked_run):
    run = gspn.load_run(masked_run.path, task="segmentation")
    image, mask = pair(3, height=37, width=50)
    found = run.segment(Image.fromarray(image))
    assert found.mode == "P" and found.size == (50, 37)
    assert (np.asarray(found) == mask)[mask != 255].mean() > 0.85
    assert found.convert("RGB").getpixel((0, 0)) in {(0x88,) * 3, (208, 32, 32), run.classes.colours[2]}
    with pytest.raises(RunError, match=r"segmentation, expected classification.*gspn eval, segment, show"):
        gspn.load_run(masked_run.path, task="classification")


def test_pictures_for_tensorboard(masked):
    setup = Setup.of(masked, options(tensorboard=True))
    task = SegmentationTask(setup, None)
    assert task.pictures() == {}  # nothing is evaluated yet
    _, truth = setup.eval_split.pair(1, setup.classes.numbers)
    task.shown = {1: np.full_like(truth, 1)}
    picture = np.asarray(task.pictures()["predictions"])
    disc, ground = ([208, 32, 32], [0x88] * 3)
    shares = {colour[0]: (picture == colour).all(2).mean() for colour in (disc, ground)}
    assert shares[208] > shares[0x88] > 0.1  # the prediction is all disc, the truth mostly ground
    task.setup.options = options(tensorboard=False)
    assert task.pictures() == {}


def test_options_that_do_not_fit(masked, tmp_path):
    with pytest.raises(OptionError, match="2 numbers, expected 3"):
        base.start(Setup, masked, tmp_path / "a", options(class_weights=(1.0, 2.0)))
    with pytest.raises(OptionError, match=r"min_scale.*2\.0 and 1\.0"):
        options(min_scale=2.0, max_scale=1.0)
    with pytest.raises(DataError, match=r"cannot be read|no such"):
        base.start(Setup, masked, tmp_path / "a", options(classes=str(tmp_path / "no.json")))
    alone = r"classes\.json holds 1 class beside the ignored values, 'square'; expected 2 to 255\. A background"
    with pytest.raises(DataError, match=alone):
        base.start(Setup, masked, tmp_path / "a", options(ignore=("ground", "disc", "255")))
    with pytest.raises(OptionError, match="class_weights takes no null"):
        SegmentationOptions.read({"class_weights": None})
    assert not (tmp_path / "a").exists()


def test_strict_finds_an_unreadable_mask_before_the_training(tmp_path):
    data = make_masked(tmp_path / "data", 4)
    (data / "masks/01.png").write_bytes(b"no")
    with pytest.raises(DataError, match=r"--strict.*mask of .*01\.png"):
        base.start(Setup, data, tmp_path / "run", options(strict=True))
    assert not (tmp_path / "run").exists()


def test_weights_of_classes():
    classes = Classes(("a", "b", "c"), range(3), ((0, 0, 0),) * 3)
    pixels = np.array([80, 20, 0])
    assert weights_of("none", pixels, classes) is None
    weights = np.array(weights_of("balanced", pixels, classes))
    assert weights[1] / weights[0] == pytest.approx(4) and weights[2] == 0
    assert (weights * pixels).sum() / pixels.sum() == pytest.approx(1)
    assert weights_of((1.0, 3.0, 5.0), pixels, classes)[1] == pytest.approx(3 * 100 / 140)
    with pytest.raises(DataError, match="weight 0"):
        weights_of((0.0, 0.0, 1.0), pixels, classes)


def test_dice_of_known_values():
    truth = torch.tensor([[[0, 0, 1, IGNORED]], [[1, 1, 1, 1]]])
    sure = torch.full((2, 3, 1, 4), -100.0)
    sure.scatter_(1, torch.tensor([[0, 1, 1, 2], [1, 1, 1, 1]]).view(2, 1, 1, 4), 100.0)
    # of the first: class 0 is 2 * 1 / (1 + 2), class 1 is 2 * 1 / (2 + 1); three pixels count
    assert dice_losses(sure, truth).tolist() == pytest.approx([(1 - 2 / 3) * 3, 0.0], abs=1e-5)


def test_the_loss_is_a_mean_over_labelled_pixels(masked):
    setup = Setup.of(masked, options(dice=1.0, class_weights=(1.0, 2.0, 4.0)))
    task, model = SegmentationTask(setup, None), torch.nn.Conv2d(3, 3, 1)
    batch = {"image": torch.randn(4, 3, 6, 7), "mask": torch.randint(0, 3, (4, 6, 7)).byte()}
    batch["mask"][0, :3] = IGNORED
    whole = task.loss(model, batch)
    parts = [task.loss(model, {k: v[i : i + 1] for k, v in batch.items()}) for i in range(4)]
    assert whole.item() == pytest.approx(sum(part.item() for part in parts), rel=1e-5)
    assert task.count(batch) == 4 * 42 - 21
    logits = model(batch["image"]).log_softmax(1)
    weights, index = torch.tensor(setup.class_weights), batch["mask"].clamp(max=2).long()
    entropy = -(logits.gather(1, index[:, None])[:, 0] * weights[index])[batch["mask"] != IGNORED].sum()
    dice = dice_losses(model(batch["image"]), batch["mask"].long()).sum()
    assert whole.item() == pytest.approx((entropy + dice).item(), rel=1e-5)


def test_the_default_model(masked_run):
    assert masked_run.config["options"]["model"] == masked_run.config["model"]["name"] == "gspn_mobile"
    assert masked_run.config["options"]["optimizer"] == "muon"


@pytest.mark.parametrize(
    ("given", "begun", "optimizer", "rate"),
    [
        ({}, False, "muon", 4e-3),
        ({"optimizer": "adamw"}, False, "adamw", 4e-3),
        ({"fsdp": True}, False, "adamw", 4e-3),
        ({"lr": 1e-3}, False, "muon", 1e-3),
        ({"model": "gspn_micro"}, False, "adamw", 2e-3),
        ({}, True, "adamw", 2e-3),
    ],
)
def test_the_default_optimizer_and_rate(given, begun, optimizer, rate):
    source = SimpleNamespace(name="gspn_mobile", model_args={}) if begun else None
    settled = settle(SegmentationOptions(**given), Counter({(24, 32): 2}), 3, source)
    assert (settled.optimizer, settled.lr, settled.epochs, settled.size) == (optimizer, rate, 60, (24, 32))
