"""The README's Python snippets run, word for word."""

import re
from pathlib import Path

import pytest
from stable_diffusion import tiny_sd

README = (Path(__file__).parent.parent / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


NAMES = ["layer", "backbone", "operators", "generator", "swap"]


def test_there_are_five():
    assert len(SNIPPETS) == len(NAMES)


@pytest.mark.parametrize(("code", "name"), list(zip(SNIPPETS, NAMES, strict=True)), ids=NAMES)
def test_snippet(code, name):
    given = {"pipe": tiny_sd()} if name == "swap" else {}  # which readers have
    exec(compile(code, "README.md", "exec"), given)
