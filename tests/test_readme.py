"""The README's Python snippets run, word for word."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_there_are_four():
    assert len(SNIPPETS) == 4


@pytest.mark.parametrize("code", SNIPPETS, ids=["layer", "backbone", "operators", "generator"])
def test_snippet(code):
    exec(compile(code, "README.md", "exec"), {})
