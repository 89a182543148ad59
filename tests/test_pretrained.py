"""save_pretrained, from_pretrained and push_to_hub; saved models in the place of runs; the package gspn-weights."""

import copy
import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

import gspn
from gspn import files, weights
from gspn.files import ExistsError
from gspn.models import Backbone, Segmenter

hub = pytest.importorskip("huggingface_hub")

SMALL = dict(depths=[1, 1], width=8, global_levels=[1], in_chans=1, stem_stride=2)


def backbone():
    model = gspn.create_model("gspn_micro", num_classes=4, center=True, backend="reference", **SMALL)
    model.reset_classifier(3)  # the arguments of __init__ are no longer those of the model
    return model


MAKE = {
    "Backbone": backbone,
    "Segmenter": lambda: gspn.create_segmenter("gspn_micro", num_classes=2, decoder_width=6, decoder_depth=2, **SMALL),
    "GSPN2d": lambda: gspn.GSPN2d(
        6, proxy_dim=3, scan_dim=4, groups=2, segment=3, skip=False, merger="mean", average=True, directions=["up"]
    ),
    "GSPN2d, default": lambda: gspn.GSPN2d(5),
}
CLASSES = {"Backbone": Backbone, "Segmenter": Segmenter, "GSPN2d": gspn.GSPN2d}


def made(name):
    """(model, its class, an input)."""
    model = MAKE[name]()
    channels = 1 if hasattr(model, "num_classes") else model.channels
    return model.eval(), CLASSES[name.partition(",")[0]], torch.randn(2, channels, 9, 13)


@pytest.mark.parametrize("name", MAKE)
def test_what_is_saved_is_loaded(name, tmp_path):
    model, of, x = made(name)
    model.save_pretrained(tmp_path / "saved")
    assert {file.name for file in (tmp_path / "saved").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert list(load_file(tmp_path / "saved/model.safetensors")) == sorted(model.state_dict())
    loaded = of.from_pretrained(tmp_path / "saved")
    assert type(loaded) is of and not loaded.training and repr(loaded) == repr(model)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    assert "reference" not in (tmp_path / "saved/config.json").read_text()  # the backend is the machine's


@pytest.mark.parametrize("name", MAKE)
def test_models_are_still_pickled_and_copied(name):
    model, _, x = made(name)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            assert torch.equal(other(x), model(x))


def test_weights_in_16_bits(tmp_path):
    layer = gspn.GSPN2d(6)
    layer.save_pretrained(tmp_path, dtype=torch.float16)
    stored = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    loaded = gspn.GSPN2d.from_pretrained(tmp_path).state_dict()
    assert all(tensor.dtype == torch.float32 for tensor in loaded.values())
    assert all(torch.equal(tensor, layer.state_dict()[name].half().float()) for name, tensor in loaded.items())
    with torch.no_grad():
        layer.input_proj[0, 0, 0] = 1e5
    with pytest.raises(ValueError, match=r"input_proj holds 1e\+05.*float16"):
        layer.save_pretrained(tmp_path, dtype=torch.float16)
    with pytest.raises(ValueError, match="int8"):
        layer.save_pretrained(tmp_path, dtype=torch.int8)
    assert all(torch.equal(stored[name], again) for name, again in load_file(tmp_path / "model.safetensors").items())


def test_the_card(tmp_path):
    model = backbone()
    about = {
        "license": "cc-by-4.0",
        "data": "Pictures of [pets](https://pets).",
        "metrics": {"top-1 accuracy": 0.98765},
    }
    model.save_pretrained(tmp_path / "pets", **about)
    card = hub.ModelCard.load(tmp_path / "pets/README.md")
    assert card.data.license == "cc-by-4.0" and card.data.library_name == "gspn"
    for told in ("Pictures of [pets](https://pets).", "| top-1 accuracy | 0.9877 |", '"center": true', "gspn_micro"):
        assert told in card.content
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in card.content
    (code,) = [part for part in card.content.split("```") if part.startswith("python")]
    assert 'gspn.models.Backbone.from_pretrained("pets")' in code
    (tmp_path / "pets/README.md").write_text("mine")
    model.save_pretrained(tmp_path / "pets")
    assert (tmp_path / "pets/README.md").read_text() == "mine"


def test_what_cannot_be_saved(tmp_path):
    bare = Backbone(depths=[1], width=8, proxy_dim=4, global_levels=[0])
    with pytest.raises(ValueError, match="config"):
        bare.save_pretrained(tmp_path / "bare")
    assert not (tmp_path / "bare").exists()
    changed = gspn.create_model("gspn_micro", num_classes=4, **SMALL)
    changed.head = nn.Linear(changed.num_features, 7)
    with pytest.raises(ValueError, match=r"head\.bias, head\.weight.*reset_classifier"):
        changed.save_pretrained(tmp_path / "changed")
    assert not (tmp_path / "changed").exists()
    (tmp_path / "config.json").write_text('{"format": 1, "task": "classification"}')
    with pytest.raises(ExistsError, match="run"):
        gspn.GSPN2d(4).save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_a_model_of_another_class_is_not_replaced(tmp_path):
    layer = gspn.GSPN2d(4)
    layer.save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ExistsError, match="holds a saved GSPN2d, and this is a Backbone: choose another folder"):
        backbone().save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_failure_keeps_what_was_saved_before(tmp_path, monkeypatch):
    layer = gspn.GSPN2d(4)
    layer.save_pretrained(tmp_path)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    cases = (({"channels": object()}, {}, ValueError), ({}, {"license": object()}, yaml.YAMLError))
    for arguments, options, error in cases:
        other = gspn.GSPN2d(4)
        vars(other).update(arguments)
        with pytest.raises(error, match="object"):
            other.save_pretrained(tmp_path, **options)
        assert torch.equal(gspn.GSPN2d.from_pretrained(tmp_path).weight_proj, layer.weight_proj)
        (tmp_path / "README.md").unlink(missing_ok=True)  # a card is made only where there is none
    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        gspn.GSPN2d(4).save_pretrained(tmp_path)
    loaded = gspn.GSPN2d.from_pretrained(tmp_path)
    assert torch.equal(loaded.weight_proj, layer.weight_proj)


def test_loaded_models_are_float32_whatever_the_default(tmp_path):
    layer = gspn.GSPN2d(4)
    layer.save_pretrained(tmp_path)
    try:
        torch.set_default_dtype(torch.float64)
        loaded = gspn.GSPN2d.from_pretrained(tmp_path)
    finally:
        torch.set_default_dtype(torch.float32)
    assert loaded.weight_proj.dtype == torch.float32 and torch.equal(loaded.weight_proj, layer.weight_proj)
    with torch.device("meta"), pytest.raises(RuntimeError, match=r"meta.*holds no weights.*outside"):
        gspn.GSPN2d.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update({"class": "Segmenter"}), "holds a Segmenter, expected a GSPN2d"),
        (lambda c: c.update(format=99), "newer gspn"),
        (lambda c: c.pop("class"), "names no class"),
        (lambda c: c["model"].update(colour="red"), "damaged.*colour"),
        (lambda c: c["model"].update(proxy_dim=3), "damaged.*proxy_proj"),
        (lambda c: c.pop("model"), "damaged.*model"),
    ],
)
def test_configs_that_cannot_be_loaded(change, message, tmp_path):
    gspn.GSPN2d(4).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"(?s){message}"):
        gspn.GSPN2d.from_pretrained(tmp_path)


def test_folders_that_cannot_be_loaded(tmp_path):
    with pytest.raises(ValueError, match=r"no .*config\.json"):
        gspn.GSPN2d.from_pretrained(tmp_path)
    gspn.GSPN2d(4).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"123")
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        gspn.GSPN2d.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        gspn.GSPN2d.from_pretrained(tmp_path)


def test_a_local_folder_needs_no_huggingface_hub(tmp_path, monkeypatch):
    layer = gspn.GSPN2d(4)
    layer.save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert torch.equal(gspn.GSPN2d.from_pretrained(tmp_path).merger, layer.merger)
    for call in (layer.save_pretrained, layer.push_to_hub, gspn.GSPN2d.from_pretrained):
        with pytest.raises(ImportError, match=r"huggingface_hub.*gspn\[hub\]"):
            call("someone/layer")


# -- the hub, which is not reached here --


def test_a_name_is_downloaded(tmp_path, monkeypatch):
    layer = gspn.GSPN2d(4)
    layer.save_pretrained(tmp_path / "there")
    asked = []

    def snapshot_download(name, **options):
        asked.append((name, options))
        return str(tmp_path / "there")

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    loaded = gspn.GSPN2d.from_pretrained("someone/layer", revision="v1", token="t", local_files_only=True)
    assert torch.equal(loaded.weight_proj, layer.weight_proj)
    ((name, options),) = asked
    assert name == "someone/layer" and options["allow_patterns"] == ["config.json", "model.safetensors"]
    assert (options["revision"], options["token"], options["local_files_only"]) == ("v1", "t", True)


def test_names_that_are_not_on_the_hub(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*/a/b/c"):
        gspn.GSPN2d.from_pretrained(tmp_path / "a/b/c")
    with pytest.raises(hub.errors.LocalEntryNotFoundError) as raised:
        gspn.GSPN2d.from_pretrained("someone/layer", local_files_only=True, cache_dir=tmp_path)
    assert "someone/layer" in raised.value.__notes__[0]


def test_push_to_hub(tmp_path, monkeypatch):
    uploaded = {}

    def create_repo(self, repo_id, **options):
        uploaded["made"] = repo_id, options["private"]
        return hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, **options):
        shutil.copytree(folder_path, tmp_path / "uploaded")
        uploaded["to"] = repo_id, options["commit_message"]
        return "https://huggingface.co/commit"

    monkeypatch.setattr(hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(hub.HfApi, "upload_folder", upload_folder)
    layer = gspn.GSPN2d(4)
    options = {"license": "apache-2.0", "private": True, "commit_message": "First"}
    assert layer.push_to_hub("someone/layer", **options) == "https://huggingface.co/commit"
    assert uploaded == {"made": ("someone/layer", True), "to": ("someone/layer", "First")}
    assert torch.equal(gspn.GSPN2d.from_pretrained(tmp_path / "uploaded").weight_proj, layer.weight_proj)
    card = hub.ModelCard.load(tmp_path / "uploaded/README.md")
    assert card.data.license == "apache-2.0" and 'from_pretrained("someone/layer")' in card.content


def test_generators_have_it_from_diffusers(tmp_path):
    pytest.importorskip("diffusers")
    model = gspn.create_generator("GSPN-DiT-micro/2", num_classes=3, sample_size=8, in_channels=1, hidden_size=24)
    model.save_pretrained(tmp_path)
    loaded = gspn.GSPNDiTTransformer2DModel.from_pretrained(tmp_path)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert callable(model.push_to_hub)


# -- runs --


@pytest.fixture(scope="module")
def saved(digits_run, tmp_path_factory):
    """The folder of a saved run."""
    path = tmp_path_factory.mktemp("saved") / "digits"
    gspn.load_run(digits_run[0].path).save_pretrained(path, metrics={"top-1": digits_run[1]["top1"]})
    return path


def test_a_saved_run_is_used_like_the_run(digits_run, saved):
    from gspn.metrics.classification import evaluate

    run, loaded = gspn.load_run(digits_run[0].path), gspn.load_run(saved, task="classification")
    assert loaded.classes == run.classes and loaded.preprocessing == run.preprocessing
    assert loaded.predict(SEVEN) == run.predict(SEVEN)
    metrics, warnings = evaluate(saved, "digits", workers=0)
    assert metrics["top1"] == pytest.approx(digits_run[1]["top1"]) and not warnings
    assert Backbone.from_pretrained(saved).num_classes == 10
    card = hub.ModelCard.load(saved / "README.md")
    assert card.data.pipeline_tag == "image-classification" and "## Data\n\ndigits" in card.content


SEVEN = Path(__file__).parents[1] / "docs/images/seven.png"


def test_a_saved_segmenter_is_used_like_the_run(masked_run, masked, tmp_path):
    run = gspn.load_run(masked_run.path)
    run.save_pretrained(tmp_path)
    image = next(file for file in sorted(masked.rglob("*.png")) if "mask" not in str(file))
    loaded = gspn.load_run(tmp_path, task="segmentation")
    assert loaded.classes == run.classes and loaded.scale == run.scale
    assert loaded.segment(image).tobytes() == run.segment(image).tobytes()
    places = (str(masked), str(masked_run.path))
    assert not any(place in (tmp_path / "config.json").read_text() for place in places)  # nothing private is published
    assert json.loads((tmp_path / "config.json").read_text())["data"]["where"] == masked.name


def test_a_saved_model_is_no_run_to_go_on_with(saved, tmp_path):
    from gspn.tasks import base
    from gspn.tasks.classify import Setup
    from gspn.train.run import Run, RunError

    with pytest.raises(RunError, match=r"saved model.*init-from"):
        base.resume(Setup, saved)
    with pytest.raises(RunError, match=r"saved model.*not overwritten"):
        Run.check_free(saved, overwrite=True)
    with pytest.raises(RunError, match="epoch-0001"):
        gspn.load_run(saved, "epoch-0001")
    gspn.GSPN2d(4).save_pretrained(tmp_path)
    with pytest.raises(
        RunError, match=r"a saved GSPN2d without a task, expected classification.*; GSPN2d\.from_pretrained reads it"
    ):
        gspn.load_run(tmp_path)


def test_the_command(digits_run, tmp_path):
    from typer.testing import CliRunner

    from gspn.cli import app

    run, out, figures = digits_run[0].path, tmp_path / "out", tmp_path / "evaluation.json"

    def call(*arguments):
        result = CliRunner().invoke(app, ["export", str(run), "--out", str(out), *arguments])
        return result.exit_code, result.output

    figures.write_text(json.dumps({"split": "test", "images": 359, "top1": 0.5, "top5": None}))
    more = ["--precision", "fp16", "--license", "mit", "--trained-on", "my digits", "--evaluation", str(figures)]
    assert call("--hub", *more)[0] == 0
    card = hub.ModelCard.load(out / "README.md")
    assert card.data.license == "mit" and "my digits" in card.content and "float16" in card.content
    assert "| top-1 accuracy (test, 359 images) | 0.5 |" in card.content and "top-5" not in card.content
    code, told = call("--hub")
    assert code == 2 and "overwrite" in told
    assert call("--hub", "--overwrite")[0] == 0
    card = hub.ModelCard.load(out / "README.md")  # the licence is of the folder, the rest of the weights
    assert card.data.license == "mit" and "my digits" not in card.content and "top-1" not in card.content
    for arguments, message in (
        (["--diffusers", "--license", "mit"], "--license is for --hub"),
        (["--hub", "--opset", "20"], "--onnx"),
        (["--hub", "--precision", "int8"], "int8"),
        (["--hub", "--overwrite", "--evaluation", str(run / "config.json")], "config.json"),
        (["--hub", "--overwrite", "--evaluation", "nothing.json"], "nothing.json"),
    ):
        code, told = call(*arguments)
        assert code == 2 and message in told


def test_the_command_replaces_a_model_of_another_class(digits_run, masked_run, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from gspn.cli import app

    def call(run):
        return CliRunner().invoke(app, ["export", str(run), "--hub", "--out", str(tmp_path / "out"), "--overwrite"])

    assert call(digits_run[0].path).exit_code == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr("gspn.runs.save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert call(masked_run.path).exit_code == 1
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    assert call(masked_run.path).exit_code == 0
    Segmenter.from_pretrained(tmp_path / "out")
    assert "Segmenter.from_pretrained" in (tmp_path / "out/README.md").read_text()


# -- gspn-weights --


@pytest.fixture
def not_installed(monkeypatch):
    monkeypatch.setattr(weights, "find_spec", lambda name: None)


def test_the_digits_have_the_accuracy_on_their_card():
    from gspn.metrics.classification import evaluate

    card = (weights.folder("digits") / "README.md").read_text()
    metrics, warnings = evaluate("digits", "digits", workers=0)
    assert f"| top-1 accuracy (test, 359 images) | {metrics['top1']:.4g} |" in card and not warnings
    assert metrics["top1"] > 0.99 and "CC BY 4.0" in card and "Alpaydin" in card
    model = gspn.create_model("gspn_micro", pretrained="digits")
    run = gspn.load_run("digits")
    x = run.preprocess(SEVEN)[None]
    assert not model.training and torch.equal(model(x), run.model(x)) and int(model(x).argmax()) == 7
    assert torch.equal(Backbone.from_pretrained("digits")(x), model(x))


def test_a_new_head_on_trained_weights():
    trained = gspn.create_model("gspn_micro", pretrained="digits")
    model = gspn.create_model("gspn_micro", pretrained="digits", num_classes=3, drop_path_rate=0.1)
    assert model.config == trained.config | {"num_classes": 3, "drop_path_rate": 0.1}
    x = torch.randn(1, 1, 8, 8)
    assert torch.equal(model.forward_features(x), trained.forward_features(x)) and model(x).shape == (1, 3)
    assert isinstance(gspn.create_model("gspn_micro", pretrained="digits", num_classes=0).head, nn.Identity)


def test_weights_that_do_not_fit():
    with pytest.raises(ValueError, match="those of a gspn_micro, expected a gspn_tiny"):
        gspn.create_model("gspn_tiny", pretrained="digits")
    with pytest.raises(ValueError, match=r"digit'.*digits"):
        gspn.create_model("gspn_micro", pretrained="digit")
    with pytest.raises(ValueError, match=r"(?s)in_chans.*stem\.0"):
        gspn.create_model("gspn_micro", pretrained="digits", in_chans=3)
    with pytest.raises(TypeError, match="colour"):
        gspn.create_model("gspn_micro", pretrained="digits", colour=3)
    with pytest.raises(RuntimeError, match="digits"):
        gspn.create_model("gspn_micro", pretrained=True)


def test_a_training_starts_from_a_name(tmp_path):
    from gspn.options import Options
    from gspn.tasks.finetune import open_source

    Options(init_from="digits").check_paths()
    source, trained = open_source("digits", None, {}), gspn.create_model("gspn_micro", pretrained="digits")
    assert (source.name, source.model_args["stem_stride"], source.data) == ("gspn_micro", 1, "digits")
    assert all(torch.equal(source.weights[name], value) for name, value in trained.state_dict().items())


@pytest.mark.usefixtures("not_installed")
def test_without_the_package_the_error_names_it():
    with pytest.raises(ImportError, match=r"pip install \./weights"):
        gspn.create_model("gspn_micro", pretrained="digits")
    with pytest.raises(ValueError, match=r"digits is no run.*pip install \./weights"):
        gspn.load_run("digits")


def test_commands_take_names_and_write_beside_the_user(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from gspn.cli import app

    monkeypatch.chdir(tmp_path)
    before = sorted(weights.root().rglob("*"))
    result = CliRunner().invoke(app, ["predict", "digits", str(SEVEN), "--json"])
    assert json.loads(result.stdout)[0]["classes"][0]["name"] == "7"
    assert CliRunner().invoke(app, ["show", "digits", str(SEVEN)]).exit_code == 0
    assert [file.name for file in tmp_path.iterdir()] == ["context-seven.png"]
    assert sorted(weights.root().rglob("*")) == before
    result = CliRunner().invoke(app, ["predict", "digitz", str(SEVEN)])
    assert result.exit_code == 2 and "digits" in result.stderr
    (tmp_path / "digits").mkdir()  # what is at a path comes first
    assert CliRunner().invoke(app, ["predict", "digits", str(SEVEN)]).exit_code == 2


def test_the_generator_makes_digits():
    pytest.importorskip("diffusers")
    pipeline, classifier = gspn.load_run("digits-generator"), gspn.load_run("digits")
    pipeline.set_progress_bar_config(disable=True)
    classes = [number for number in range(10) for _ in range(3)]
    noise = torch.Generator().manual_seed(1)
    images = pipeline(classes, guidance_scale=2.0, num_inference_steps=25, generator=noise).images
    right = [classifier.predict(image, top=1).keys() == {str(n)} for image, n in zip(images, classes, strict=True)]
    assert sum(right) >= 27  # all 30 here; other machines round differently
    with pytest.raises(ValueError, match="digits-generator"):
        gspn.create_model("gspn_micro", pretrained="digits-generator")
