"""gspn: the Generalized Spatial Propagation Network, a two-dimensional replacement for self-attention on images whose
cost is linear in the number of pixels.

Public names, listed in ``__init__.pyi``, are loaded when they are first used; importing gspn imports nothing optional.
It makes the operators known to torch, before or after torch is imported, which programs need that were exported with
them.
"""

import lazy_loader

from gspn.registration import register as _register

__version__ = "0.1.0"

__getattr__, _names, _ = lazy_loader.attach_stub(__name__, __file__)

# What `from gspn import *` gives: the names that need no extra.
__all__ = [
    "DIRECTIONS",
    "GSPN2d",
    "__version__",
    "available_backends",
    "create_model",
    "create_segmenter",
    "export_aoti",
    "export_onnx",
    "export_program",
    "gated_scan",
    "line_scan",
    "list_models",
    "load_released",
    "normalize_weights",
    "propagate",
    "register_timm",
]

_register()


def __dir__() -> list[str]:
    return [*_names(), "__version__"]
