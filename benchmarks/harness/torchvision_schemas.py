"""timm imports torchvision, whose published Linux build is for CUDA. With a CPU torch its operators do not load, and it
needs their schemas to be imported, because it has fake rules for them.
"""

import torch

NEEDED = ("nms", "qnms")
_library = []  # what it defines lives as long as it does


def define() -> None:
    """Defines the schemas if torchvision is there and does not load without them. Nothing computes these operators."""
    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError:
        pass
    except RuntimeError:
        _library.append(torch.library.Library("torchvision", "FRAGMENT"))
        for name in NEEDED:
            _library[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
