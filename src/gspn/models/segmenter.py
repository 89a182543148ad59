"""Semantic segmentation: a backbone's feature pyramid, fused at its finest level, where GSPN mixes it once more.

Attention cannot work there: at 1/4 of a megapixel image it would compare 62,500 pixels with each other.
"""

from typing import TYPE_CHECKING, Any, Self, cast

import torch.nn.functional as F
from torch import Tensor, nn

from gspn.layers import GSPNBlock, LayerNorm2d, Pointwise, init_weights
from gspn.models.backbone import Backbone, arguments_of, check_images, plain, size_of
from gspn.names import check_arguments
from gspn.ops import whole_number
from gspn.pretrained import Pretrained

_BLOCK = ("groups", "scan_dim", "skip", "merger", "center", "activation", "backend", "proxy_dim")  # as in the backbone


# arguments of a Backbone that concern its own head alone: their defaults, and what to do instead
OF_CLASSIFIERS = {"drop_rate": (0.0, "use decoder_drop_rate"), "global_pool": ("avg", "leave it out")}


class Segmenter(Pretrained, nn.Module):
    """A backbone with a light decoder: one logit for each class and pixel of the image::

        p = sum over levels i of upsampled(lateral[i] LN(map[i]))          at the finest level, in ``width`` channels
        logits = upsampled(classifier LN(blocks(p)))

    The blocks are the paper's (:class:`gspn.layers.GSPNBlock`), all global. Nothing depends on a size: there is no
    positional embedding. In training a backbone with ``block="inverted"`` has batch norm; else nothing depends on the
    batch. Maps are enlarged bilinearly by the exact factor between their level and the finest one, and cut to its size
    at the bottom and at the right. So the pixels of a map lie at the same places of the image whatever its height and
    width are, and no image is padded.

    Args:
        backbone: its head is dropped.
        num_classes: K >= 1.
        width: channels of the decoder; None is twice those of the first level.
        depth: the number of its blocks.
        drop_rate: dropout before the classifier.

    Shape: images (B,in_chans,H,W), any H, W >= 1, to logits (B,K,H,W).

    State dict (frozen): ``backbone.*`` with the names of :class:`Backbone` (without ``head`` and ``norm``),
    ``norms.I``, ``laterals.I.weight`` (width,C,1,1), ``blocks.J``, ``norm``, ``classifier.weight`` (K,width) and
    ``classifier.bias``.

    Attributes: ``config`` (:func:`create_segmenter` makes the same model from it again), ``num_classes``, ``stride``
    (pixels of the image for one of the finest map), ``reduction`` (for one of the coarsest).
    """

    _saved_as = "Segmenter"
    _import_as = "gspn.models.Segmenter"

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        width: int | None = None,
        depth: int = 1,
        drop_rate: float = 0.0,
        **block: Any,
    ):
        super().__init__()
        num_classes, depth = whole_number("num_classes", num_classes), whole_number("depth", depth)
        width = None if width is None else whole_number("width", width)
        if num_classes < 1 or depth < 0 or (width is not None and width < 2) or not 0 <= drop_rate < 1:
            raise ValueError(
                "expected num_classes >= 1, a decoder of depth >= 0 and width >= 2, and 0 <= drop_rate < 1, got "
                f"num_classes={num_classes}, depth={depth}, width={width}, drop_rate={drop_rate}"
            )
        if backbone.alignment == "released":
            raise ValueError('alignment="released" takes square images only; a segmenter needs "aligned"')
        backbone.reset_classifier(0)
        backbone.norm = nn.Identity()  # that of the last level is among `norms`
        self.backbone, self.num_classes, self.drop_rate = backbone, num_classes, drop_rate
        channels = [level["num_chs"] for level in backbone.feature_info]
        self.stride, self.reduction = (backbone.feature_info[i]["reduction"] for i in (0, -1))
        width = 2 * channels[0] if width is None else width
        self.norms = nn.ModuleList(LayerNorm2d(count) for count in channels)
        self.laterals = nn.ModuleList(Pointwise(count, width) for count in channels)
        self.blocks = nn.ModuleList(GSPNBlock(width, mlp_ratio=2.0, **block) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, num_classes)
        for part in (self.blocks, self.classifier):
            part.apply(init_weights)
        self.config: dict[str, Any] = {}

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Logits (B,K,H,W), or at another `size` (height, width), to which they are resized bilinearly."""
        return self.enlarge(self.coarse_logits(x), (x.shape[-2], x.shape[-1]), size)

    if TYPE_CHECKING:  # nn.Module's is typed as Any

        def __call__(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor: ...

    def coarse_logits(self, x: Tensor) -> Tensor:
        """Logits at the finest level: (B,K,H/stride,W/stride), rounded up."""
        x = check_images(x, self.backbone.in_chans, self.backbone.alignment)
        maps = self.backbone.forward_intermediates(x, intermediates_only=True)
        x = self._fused(maps)
        del maps  # the blocks need their memory
        for block in self.blocks:
            x = block(x)
        x = F.dropout(self.norm(x.permute(0, 2, 3, 1)), self.drop_rate, self.training)
        return self.classifier(x).permute(0, 3, 1, 2)

    def enlarge(self, logits: Tensor, image: tuple[int, int], size: tuple[int, int] | None = None) -> Tensor:
        """Coarse logits at the (height, width) of the `image` that they are of, then resized to `size`."""
        logits = _upsampled(logits, self.stride, image)
        if size in (None, image):
            return logits
        return F.interpolate(logits, size, mode="bilinear", align_corners=False)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """That of the backbone."""
        self.backbone.set_grad_checkpointing(enable)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """That of the backbone, for layer-wise learning rates; the decoder is above all of its layers."""
        stem, level = r"^backbone\.stem", r"^backbone\.levels\.(\d+)"
        if coarse:
            return {"stem": stem, "blocks": level}
        return {"stem": stem, "blocks": [(rf"{level}\.downsample", (0,)), (rf"{level}\.blocks\.(\d+)", None)]}

    def _arguments(self) -> dict[str, Any]:
        return arguments_of(self)

    @classmethod
    def _made_from(cls, arguments: dict[str, Any]) -> Self:
        return cast(Self, segmenter_from(**arguments))

    def _fused(self, maps: list[Tensor]) -> Tensor:
        finest = maps[0].shape[-2:]
        total = None
        for i, (each, norm, lateral) in enumerate(zip(maps, self.norms, self.laterals, strict=True)):
            own = _upsampled(lateral(norm(each)), 2**i, finest)
            total = own if total is None else total + own
        return total


def _upsampled(x: Tensor, factor: int, size: Any) -> Tensor:
    """The map enlarged by `factor` and cut to `size`."""
    if factor > 1:
        x = F.interpolate(x, scale_factor=float(factor), mode="bilinear", align_corners=False)
    return x[..., : size[0], : size[1]]


def segmenter_from(**arguments: Any) -> Segmenter:
    """The segmenter of a stored config. Earlier versions stored a classifier's arguments there, which do nothing."""
    return create_segmenter(**{name: value for name, value in arguments.items() if name not in OF_CLASSIFIERS})


def create_segmenter(
    name: str,
    *,
    num_classes: int,
    decoder_width: int | None = None,
    decoder_depth: int = 1,
    decoder_drop_rate: float = 0.0,
    **kwargs: Any,
) -> Segmenter:
    """A segmenter with a backbone by name, with random weights.

    Args:
        name: one of :func:`gspn.list_models`.
        num_classes: K.
        decoder_width, decoder_depth, decoder_drop_rate: ``width``, ``depth`` and ``drop_rate`` of :class:`Segmenter`.
        kwargs: ``in_chans=3`` and every other argument of :class:`gspn.models.Backbone` but those of a classifier's
            head, ``drop_rate`` and ``global_pool``. ``stem_stride`` is 4 here for gspn_micro and gspn_mobile too: the
            finest map has 1/4 of the image's height and width.

    Raises ValueError for an unknown name or arguments that do not fit, TypeError for an unknown argument or one of a
    classifier's head.

    >>> import gspn
    >>> model = gspn.create_segmenter("gspn_micro", num_classes=11)
    >>> twin = gspn.create_segmenter(**model.config)
    """
    size_of(name)  # an unknown name first
    check_arguments(create_segmenter, kwargs, Backbone.__init__)
    for argument, (default, advice) in OF_CLASSIFIERS.items():
        if kwargs.get(argument, default) != default:  # a config holds the default
            raise TypeError(f"a segmenter has no {argument}, which belongs to the head of a classifier: {advice}")
    backbone = Backbone.from_name(name, **{"stem_stride": 4, **kwargs, "num_classes": 0})
    block = {key: backbone.config[key] for key in _BLOCK if key in backbone.config}
    decoder = {"width": decoder_width, "depth": decoder_depth, "drop_rate": decoder_drop_rate}
    model = Segmenter(backbone, num_classes, **decoder, **block)
    model.config = {**backbone.config, "num_classes": model.num_classes}
    model.config |= {f"decoder_{key}": plain(value) for key, value in decoder.items()}
    return model
