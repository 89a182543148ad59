"""Influence maps: which pixels of the image one pixel of a block's output depends on."""

import torch
from torch import Tensor

from gspn.layers import BLOCKS
from gspn.models.backbone import Backbone
from gspn.models.modes import evaluating
from gspn.models.segmenter import Segmenter


@torch.no_grad()
def context_maps(
    model: Backbone | Segmenter, image: Tensor, place: tuple[int, int], block: int | str = -1, narrowest: bool = False
) -> dict:
    """The influence maps of one pixel in one block of a backbone or a segmenter.

    Args:
        image: (in_chans,H,W), preprocessed.
        place: the pixel's (row, column) in the image.
        block: its number over all levels (negative: from the end) or its name.
        narrowest: each direction's map is that of the channel with the narrowest context, not the mean over channels.

    Returns:
        "image size": (H,W); "block": the block's name; "place": the pixel on the block's map; "right", "down", "left",
        "up", "merged": maps (H',W'), as in :class:`gspn.layers.Context`.
    """
    height, width = image.shape[-2:]
    if not (0 <= place[0] < height and 0 <= place[1] < width):
        raise ValueError(f"the pixel {tuple(place)} is not on the {height}x{width} image")
    blocks = [(name, m) for name, m in model.named_modules() if isinstance(m, tuple(BLOCKS.values()))]
    if isinstance(block, str):
        names = [name for name, _ in blocks]
        if block not in names:
            raise ValueError(f"there is no block {block!r}; there are {', '.join(names)}")
        block = names.index(block)
    if not -len(blocks) <= block < len(blocks):
        raise ValueError(f"block has to be from {-len(blocks)} to {len(blocks) - 1}, got {block}")
    name, chosen = blocks[block]
    if narrowest and chosen.gspn.groups == 1:
        raise ValueError(f"all channels of {name} share their weights, so none has a context of its own")
    seen: list[Tensor] = []
    handle = chosen.gspn.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        with evaluating(model):
            model(image[None])
    finally:
        handle.remove()
    rows, columns = seen[0].shape[-2:]
    row, column = place[0] * rows // height, place[1] * columns // width
    context = chosen.gspn.context(seen[0], row, column)
    directions = context.narrowest if narrowest else context.directions
    maps = dict(zip(chosen.gspn.directions, directions[0].unbind(0), strict=True))
    return {"image size": (height, width), "block": name, "place": (row, column), **maps, "merged": context.merged[0]}
