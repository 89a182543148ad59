"""The classification backbones: gspn_tiny, gspn_small, gspn_base of the GSPN paper; gspn_micro and gspn_mobile, which
are ours, for small images.

The layout is Swin's: a convolutional stem, then levels of GSPN blocks. Between levels a strided convolution halves the
map and doubles the width. Images may have any size, and there is no positional embedding. The methods have timm's names
(forward_features, forward_intermediates, reset_classifier and so on).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self, overload

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from gspn import weights
from gspn.layers import BLOCKS, LayerNorm2d, StridedConv2d, init_weights
from gspn.names import check_arguments, unknown
from gspn.ops import whole_number, whole_numbers
from gspn.pretrained import OnMetaError, Pretrained, load_weights, read

_SIZES: dict[str, Callable[[], dict]] = {}
_EVERYWHERE = {"num_classes": 1000, "in_chans": 3, "activation": "silu", "alignment": "aligned"}  # in every config


@contextmanager
def _statistics_kept(norms: list[_BatchNorm]) -> Iterator[None]:
    before = [(norm, norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum, count in before:
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)


def _counting_once(block: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    """For gradient checkpointing: a block's second forward pass does not change batch norm's running statistics."""
    norms = [m for m in block.modules() if isinstance(m, _BatchNorm) and m.num_batches_tracked is not None]
    return nullcontext(), _statistics_kept(norms)


class Level(nn.Module):
    """Blocks of one width, preceded by ``downsample``, which is None in the first level."""

    def __init__(
        self, blocks: list[nn.Module], in_channels: int | None, channels: int, norm: type[nn.Module] = LayerNorm2d
    ):
        super().__init__()
        self.downsample = None
        if in_channels is not None:
            self.downsample = nn.Sequential(StridedConv2d(in_channels, channels), norm(channels))
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        if self.downsample is not None:
            x = self.downsample(x)
        compiled = torch.compiler.is_compiling()  # refuses a context_fn, and counts a batch once anyway
        for block in self.blocks:
            if self.grad_checkpointing and self.training and torch.is_grad_enabled():
                once = {} if compiled else {"context_fn": partial(_counting_once, block)}
                x = checkpoint(block, x, use_reentrant=False, **once)
            else:
                x = block(x)
        return x


@torch.fx.wrap  # torch.fx.symbolic_trace cannot follow it
def check_images(x: Tensor, in_chans: int, alignment: str) -> Tensor:
    if x.ndim != 4 or x.shape[1] != in_chans or x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f"the model expects images (B,{in_chans},H,W) with H, W >= 1, got {tuple(x.shape)}")
    if alignment == "released" and x.shape[2] != x.shape[3]:
        raise ValueError(
            f'alignment="released" takes square images, got {x.shape[2]}x{x.shape[3]}; "aligned" takes any size'
        )
    return x


class Backbone(Pretrained, nn.Module):
    """A GSPN backbone with a classification head.

    Args:
        num_classes: classes of the head; 0 for no head (the output is then the pooled features).
        in_chans: channels of the image.
        depths: number of blocks of each level.
        width: channels of the first level, doubled by each next one.
        proxy_dim, groups, scan_dim, skip, merger, center, backend: those of :class:`gspn.GSPN2d`, in every block.
        global_levels: the levels (from 0) in which block i scans globally if i < 7 or (i + 1) % 7 == 0.
        segment: lines between resets in all other blocks.
        stem_stride: 1, 2 or 4.
        global_pool: "avg", or "" for no pooling: the head then classifies every pixel of the last map.
        block: "paper" (:class:`gspn.layers.GSPNBlock`) or "inverted" (:class:`gspn.layers.InvertedBlock`). With
            "inverted" all norms outside the blocks are batch norms.
        expansion: that of the block. mlp_ratio, activation: those of the block "paper".
        drop_path_rate: grows linearly from 0 in the first block.
        drop_rate: dropout before the head.
        alignment: that of :class:`gspn.GSPN2d`, in every block. With "released", images have to be square, and the
            global blocks scan in segments as long as the level's map at 224x224 pixels.

    Shape: images (B,in_chans,H,W), any H, W >= 1, to logits (B,num_classes); without pooling
    (B,num_classes,H/r,W/r), rounded up, where r is the last level's reduction.

    State dict (frozen): ``stem``, ``levels.I.downsample`` (except I = 0), ``levels.I.blocks.J``, ``norm``, ``head``;
    the same keys and shapes in both alignments.

    Attributes: ``config`` (set by :func:`create_model`, which makes the same model from it again),
    ``num_classes``, ``num_features``, ``feature_info`` (channels, reduction and module of every level), ``levels``,
    ``head``.
    """

    _saved_as = "Backbone"
    _import_as = "gspn.models.Backbone"

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        *,
        depths: Sequence[int],
        width: int,
        proxy_dim: int | None,
        global_levels: Sequence[int],
        segment: int | None = 2,
        stem_stride: int = 4,
        drop_path_rate: float = 0.0,
        block: str = "paper",
        expansion: float = 1.5,
        mlp_ratio: float = 4.0,
        activation: str | None = "silu",
        groups: int | None = None,
        scan_dim: int | None = None,
        skip: bool = True,
        merger: str = "learned",
        center: bool = False,
        alignment: str = "aligned",
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        backend: str | None = None,
    ):
        super().__init__()
        in_chans, width = whole_number("in_chans", in_chans), whole_number("width", width)
        depths, global_levels = whole_numbers("depths", depths), whole_numbers("global_levels", global_levels)
        stem_stride = whole_number("stem_stride", stem_stride)
        if stem_stride not in (1, 2, 4):
            raise ValueError(f"stem_stride has to be 1, 2 or 4, got {stem_stride}")
        if in_chans < 1 or not depths or min(depths) < 1 or width < 2:
            raise ValueError(
                "expected in_chans >= 1, depths >= 1 and width >= 2, got "
                f"in_chans={in_chans}, depths={depths}, width={width}"
            )
        if not set(global_levels) <= set(range(len(depths))):
            raise ValueError(f"global_levels has to name levels below {len(depths)}, got {global_levels}")
        if block not in tuple(BLOCKS):  # of anything, also of what has no hash
            raise ValueError(f'block has to be "paper" or "inverted", got {block!r}')
        options = {} if block == "inverted" else {"mlp_ratio": mlp_ratio, "activation": activation}
        fixed = {"mlp_ratio": (mlp_ratio, 4.0), "activation": (activation, "silu"), "alignment": (alignment, "aligned")}
        for name, (given, only) in fixed.items():
            if block == "inverted" and given != only:
                raise ValueError(f'{name} is for block="paper"; with "inverted" expected {only!r}, got {given!r}')
        if not 0 <= drop_rate < 1:
            raise ValueError(f"drop_rate has to be at least 0 and below 1, got {drop_rate}")
        self.in_chans, self.depths, self.alignment, self.drop_rate = in_chans, depths, alignment, drop_rate
        norm = nn.BatchNorm2d if block == "inverted" else LayerNorm2d
        first, second = {1: (1, 1), 2: (1, 2), 4: (2, 2)}[stem_stride]
        self.stem = nn.Sequential(
            StridedConv2d(in_chans, width // 2, first),
            norm(width // 2),
            nn.GELU(),
            StridedConv2d(width // 2, width, second),
            norm(width),
        )
        rates = (drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths)))
        levels = []
        for i, depth in enumerate(depths):
            channels = width * 2**i
            whole = 224 // (stem_stride * 2**i) if alignment == "released" else None
            blocks = [
                BLOCKS[block](
                    channels,
                    expansion=expansion,
                    drop_path=next(rates),
                    proxy_dim=proxy_dim,
                    groups=groups,
                    scan_dim=scan_dim,
                    segment=whole if i in global_levels and (j < 7 or (j + 1) % 7 == 0) else segment,
                    skip=skip,
                    merger=merger,
                    center=center,
                    alignment=alignment,
                    backend=backend,
                    **options,
                )
                for j in range(depth)
            ]
            levels.append(Level(blocks, width * 2 ** (i - 1) if i else None, channels, norm))
        self.levels = nn.ModuleList(levels)
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": width * 2**i, "reduction": stem_stride * 2**i, "module": f"levels.{i}"}
            for i in range(len(depths))
        ]
        self.num_features = self.head_hidden_size = width * 2 ** (len(depths) - 1)
        self.norm = norm(self.num_features)
        self.apply(init_weights)
        self.config: dict[str, Any] = {}
        self.reset_classifier(num_classes, global_pool)

    @classmethod
    def from_name(cls, name: str, **kwargs: Any) -> Self:
        """As :func:`create_model`, but returns an instance of this class."""
        arguments = _EVERYWHERE | size_of(name) | kwargs
        check_arguments(Backbone.__init__, kwargs)
        model = cls(**arguments)
        model.config = {"name": name} | {key: plain(value) for key, value in arguments.items()}
        return model

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    if TYPE_CHECKING:  # nn.Module's is typed as Any

        def __call__(self, x: Tensor) -> Tensor: ...

    def forward_features(self, x: Tensor) -> Tensor:
        """The last level's map, normalised: (B,num_features,H/r,W/r)."""
        x = self._enter(x)
        for level in self.levels:
            x = level(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Average pooling, dropout and the head; with ``pre_logits`` no head: (B,num_features)."""
        pooled = self.global_pool == "avg"
        x = F.dropout(x.mean((-2, -1)) if pooled else x, self.drop_rate, self.training)
        if pre_logits:
            return x
        return self.head(x) if pooled else self.head(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    @overload
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: Literal[False] = False,
    ) -> tuple[Tensor, list[Tensor]]: ...

    @overload
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        *,
        intermediates_only: Literal[True],
    ) -> list[Tensor]: ...

    @overload
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]: ...

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps of several levels (the feature pyramid), as timm returns them.

        Args:
            x: (B,in_chans,H,W).
            indices: levels, or the number of last levels; None is all.
            norm: applies the final norm to the last level's map in the list.
            stop_early: stops after the last of ``indices``.
            output_fmt: "NCHW" or "NHWC".
            intermediates_only: returns only the list.

        Returns:
            the list of maps, or (final map, list); the final map is normalised unless the pass stopped early.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f'output_fmt has to be "NCHW" or "NHWC", got {output_fmt!r}')
        count = len(self.levels)
        listed = range(count) if indices is None else range(-indices, 0) if isinstance(indices, int) else indices
        listed = whole_numbers("indices", listed)
        if not all(-count <= i < count for i in listed) or not listed:
            raise ValueError(f"indices has to name some of the {count} levels, got {indices}")
        wanted = {i % count for i in listed}
        last = max(wanted) if stop_early else count - 1
        x, maps = self._enter(x), []
        for i, level in enumerate(self.levels):
            if i > last:
                break
            x = level(x)
            if i in wanted:
                chosen = self.norm(x) if norm and i == count - 1 else x
                maps.append(chosen if output_fmt == "NCHW" else chosen.permute(0, 2, 3, 1))
        if intermediates_only:
            return maps
        return (self.norm(x) if last == count - 1 else x), maps

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Makes a new head for ``num_classes`` classes (0: no head). ``global_pool``: "avg", or "" for no pooling."""
        num_classes = whole_number("num_classes", num_classes)
        if num_classes < 0:
            raise ValueError(f"num_classes has to be at least 0, got {num_classes}")
        global_pool = self.global_pool if global_pool is None else global_pool
        if global_pool not in ("avg", ""):
            raise ValueError(f'global_pool has to be "avg" or "", got {global_pool!r}')
        self.num_classes: int = num_classes
        self.global_pool: str = global_pool
        where = next(self.parameters())
        like = {"device": where.device, "dtype": where.dtype}
        self.head = nn.Linear(self.num_features, num_classes, **like) if num_classes else nn.Identity()
        self.head.apply(init_weights).train(self.training)
        if self.config:
            self.config |= {"num_classes": num_classes, "global_pool": self.global_pool}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades time for memory in training: a block's activations are computed again in the backward pass."""
        for level in self.levels:
            level.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Parameters that a trainer should not decay, besides the 1-D ones: none (the mergers and GRN are 1-D)."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that sort parameters by depth, for layer-wise learning rates."""
        if coarse:
            return {"stem": r"^stem", "blocks": r"^levels\.(\d+)"}
        return {
            "stem": r"^stem",
            "blocks": [
                (r"^levels\.(\d+)\.downsample", (0,)),
                (r"^levels\.(\d+)\.blocks\.(\d+)", None),
                (r"^norm", (99999,)),
            ],
        }

    def _arguments(self) -> dict[str, Any]:
        return arguments_of(self)

    @classmethod
    def _made_from(cls, arguments: dict[str, Any]) -> Self:
        return cls.from_name(**arguments)

    def _enter(self, x: Tensor) -> Tensor:
        x = check_images(x, self.in_chans, self.alignment)
        # channels_last from here on: Linear, LN and the scan's kernels are all fast on adjacent channels
        return self.stem(x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2))


def plain(value: Any) -> Any:
    """An argument as JSON can hold it: a list for a tuple, Python's own numbers for those of numpy."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return [plain(each) for each in value] if isinstance(value, list | tuple | range) else value


def arguments_of(model: Any) -> dict[str, Any]:
    """The ``config`` of a backbone or a segmenter, without the backend, which belongs to the machine. Raises ValueError
    where there is none."""
    if not model.config:
        raise ValueError(
            f"this {type(model).__name__} has no config, so nothing could make it again: only models of "
            "gspn.create_model or gspn.create_segmenter that were not pruned can be saved"
        )
    return {name: value for name, value in model.config.items() if name != "backend"}


def create_model(name: str, *, pretrained: bool | str = False, **kwargs: Any) -> Backbone:
    """A backbone by name, with random weights, or with trained ones.

    Args:
        name: one of :func:`list_models`.
        pretrained: False, or the name of weights in the package gspn-weights, such as "digits". The model is then in
            evaluation mode and float32.
        kwargs: ``num_classes=1000``, ``in_chans=3`` and every other argument of :class:`Backbone`. With trained weights
            the defaults are the arguments with which they were trained; another ``num_classes`` makes a new head.

    Raises ValueError for an unknown name, or for arguments that do not fit the weights; TypeError for an unknown
    argument; ImportError if gspn-weights is not installed; RuntimeError for ``pretrained=True``, as no model has
    weights of its own, and for trained weights under torch.device("meta").

    >>> import gspn
    >>> model = gspn.create_model("gspn_micro", num_classes=10, in_chans=1, stem_stride=1)
    >>> twin = gspn.create_model(**model.config)
    """
    size_of(name)
    if isinstance(pretrained, str):
        return _with_weights(name, pretrained, kwargs)
    if pretrained:
        raise RuntimeError(no_weights(name))
    return Backbone.from_name(name, **kwargs)


def _with_weights(name, pretrained, kwargs):
    config, tensors = read(weights.folder(pretrained), Backbone._saved_as)
    trained = config["model"]
    if trained["name"] != name:
        raise ValueError(f"the weights {pretrained!r} are those of a {trained['name']}, expected a {name}")
    model = Backbone.from_name(**{**trained, **kwargs})
    if model.num_classes != trained["num_classes"]:
        own = {f"head.{key}": value for key, value in model.head.state_dict().items()}
        tensors = {key: value for key, value in tensors.items() if not key.startswith("head.")} | own
    try:
        load_weights(model, tensors)
    except OnMetaError:
        raise
    except RuntimeError as error:
        raise ValueError(f"the weights {pretrained!r} do not fit these arguments {kwargs}: {error}") from error
    return model


def no_weights(name: str) -> str:
    """The message for ``pretrained=True``."""
    return (
        f'there are no pretrained weights of {name} to download yet. Instead, pretrained="NAME" takes weights of the '
        f"package gspn-weights ({', '.join(weights.names()) or 'not installed'}), "
        f'gspn.load_released("FILE.pth", "{name}") reads a file of the paper\'s authors, gspn.load_run("RUN") reads a '
        "run of gspn train, and pretrained=False gives random weights to train"
    )


def list_models() -> list[str]:
    """The names that :func:`create_model` knows.

    >>> import gspn
    >>> gspn.list_models()
    ['gspn_base', 'gspn_micro', 'gspn_mobile', 'gspn_small', 'gspn_tiny']
    """
    return sorted(_SIZES)


def register_model(function: Callable[[], dict]) -> Callable[[], dict]:
    """Registers a size under the name of its function, which returns arguments of :class:`Backbone`."""
    _SIZES[function.__name__] = function
    return function


def size_of(name: str) -> dict:
    """The arguments of :class:`Backbone` for the size ``name``. Raises ValueError for an unknown name."""
    if name not in _SIZES:
        raise ValueError(unknown("model", name, list_models()))
    return _SIZES[name]()


@register_model
def gspn_micro() -> dict:
    """For small images: three levels, all global, under 1M parameters."""
    return dict(depths=(2, 2, 2), width=32, proxy_dim=8, global_levels=(0, 1, 2), stem_stride=2)


@register_model
def gspn_mobile() -> dict:
    """For small photos: inverted residuals with compact scans, three levels, all global, 0.7M parameters."""
    return dict(
        depths=(2, 2, 2), width=48, proxy_dim=8, global_levels=(0, 1, 2), stem_stride=2, block="inverted", expansion=2.0
    ) | dict(scan_dim=16, center=True)


@register_model
def gspn_tiny() -> dict:
    return dict(depths=(2, 2, 7, 2), width=96, proxy_dim=8, global_levels=(2, 3), drop_path_rate=0.2)


@register_model
def gspn_small() -> dict:
    return dict(depths=(5, 5, 10, 2), width=108, proxy_dim=16, global_levels=(3,), drop_path_rate=0.4)


@register_model
def gspn_base() -> dict:
    return dict(depths=(4, 4, 15, 4), width=120, proxy_dim=8, global_levels=(2, 3), drop_path_rate=0.5)
