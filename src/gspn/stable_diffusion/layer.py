"""The layer that replaces a UNet's self-attention in a swap."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gspn.lattices import interleaved, sub_lattices
from gspn.layers import GSPN2d, average_over_lines
from gspn.ops import DIRECTIONS, check_backend, propagate, validate_segment, whole_number

FORMS = ("pure", "qkv")
_PROXY_SHARE = {"pure": 8, "qkv": 32}  # C is so many times the width of a proxy, as published


def usual_proxy_dim(form: str, channels: int) -> int:
    """S where none is asked for."""
    return max(1, channels // _PROXY_SHARE[form])


class GSPNAttention(nn.Module):
    """GSPN instead of a UNet's self-attention: all pixels of the feature map see each other at linear cost.

    Form "pure"::

        y = to_out(GSPN2d(x)),  S = C // 8, average=True

    Form "qkv"::

        y = to_out(sum over directions d of merger[d] * (output_gate[d] * h[d] + skip_gate[d] * v)),
        h[d] = line scan of input_gate[d] * v, with weights normalised from the logits, divided by the number of lines
        that it runs through before it resets,  v = x + to_v x,
        input_gate = input_proj input_proxy(x + to_k x) + input_bias,
        output_gate = output_proj output_proxy(x + to_q x) + output_bias,
        logits and skip_gate = weight_proj and skip_proj of weight_proxy(x), + weight_bias and skip_bias,  S = C // 32.

    The division keeps the output of a global scan from growing with the map, as attention's does not. Each of the three
    proxies has its own projection. The biases are not in the paper: with them a gate can be constant, which
    initialisation from an attention's weights needs; gate_bias=False leaves them out.

    Args:
        channels: C.
        form: "pure" or "qkv".
        segment: lines between resets of the scan, None is global.
        proxy_dim: S, at least 1.
        gate_bias: see above; the pure form has none.
        qkv_bias, out_bias, dropout: of to_q, to_k, to_v and of to_out, as the attention replaced has them.
        backend: as in :class:`gspn.GSPN2d`.

    Attributes:
        apart: (k, m), by default (1, 1): the layer runs on each of the k*m interleaved sub-lattices of the map, whose
            pixels lie k rows and m columns apart, see :func:`gspn.adapt`. It belongs to no state dict.

    Shape: (B,N,C) to (B,N,C), N = H*W in row-major order, in the input's dtype, or autocast's inside autocast.

    Raises ValueError if H and W are not given or H*W is not N, and for an attention mask or a text's embeddings.
    Source: arXiv 2501.12381, section 3.5 on text to image.

    State dict (frozen), D = 4 directions. Both: ``to_out.0`` (C,C). pure: ``gspn.*`` as in GSPN2d. qkv: ``to_q``,
    ``to_k``, ``to_v`` (C,C), ``weight_proxy.weight``, ``input_proxy.weight``, ``output_proxy.weight`` (S,C),
    ``weight_proj`` (D,3,C,S), ``input_proj``, ``output_proj``, ``skip_proj`` (D,C,S), ``merger`` (D,), ``weight_bias``
    (D,3,C), ``input_bias``, ``output_bias``, ``skip_bias`` (D,C).
    """

    apart: tuple[int, int] = (1, 1)  # of the class, so that layers pickled before it existed have it

    def __init__(
        self,
        channels: int,
        *,
        form: str = "qkv",
        segment: int | None = None,
        proxy_dim: int | None = None,
        gate_bias: bool = True,
        qkv_bias: bool = False,
        out_bias: bool = True,
        dropout: float = 0.0,
        backend: str | None = None,
    ):
        super().__init__()
        check_form(form)
        proxy_dim = usual_proxy_dim(form, channels) if proxy_dim is None else proxy_dim
        for name, value in {"channels": channels, "proxy_dim": proxy_dim}.items():
            if whole_number(name, value) < 1:
                raise ValueError(f"{name} has to be at least 1, got {value}")
        check_backend(backend)
        self.channels, self.form, self.proxy_dim, self.backend = channels, form, proxy_dim, backend
        self.segment, self.gate_bias = validate_segment(segment), gate_bias and form == "qkv"
        if form == "pure":
            self.gspn = GSPN2d(channels, proxy_dim=proxy_dim, segment=segment, average=True, backend=backend)
        else:
            self._build_qkv(len(DIRECTIONS), qkv_bias)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels, bias=out_bias), nn.Dropout(dropout)])
        self._processor = (None,)  # in a tuple: a processor that is a module must not become a submodule

    def _build_qkv(self, count, bias):
        c, s = self.channels, self.proxy_dim
        for name in ("to_q", "to_k", "to_v"):
            self.add_module(name, nn.Linear(c, c, bias=bias))
        for name in ("weight_proxy", "input_proxy", "output_proxy"):
            self.add_module(name, nn.Linear(c, s, bias=False))
        shapes = {"weight": (count, 3, c), "input": (count, c), "output": (count, c), "skip": (count, c)}
        for name, shape in shapes.items():
            self.register_parameter(f"{name}_proj", nn.Parameter(torch.empty(*shape, s)))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(shape)) if self.gate_bias else None)
        self.merger = nn.Parameter(torch.empty(count))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random weights: projections as torch starts a Linear, biases of the gates 0, the merger's scalars 1/4."""
        for module in self.modules():
            if module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()
        if self.form == "pure":
            return
        for name in ("weight", "input", "output", "skip"):
            nn.init.uniform_(getattr(self, f"{name}_proj"), -(self.proxy_dim**-0.5), self.proxy_dim**-0.5)
            if self.gate_bias:
                nn.init.zeros_(getattr(self, f"{name}_bias"))
        nn.init.constant_(self.merger, 1 / len(self.merger))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        map_size: tuple[int, int] | None = None,
        **cross_attention_kwargs: Any,
    ) -> Tensor:
        """The layer's output for `hidden_states` (B,N,C), the feature map's pixels, and `map_size` (H,W), which the
        transformer around the layer passes in a swapped UNet. The other arguments that diffusers passes to all
        attentions of a block concern cross-attention and are ignored."""
        self._check(hidden_states, encoder_hidden_states, attention_mask, map_size)
        kind = hidden_states.device.type
        if kind != "meta" and torch.is_autocast_enabled(kind) and hidden_states.dtype != torch.float64:
            hidden_states = hidden_states.to(torch.get_autocast_dtype(kind))  # as attention's q, k and v are there
        whole, apart = map_size, self.apart
        if apart != (1, 1):
            hidden_states = sub_lattices(hidden_states.unflatten(1, whole), apart)
            map_size, hidden_states = tuple(hidden_states.shape[1:3]), hidden_states.flatten(1, 2)
        as_map = lambda tokens: tokens.unflatten(1, map_size).permute(0, 3, 1, 2)  # noqa: E731
        y = self.gspn(as_map(hidden_states)) if self.form == "pure" else self._scan_qkv(hidden_states, as_map, map_size)
        y = y.permute(0, 2, 3, 1)
        y = (y if apart == (1, 1) else interleaved(y, apart)).flatten(1, 2)
        for module in self.to_out:
            y = module(y)
        return y

    if TYPE_CHECKING:  # nn.Module's is typed as Any

        def __call__(
            self,
            hidden_states: Tensor,
            encoder_hidden_states: None = None,
            attention_mask: None = None,
            *,
            map_size: tuple[int, int] | None = None,
            **cross_attention_kwargs: Any,
        ) -> Tensor: ...

    def _scan_qkv(self, x, as_map, size):
        proxies = [self.weight_proxy(x), self.input_proxy(x + self.to_k(x)), self.output_proxy(x + self.to_q(x))]
        if self.gate_bias:
            proxies.append(torch.ones_like(x[..., :1]))
        merger, s = self.merger.view(-1, 1, 1), self.proxy_dim

        def widened(name, index):
            """The projection of one proxy as a projection of all proxies, with zeros for the others."""
            projection, bias = getattr(self, f"{name}_proj"), getattr(self, f"{name}_bias")
            parts = [projection.new_zeros(*projection.shape[:-1], s)] * 3
            parts[index] = projection
            return torch.cat(parts if bias is None else [*parts, bias.unsqueeze(-1)], -1)

        return propagate(
            as_map(x + self.to_v(x)),
            as_map(torch.cat(proxies, -1)),
            widened("weight", 0),
            widened("input", 1),
            average_over_lines(widened("output", 2) * merger, DIRECTIONS, size, self.segment),
            (widened("skip", 0) * merger).sum(0),
            segment=self.segment,
            backend=self.backend,
        )

    def get_processor(self) -> Any:
        """The processor that the replaced attention gets when it is restored. diffusers counts a UNet's attentions by
        their processors, for IP-Adapter and others; the layer itself does not use it."""
        return self._processor[0]

    def set_processor(self, processor: Any) -> None:
        """See get_processor."""
        self._processor = (processor,)

    def _check(self, tokens, encoder_hidden_states, attention_mask, map_size):
        if tokens.ndim != 3 or tokens.shape[2] != self.channels:
            raise ValueError(f"GSPNAttention expects (B,N,{self.channels}), got {tuple(tokens.shape)}")
        if encoder_hidden_states is not None:
            raise ValueError("GSPNAttention replaces self-attention: it takes no encoder_hidden_states")
        if attention_mask is not None:
            raise ValueError("GSPNAttention cannot mask pixels: attention_mask has to be None")
        if map_size is None:
            raise ValueError(
                "map_size, the feature map's (H, W), is missing: a swapped UNet's Transformer2DModel passes it; pass "
                "it yourself to call the layer alone"
            )
        height, width = map_size
        if height % self.apart[0] or width % self.apart[1]:
            raise ValueError(
                f"a map of {height}x{width} cannot be divided into sub-lattices {self.apart[0]}x{self.apart[1]} apart"
            )
        if height * width != tokens.shape[1]:
            raise ValueError(f"a map of {height}x{width} has {height * width} pixels, got {tokens.shape[1]} tokens")

    def extra_repr(self) -> str:
        extent = "global" if self.segment is None else f"segment={self.segment}"
        return f"{self.channels}, form={self.form}, proxy_dim={self.proxy_dim}, {extent}"


def check_form(form: str) -> None:
    if form not in FORMS:
        raise ValueError(f'form has to be "pure" or "qkv", got {form!r}')
