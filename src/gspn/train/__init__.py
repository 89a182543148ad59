"""Training: what can be told (`options`), what DATA means (`data`), images to batches (`images`, `recipe`, `loader`),
the loop (`loop`, `optim`, `state`), the classification task (`classify`, `finetune`), what one does with a trained
classifier (`evaluate`, `pictures`), the run folder (`checkpoint`), from there back to Python (`runs`).

Needs the extra `train`; importing this package without it raises ImportError with the command that installs it.
"""

from importlib.util import find_spec

_needed = {"accelerate", "datasets", "PIL", "matplotlib", "rich", "sklearn", "typer", "yaml"}
_missing = sorted(name for name in _needed if find_spec(name) is None)
if _missing:
    raise ImportError(
        f'training and the gspn command need {", ".join(_missing)}: install with pip install "gspn[train]"'
    )
