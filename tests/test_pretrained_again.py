"""Saving into a folder that holds a card; models that were changed after they were made; classes of another number."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import gspn
from gspn.models import Backbone, Segmenter
from gspn.pretrained import MARK, Card
from gspn.train.run import RunError

hub = pytest.importorskip("huggingface_hub")

SMALL = dict(depths=[1, 1], width=8, global_levels=[1], stem_stride=2)
MAKE = {
    "backbone": lambda **options: gspn.create_model("gspn_micro", **{"num_classes": 3, **SMALL, **options}),
    "segmenter": lambda **options: gspn.create_segmenter("gspn_micro", **{"num_classes": 3, **SMALL, **options}),
}


# -- cards --


def test_a_card_that_nobody_changed_is_written_anew(tmp_path):
    card = tmp_path / "README.md"
    data = "pictures --> of pets\r\n"  # what ends a comment, and an end of line that reading text would change
    gspn.GSPN2d(8).save_pretrained(tmp_path, license="mit", data=data, metrics={"top-1": 0.98765, "top-5": 1})
    gspn.GSPN2d(16, segment=4).save_pretrained(tmp_path, license="apache-2.0")
    told = card.read_text()
    assert hub.ModelCard.load(card).data.license == "apache-2.0" and "mit" not in told
    assert '"segment": 4' in told and '"channels": 16' in told
    assert "| top-1 | 0.9877 |\n| top-5 | 1 |" in told and "pictures --> of pets" in told  # still told
    assert told.count(MARK.strip()) == 1 and told.rpartition(MARK)[2].count("-->") == 1
    gspn.GSPN2d(16, segment=4).save_pretrained(tmp_path, metrics={"top-1": 0.5})
    assert "| top-1 | 0.5 |" in card.read_text() and "top-5" not in card.read_text()


@pytest.mark.parametrize("change", [lambda told: told.replace("layer", "nice layer"), lambda told: "mine"])
def test_a_card_that_somebody_changed_stays(change, tmp_path):
    layer, card = gspn.GSPN2d(8), tmp_path / "README.md"
    layer.save_pretrained(tmp_path, license="mit")
    card.write_text(change(card.read_text()))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    for given in ({"license": "mit"}, {"data": "pets"}, {"metrics": {"top-1": 0.5}}):
        with pytest.raises(ValueError, match=r"README\.md was changed.*license, data and metrics.*remove it"):
            gspn.GSPN2d(8).save_pretrained(tmp_path, **given)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    other = gspn.GSPN2d(8)
    other.save_pretrained(tmp_path)
    assert card.read_bytes() == before["README.md"]
    assert torch.equal(gspn.GSPN2d.from_pretrained(tmp_path).weight_proj, other.weight_proj)


def test_a_run_is_saved_again_beside_a_card_of_ones_own(digits_run, tmp_path):
    loaded = gspn.load_run(digits_run[0].path)
    loaded.save_pretrained(tmp_path)
    assert "## Data\n\ndigits" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("mine")
    loaded.save_pretrained(tmp_path)  # the data of the run were not given by the user
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_saved_model_that_is_loaded_and_saved_again_keeps_its_licence(digits_run, tmp_path):
    told = {"license": "cc-by-4.0", "data": "digits by their writers", "metrics": {"top-1": 0.5}}
    gspn.load_run(digits_run[0].path).save_pretrained(tmp_path / "first", **told)
    again = gspn.load_run(tmp_path / "first")
    again.save_pretrained(tmp_path / "second")
    # the metrics belong to weights, which somebody may have changed meanwhile
    assert Card.read(tmp_path / "second/README.md") == Card("cc-by-4.0", "digits by their writers")
    again.save_pretrained(tmp_path / "third", license="mit", metrics={"top-1": 0.25})
    assert Card.read(tmp_path / "third/README.md") == Card("mit", "digits by their writers", {"top-1": "0.25"})


# -- what is saved --


@pytest.mark.parametrize("name", MAKE)
def test_layers_that_were_changed_are_not_saved(name, tmp_path):
    model = MAKE[name]()
    layers = [module for module in model.modules() if isinstance(module, gspn.GSPN2d)]
    for layer in layers:
        layer.backend = "reference"  # the machine's, which is not saved
    model.save_pretrained(tmp_path / "saved")
    for layer in layers:
        layer.segment = 5
    with pytest.raises(ValueError, match=r"was changed after it was made.*blocks\.0\.gspn\.segment"):
        model.save_pretrained(tmp_path / "changed")
    assert not (tmp_path / "changed").exists()
    layers[0].save_pretrained(tmp_path / "layer")  # alone, it is saved as it is
    assert gspn.GSPN2d.from_pretrained(tmp_path / "layer").segment == 5


def test_parts_without_weights_that_were_changed_are_not_saved(tmp_path):
    model = MAKE["backbone"](drop_path_rate=0.1)
    model.save_pretrained(tmp_path)
    silus = [name for name, part in model.named_modules() if isinstance(part, torch.nn.SiLU)]
    model.set_submodule(silus[0], torch.nn.ReLU())
    with pytest.raises(ValueError, match=f"was changed after it was made.*{silus[0]}"):
        model.save_pretrained(tmp_path / "other")


def test_tied_weights_are_stored_under_each_name(tmp_path):
    model = MAKE["backbone"](depths=[2, 1])
    model.levels[0].blocks[1] = model.levels[0].blocks[0]
    model.save_pretrained(tmp_path)
    assert list(load_file(tmp_path / "model.safetensors")) == sorted(model.state_dict())
    x = torch.randn(1, 3, 9, 13)
    assert torch.equal(Backbone.from_pretrained(tmp_path)(x), model.eval()(x))


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_models_without_values_are_not_saved(dtype, tmp_path):
    with pytest.raises(ValueError, match=r'weight_proj is on the device "meta" and holds no values.*load'):
        gspn.GSPN2d(8).to("meta").save_pretrained(tmp_path / "saved", dtype=dtype)
    assert not (tmp_path / "saved").exists()


def test_numbers_of_numpy_are_saved_as_numbers(tmp_path):
    four, options = np.int64(4), dict(width=np.int32(8), depths=np.array([1, 1]), drop_path_rate=np.float32(0.5))
    backbone = MAKE["backbone"](num_classes=four, in_chans=np.int8(1), **options)
    segmenter = MAKE["segmenter"](num_classes=four, decoder_width=np.int64(6), decoder_depth=np.int64(1), **options)
    backbone.reset_classifier(np.int64(5))
    for model, of, classes in ((backbone, Backbone, 5), (segmenter, Segmenter, 4)):
        model.save_pretrained(tmp_path / of.__name__)
        loaded = of.from_pretrained(tmp_path / of.__name__)
        assert loaded.num_classes == classes and loaded.config == model.config == json.loads(json.dumps(model.config))


# -- what is loaded --


def test_a_file_is_no_name_on_the_hub(tmp_path, monkeypatch):
    gspn.GSPN2d(4).save_pretrained(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: pytest.fail("went online"))
    with pytest.raises(ValueError, match=rf"model\.safetensors is a file, expected a folder.*pass {tmp_path}$"):
        gspn.GSPN2d.from_pretrained(tmp_path / "model.safetensors")


def test_trained_weights_are_float32_whatever_the_default(digits_run):
    loads = {
        "a run": lambda: gspn.load_run(digits_run[0].path).model,
        "weights": lambda: gspn.create_model("gspn_micro", pretrained="digits"),
    }
    for name, load in loads.items():
        expected = load().state_dict()
        try:
            torch.set_default_dtype(torch.bfloat16)
            found = load().state_dict()
        finally:
            torch.set_default_dtype(torch.float32)
        assert all(torch.equal(found[key], value) for key, value in expected.items()), name
        with torch.device("meta"), pytest.raises(RuntimeError, match=r"meta.*holds no weights.*outside"):
            load()


# -- classes --


def test_there_is_a_name_for_each_class(digits_run, tmp_path):
    loaded, image = gspn.load_run(digits_run[0].path), Image.new("L", (8, 8))
    loaded.model.reset_classifier(3)
    with pytest.raises(ValueError, match="names of 10 classes, but the model has 3: set `classes`"):
        loaded.save_pretrained(tmp_path / "three")
    assert not (tmp_path / "three").exists()
    with pytest.raises(ValueError, match="names of 10 classes, but the model has 3: set `classes`"):
        loaded.predict(image)
    loaded.classes = ["cat", "dog", "fox"]
    loaded.save_pretrained(tmp_path / "three")
    again = gspn.load_run(tmp_path / "three")
    assert again.classes == loaded.classes and again.predict(image) == loaded.predict(image)
    assert "The classes: cat, dog, fox." in (tmp_path / "three/README.md").read_text()
    config = json.loads((tmp_path / "three/config.json").read_text())
    (tmp_path / "three/config.json").write_text(json.dumps(config | {"class_names": [*loaded.classes, "owl"]}))
    with pytest.raises(RunError, match=r"three.*names of 4 classes, but the model has 3: correct class_names"):
        gspn.load_run(tmp_path / "three")


def test_classes_of_masks_are_saved_as_they_are_named_now(masked_run, tmp_path):
    loaded = gspn.load_run(masked_run.path)
    loaded.classes = replace(loaded.classes, names=[f"no. {name}" for name in loaded.classes.names])
    loaded.save_pretrained(tmp_path)
    assert gspn.load_run(tmp_path).classes == loaded.classes
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["class_names"] == list(loaded.classes.names)
    for part in ("names", "values", "colours"):
        config["classes"][part].pop()
    (tmp_path / "config.json").write_text(json.dumps(config))
    count = len(loaded.classes)
    with pytest.raises(RunError, match=f"names of {count - 1} classes, but the model has {count}: correct classes"):
        gspn.load_run(tmp_path)
