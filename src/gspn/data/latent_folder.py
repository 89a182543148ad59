"""Recognises folders of latents, which `gspn encode` makes, also without diffusers."""

import json
from pathlib import Path

from gspn.data.images import DataError
from gspn.places import expanded

KIND = "latents"  # in its config.json


def is_latents(path: str | Path) -> bool:
    """Whether `gspn encode` made or began the folder."""
    try:
        config = json.loads((expanded(path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("kind") == KIND


def refuse_latents(where: str | Path) -> None:
    """Raises DataError for a folder of latents, where images are expected."""
    if is_latents(where):
        raise DataError(
            f"{where} holds latents that gspn encode made, which only gspn train-diffusion takes; expected the images"
        )
