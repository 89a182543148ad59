"""Training from trained weights: heads, channels, sizes, what does not fit."""

import pytest
import torch
from helpers.training import TINY, same, tiny_options
from PIL import Image
from safetensors.torch import save_file

import gspn
from gspn import plots
from gspn.data.images import DataError
from gspn.options import OptionError
from gspn.runs import load_classifier
from gspn.tasks.classify import train_classifier
from gspn.tasks.finetune import open_source, start_from
from gspn.train.run import RunError


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    for name in ("curves", "predictions", "context"):
        monkeypatch.setattr(plots, name, lambda *args: None)


def from_run(run, **more):
    """Options of a training that begins with a run's weights and leaves them nearly as they are."""
    return tiny_options(init_from=str(run.path), model_args={}, lr=1e-12, weight_decay=0.0, ema=0.0, **more)


def body(state):
    return {name: tensor for name, tensor in state.items() if not name.startswith("head.")}


def test_same_data_keep_the_head(digits_run, tmp_path):
    run, metrics = digits_run
    again, found, _ = train_classifier("digits", tmp_path / "again", from_run(run))
    assert found["top1"] == pytest.approx(metrics["top1"])
    assert {name: again.config["model"][name] for name in TINY} == {name: run.config["model"][name] for name in TINY}


def test_other_classes_size_and_frozen_body(digits_run, colours, tmp_path):
    """Digits to colours: a new head for three classes, larger images, converted to the one channel."""
    run, _ = digits_run
    options = from_run(run, channels=1, freeze=("stem", "levels", "norm"), batch_size=16)
    other, _, _ = train_classifier(colours, tmp_path / "other", options)
    mine, theirs = load_classifier(other.path).model.state_dict(), load_classifier(run.path).model.state_dict()
    assert same(body(mine), body(theirs)) and mine["head.weight"].shape == (3, theirs["head.weight"].shape[1])
    assert other.config["preprocessing"]["size"] == [24, 20]


def test_head_goes_by_names(digits_run, tmp_path):
    run, _ = digits_run
    source = open_source(run.path, None, {})
    new = lambda classes: gspn.create_model("gspn_micro", num_classes=classes, in_chans=1, **TINY)  # noqa: E731
    names = [str(i) for i in range(10)]
    model = new(10)
    assert start_from(source, model, names, "digits") == f"weights of the run {run.path}, its head too"
    assert torch.equal(model.head.weight, source.weights["head.weight"])
    # numbers that stand for other things elsewhere, and other names
    for classes, data in ((names, "/fashion"), (["shirt", *names[1:]], "digits"), (names[:7], "digits")):
        model = new(len(classes))
        before = model.head.weight.clone()
        assert start_from(source, model, classes, data).endswith(f"with a new head for {len(classes)} classes")
        assert torch.equal(model.head.weight, before) and same(body(model.state_dict()), body(source.weights))


def test_a_file_of_weights(digits_run, tmp_path):
    weights = load_classifier(digits_run[0].path).model.state_dict()
    save_file(weights, tmp_path / "weights.safetensors")
    model = gspn.create_model("gspn_micro", num_classes=10, in_chans=1, **TINY)
    with pytest.raises(OptionError, match=r"weights\.safetensors does not say which model.*--model"):
        open_source(tmp_path / "weights.safetensors", None, {})
    note = start_from(open_source(tmp_path / "weights.safetensors", "gspn_micro", {}), model, ["a"] * 10, "x")
    assert note.endswith("with a new head for 10 classes") and same(body(model.state_dict()), body(weights))


@pytest.mark.parametrize("file", ["", "model.safetensors"])
def test_a_saved_backbone(file, tmp_path):
    """Its arguments come with it, from its own file of weights too; without names of classes the head is new."""
    torch.manual_seed(5)  # not the training's
    saved = gspn.create_model("gspn_micro", num_classes=10, in_chans=1, **TINY, center=True)
    saved.save_pretrained(tmp_path / "saved")
    options = tiny_options(init_from=str(tmp_path / "saved" / file), model_args={}, lr=0.0, weight_decay=0.0, ema=0.0)
    run, _, _ = train_classifier("digits", tmp_path / "run", options)
    assert run.config["model"]["center"] is True
    mine = load_classifier(run.path).model.state_dict()
    assert same(body(mine), body(saved.state_dict())) and not torch.equal(mine["head.weight"], saved.head.weight)
    with pytest.raises(OptionError, match=r"init_from: the saved model .* has a gspn_micro, expected a gspn_tiny"):
        open_source(tmp_path / "saved" / file, "gspn_tiny", {})
    (tmp_path / "saved" / "model.safetensors").write_bytes(b"")
    with pytest.raises(OptionError, match=r"^init_from: .*model\.safetensors cannot be read"):
        open_source(tmp_path / "saved" / file, None, {})


def test_a_saved_segmenter_starts_no_training(tmp_path):
    gspn.create_segmenter("gspn_micro", num_classes=2, **TINY).save_pretrained(tmp_path)
    with pytest.raises(OptionError, match=r"^init_from: .* is a saved Segmenter, expected a saved backbone"):
        open_source(tmp_path, None, {})


def test_what_does_not_fit(digits_run, colours, tmp_path):
    run, _ = digits_run
    with pytest.raises(OptionError, match=r"1 channels.* 3; --channels 1 "):
        train_classifier(colours, tmp_path / "run", from_run(run, batch_size=16))
    with pytest.raises(OptionError, match=r"init_from: .*\(16,.* there.*\(8,"):
        train_classifier("digits", tmp_path / "run", tiny_options(init_from=str(run.path), model_args={"width": 8}))
    with pytest.raises(OptionError, match=r"init_from: .*gspn_micro.*gspn_tiny.*--model"):
        train_classifier("digits", tmp_path / "run", from_run(run, model="gspn_tiny"))
    for path, message in {
        "gone": r"no gone.*run folder.*\.safetensors.*\.pth",
        "gone.safetensors": r"init_from: gone\.safetensors",
    }.items():
        with pytest.raises(OptionError, match=message):
            train_classifier("digits", tmp_path / "run", tiny_options(init_from=path))
    (tmp_path / "a.pth").write_bytes(b"nothing")
    with pytest.raises(OptionError, match=r"a\.pth.*--model"):
        train_classifier("digits", tmp_path / "run", tiny_options(init_from=str(tmp_path / "a.pth")))
    with pytest.raises(OptionError, match=r"^init_from: .*a\.pth"):
        train_classifier("digits", tmp_path / "run", tiny_options(init_from=str(tmp_path / "a.pth"), model="gspn_tiny"))
    with pytest.raises(RunError, match="no run"):
        train_classifier("digits", tmp_path / "run", tiny_options(init_from=str(tmp_path)))
    with pytest.raises(OptionError, match=r"freeze: .*'level'.*'levels'"):
        train_classifier("digits", tmp_path / "run", from_run(run, freeze=("level",)))
    everything = ("stem", "levels", "norm", "head")
    with pytest.raises(OptionError, match="nothing is left to train"):
        train_classifier("digits", tmp_path / "run", from_run(run, freeze=everything))
    for device in ("foo", "meta", "cuda:99"):
        with pytest.raises(OptionError, match=f"ema_device '{device}'"):
            train_classifier("digits", tmp_path / "run", tiny_options(ema_device=device))
    assert not (tmp_path / "run").exists()


def test_data_without_training_images(digits_run, tmp_path):
    """The error is the same as without --init-from."""
    (tmp_path / "data" / "test" / "a").mkdir(parents=True)
    Image.new("L", (8, 8)).save(tmp_path / "data" / "test" / "a" / "0.png")
    for options in (tiny_options(), from_run(digits_run[0])):
        with pytest.raises(DataError, match="has no train split, only test"):
            train_classifier(tmp_path / "data", tmp_path / "run", options)
