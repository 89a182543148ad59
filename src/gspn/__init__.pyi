"""Every public name: `__init__.py` reads its lazy imports from here, and type checkers read the types."""

from . import export as export
from . import layers as layers
from . import models as models
from . import ops as ops
from . import train as train
from .export import export_aoti, export_onnx, export_program
from .layers import GSPN2d
from .models import create_model, create_segmenter, list_models, load_released, register_timm
from .models.generator import GSPNTransformer2DModel as GSPNTransformer2DModel
from .models.generator import create_generator as create_generator
from .models.gspn_dit import GSPNDiTTransformer2DModel as GSPNDiTTransformer2DModel
from .models.pipeline import GSPNPipeline as GSPNPipeline
from .ops import DIRECTIONS, available_backends, gated_scan, line_scan, normalize_weights, propagate
from .runs import load_run as load_run
from .stable_diffusion.adapting import adapt as adapt
from .stable_diffusion.highres import HighResPipeline as HighResPipeline
from .stable_diffusion.swap import GSPNAttention as GSPNAttention
from .stable_diffusion.swap import load_swap as load_swap
from .stable_diffusion.swap import restore as restore
from .stable_diffusion.swap import swap as swap

__version__: str

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
