"""The `gspn` command. What its parts share is in app.py; classifiers are classify.py's, generators generate.py's."""

from gspn.cli import classify, generate  # noqa: F401  # after app.py, which says what is not installed; they add to it
from gspn.cli.app import app, main

__all__ = ["app", "main"]
