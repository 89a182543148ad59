"""`gspn export`, and the page that says how to use what it writes."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import gspn
from gspn.cli import app
from gspn.data.images import Preprocessing
from gspn.train.run import Run

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

PAGE = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
PAGE_PICTURE = Path(__file__).parents[2] / "docs" / "images" / "seven.png"
SNIPPETS = re.findall(
    r"```python\n(.*?)```", PAGE, re.DOTALL
)  # a classifier, a segmenter, any module, a package, torch.compile
BLOCKED = "import sys\nsys.modules['torch'] = sys.modules['gspn'] = None\n"


def gspn_command(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run as training leaves it, with weights of which no training is needed here."""
    path = tmp_path_factory.mktemp("export") / "runs" / "first"
    path.parent.mkdir()
    torch.manual_seed(0)
    model = gspn.create_model(
        "gspn_micro", num_classes=3, in_chans=3, width=8, depths=(1,), global_levels=(0,), activation=None
    )
    torch.nn.init.normal_(model.head.weight)
    config = {
        "task": "classification",
        "model": model.config,
        "preprocessing": Preprocessing(3, (10, 14), (0.5, 0.4, 0.3), (0.2, 0.2, 0.3), crop=0.875).to_json(),
        "class_names": ["cat", "dog", "ökapi"],
        "data": {"where": "none"},
        "options": {"precision": "fp32"},
    }
    Run.create(path, config).save_checkpoint("best", {"model": model.state_dict()}, {})
    return path


def test_the_file_is_usable_without_torch_and_gspn(run):
    code, out, err = gspn_command("export", run, "--onnx")
    assert code == 0, err
    assert f"{run / 'model.onnx'}, " in out and "2x3x8x8, " in out
    folder = run.parent.parent
    pixels = np.random.default_rng(0).integers(0, 255, (37, 29, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png")
    told = subprocess.run(
        [sys.executable, "-c", BLOCKED + SNIPPETS[0]], cwd=folder, capture_output=True, encoding="utf-8", check=True
    ).stdout
    answers = json.loads(gspn_command("predict", run, folder / "picture.png", "--json")[1])
    classes = answers[0]["classes"]
    assert len({round(c["probability"], 3) for c in classes}) == 3  # or any order would do
    for line, expected in zip(told.splitlines(), classes, strict=True):
        name, probability = line.split()
        assert name == expected["name"] and abs(float(probability) - expected["probability"]) < 2e-4


@pytest.mark.parametrize("picture", [(29, 40), (40, 29), (28, 28), (1000, 333)])
def test_the_page_s_preprocessing_takes_any_picture(picture, tmp_path):
    """Rounding may make the box larger than the picture, which Pillow refuses."""
    preparing = Preprocessing(3, (28, 28), (0.5, 0.4, 0.3), (0.2, 0.2, 0.3), crop=1.0)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*picture[::-1], 3), dtype=np.uint8))
    image.save(tmp_path / "picture.png")
    names = {"Image": Image, "np": np, "prep": preparing.to_json()}
    exec(re.search(r"def prepared.*?\n\n", SNIPPETS[0], re.DOTALL)[0], names)
    expected = preparing.normalize(preparing(image)[None]).numpy()
    np.testing.assert_allclose(names["prepared"](tmp_path / "picture.png"), expected, atol=1e-5)


def test_a_segmenter_gives_the_same_masks_without_torch_and_gspn(masked, masked_run, tmp_path):
    """A model that sees images at half their size: the page's lines give its classes, pixel by pixel."""
    saved = shutil.copytree(masked_run.path, tmp_path / "runs" / "street")
    config = json.loads((saved / "config.json").read_text())
    config["options"]["scale"] = 0.5
    (saved / "config.json").write_text(json.dumps(config))
    shapes = Image.open(sorted((masked / "images").iterdir())[0]).convert("RGB")
    shapes.resize((64, 48)).save(tmp_path / "photo.jpg")
    code, out, err = gspn_command("export", saved, "--onnx", "--size", "24x32", "--batch", 1)  # open ones take a minute
    assert code == 0 and "1x3x24x32" in out, err
    lines = BLOCKED + SNIPPETS[1] + "\nnp.save('number.npy', number)"
    told = subprocess.run(
        [sys.executable, "-c", lines], cwd=tmp_path, capture_output=True, encoding="utf-8", check=True
    ).stdout
    run = gspn.load_run(saved, task="segmentation")
    seen = run.pixels(Image.open(tmp_path / "photo.jpg").convert("RGB"))[None]
    with torch.inference_mode():
        logits = run.model(run.preprocessing.normalize(seen))[0]
    number = np.load(tmp_path / "number.npy")
    assert number.shape == (24, 32) and len(np.unique(number)) > 1
    clear = np.diff(logits.sort(0).values[-2:].numpy(), axis=0)[0] > 1e-3  # elsewhere rounding may decide
    assert clear.mean() > 0.9 and (number == logits.argmax(0).numpy())[clear].all()
    assert told.splitlines() == [f"{name}: {(number == i).mean():.1%}" for i, name in enumerate(run.classes.names)]


def test_what_is_no_classifier_and_no_segmenter(tmp_path):
    path = tmp_path / "run"
    Run.create(path, {"task": "diffusion"})
    for arguments in (("export", path, "--onnx"), ("show", path, PAGE_PICTURE)):
        code, _, err = gspn_command(*arguments)
        told = " ".join(err.split())
        assert code != 0 and "run of diffusion, expected classification or segmentation" in told, told


def test_an_evaluation_of_another_task_is_not_put_on_the_card(run, masked_run, tmp_path):
    figures = {
        run: {"split": "test", "images": 3, "top1": 0.5},
        masked_run.path: {"split": "val", "images": 3, "miou": 0.5},
    }
    for path, told in ((run, "no top-1 accuracy.*classification"), (masked_run.path, "no mean IoU.*segmentation")):
        (other,) = figures.keys() - {path}
        file = tmp_path / "evaluation.json"
        file.write_text(json.dumps(figures[other]))
        code, _, err = gspn_command("export", path, "--hub", "--evaluation", file, "--out", tmp_path / "saved")
        assert code == 2 and re.search(told, " ".join(err.split())) and not (tmp_path / "saved").exists()


@pytest.mark.slow
def test_a_fixed_size_in_half_precision_elsewhere(run, tmp_path):
    file = tmp_path / "half.onnx"
    code, out, err = gspn_command(
        "export", run, "--onnx", "--size", "9x6", "--precision", "fp16", "--opset", 18, "--no-check", "--out", file
    )
    assert code == 0, err
    assert "not checked" in out
    (given,) = onnxruntime.InferenceSession(file).get_inputs()
    assert given.shape == ["batch", 3, 9, 6] and given.type == "tensor(float16)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--onnx.*--aoti"),
        (("--onnx", "--aoti"), "--onnx.*--aoti"),
        (("--aoti", "--opset", 18), "--opset.*--onnx"),
        (("--onnx", "--opset", 11), "opset.*18.*11"),
        (("--onnx", "--precision", "int4"), "precision.*'int4'"),
        (("--onnx", "--size", "0x4"), "--size"),
        (("--onnx", "--out", "/dev/null/model.onnx"), "/dev/null: it is a file"),
        (("--onnx", "--checkpoint", "worst"), "checkpoint 'worst'"),
        (("--aoti", "--out", "model.so"), r"\.pt2.*model\.so"),
    ],
)
def test_bad_options(run, arguments, message):
    code, _, err = gspn_command("export", run, *arguments, "--overwrite")
    assert code == 2 and re.search(message, err) and "Traceback" not in err


def test_no_run_no_extra_no_place(run, tmp_path, monkeypatch):
    code, _, err = gspn_command("export", tmp_path, "--onnx")
    assert code == 2 and str(tmp_path) in err and "no run" in err
    code, _, err = gspn_command("export", run, "--onnx", "--out", "/proc/model.onnx", "--no-check")
    assert code == 2 and "/proc" in err
    monkeypatch.setitem(sys.modules, "onnx", None)
    code, _, err = gspn_command("export", run, "--onnx", "--overwrite")
    assert code == 2 and 'pip install "gspn[onnx]"' in err


@pytest.mark.parametrize("snippet", SNIPPETS[2::2], ids=["module", "compile"])
def test_the_page_s_other_snippets(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet.replace("dynamic=True", 'dynamic=True, backend="aot_eager"'), "docs/export.md", "exec"), {})
