"""The README's Python snippets run, word for word."""

import re
import shutil
from pathlib import Path

import pytest
from helpers.stable_diffusion import tiny_sd
from PIL import Image

README = (Path(__file__).parent.parent / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


NAMES = ["layer", "backbone", "operators", "run", "generator", "swap"]


def test_there_are_six():
    assert len(SNIPPETS) == len(NAMES)


@pytest.mark.parametrize(("code", "name"), list(zip(SNIPPETS, NAMES, strict=True)), ids=NAMES)
def test_snippet(code, name, digits_run, tmp_path, monkeypatch):
    given = {"pipe": tiny_sd()} if name == "swap" else {}  # which readers have
    shutil.copytree(digits_run[0].path, tmp_path / "runs" / "first")
    Image.new("RGB", (20, 30)).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), given)
    if name == "run":
        assert given["answer"].keys() == set("0123456789") and given["logits"].shape == (1, 10)
