"""gspn: the Generalized Spatial Propagation Network, a two-dimensional replacement for self-attention on images whose
cost is linear in the number of pixels.

Public names are loaded when they are first used; importing gspn imports nothing optional and sets nothing. It makes the
operators known to torch, before or after torch is imported, which programs need that were exported with them.
"""

import importlib

from gspn.registration import register as _register

__version__ = "0.1.0"

_HOMES = {
    "gspn.ops": ("DIRECTIONS", "available_backends", "gated_scan", "line_scan", "normalize_weights", "propagate"),
    "gspn.layers": ("GSPN2d",),
    "gspn.models": ("create_model", "list_models", "load_released", "register_timm"),
    "gspn.export": ("export_aoti", "export_onnx", "export_program"),
}
# These need the extra `diffusion`, so `from gspn import *` leaves them out.
_OF_DIFFUSERS = {
    "gspn.models.generator": ("GSPNTransformer2DModel", "create_generator"),
    "gspn.models.highres": ("HighResPipeline",),
    "gspn.models.pipeline": ("GSPNPipeline",),
    "gspn.models.swap": ("GSPNAttention", "load_swap", "restore", "swap"),
}
_MODULES = ("export", "layers", "models", "ops", "train")
_HOME_OF = {name: home for home, names in (_HOMES | _OF_DIFFUSERS).items() for name in names}

__all__ = [*(name for names in _HOMES.values() for name in names), "__version__"]

_register()


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f"gspn.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'gspn' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME_OF) | set(__all__))
