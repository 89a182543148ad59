"""The optional packages: what an extra of the installation brings."""

from importlib.util import find_spec

PACKAGES = {
    "train": ("training and the gspn command", "accelerate datasets PIL matplotlib rich sklearn typer yaml".split()),
    "diffusion": ("generation", ["diffusers"]),
    "demo": ("the demo", ["gradio"]),
    "hub": ("model cards and the Hugging Face hub", ["huggingface_hub"]),
}


def need(extra: str) -> None:
    """Raises ImportError, with the command that installs it, unless the packages of an extra are there."""
    what, packages = PACKAGES[extra]
    missing = sorted(name for name in packages if find_spec(name) is None)
    if missing:
        raise ImportError(f'{_needs(what)} {", ".join(missing)}: install with pip install "gspn[{extra}]"')


def hint(error: ImportError) -> str | None:
    """What to tell the user about a package that is missing; None where no extra brings it."""
    package = (error.name or "").partition(".")[0]
    if "pip install" in str(error):
        return str(error)
    found = next((extra for extra, (_, packages) in PACKAGES.items() if package in packages), None)
    return found and f'{_needs(PACKAGES[found][0])} {package}: install with pip install "gspn[{found}]"'


def _needs(what):
    return f"{what} {'need' if ' and ' in what else 'needs'}"
