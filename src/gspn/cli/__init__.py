"""The `gspn` command. What its parts share is in app.py; classifiers are classify.py's, generators generate.py's and
Stable Diffusion is distill.py's."""

from gspn.extras import need

try:
    need("train")
except ImportError as error:
    raise SystemExit(f"gspn: {error}") from None

from gspn.cli import classify, distill, generate  # noqa: F401  # they add their commands
from gspn.cli.app import app, main

__all__ = ["app", "main"]
