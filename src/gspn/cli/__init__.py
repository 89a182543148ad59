"""The `gspn` command. What its parts share is in app.py; classifiers are classify.py's, generators generate.py's and
Stable Diffusion is distill.py's."""

try:
    import gspn.train  # noqa: F401  # says which packages of the extra are missing
except ImportError as error:
    raise SystemExit(f"gspn: {error}") from None

from gspn.cli import classify, distill, generate  # noqa: F401  # they add their commands
from gspn.cli.app import app, main

__all__ = ["app", "main"]
