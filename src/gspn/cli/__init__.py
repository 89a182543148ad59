"""The `gspn` command. What its parts share is in app.py; classifiers are classify.py's, generators generate.py's."""

from gspn.cli.app import app, main
from gspn.cli import classify, generate  # noqa: F401, I001  # after app.py, which says what is not installed; they add to it

__all__ = ["app", "main"]
