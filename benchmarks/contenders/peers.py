"""What the GSPN layer is compared with: modules (B,C,H,W) to (B,C,H,W) of the same width, with their projections."""

import importlib
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gspn
from gspn.bench import contenders
from gspn.bench.contenders import OnMaps
from gspn.kernels import cpu


def Attention(channels: int) -> nn.Module:
    """Self-attention over all pixels, heads of 64 channels, no bias."""
    return OnMaps(contenders.Attention(channels, bias=False))


def LinearAttention(channels: int) -> nn.Module:
    """Linear attention with the same projections: the nearest rival on a CPU."""
    return OnMaps(contenders.LinearAttention(channels, bias=False))


def LinearAttentionConvolution(channels: int) -> nn.Module:
    """ReLU linear attention with a 5x5 depthwise convolution of the values (LiT's), with the same projections."""
    return OnMaps(contenders.ReluLinearAttentionConvolution(channels, bias=False))


class Unfused(nn.Module):
    """The GSPN layer in its usual form: 1x1 convolutions make all maps, a native scan reads them, torch merges."""

    def __init__(self, layer: gspn.GSPN2d):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        proxy = layer.proxy_proj(x).permute(0, 2, 3, 1)
        project = lambda w: F.linear(proxy, w.flatten(0, -2)).permute(0, 3, 1, 2)  # noqa: E731
        logits = project(layer.weight_proj.transpose(1, 2).contiguous())  # channels (D,G,3)
        directions, channels = len(layer.directions), x.shape[1]
        h = gspn.gated_scan(
            x,
            project(layer.input_proj).unflatten(1, (directions, channels)),
            logits.unflatten(1, (directions, layer.groups, 3)),
            directions=layer.directions,
            segment=layer.segment,
        )
        output, skip = layer._merged_projections()
        return (project(output).unflatten(1, (directions, channels)) * h).sum(1) + project(skip) * x


class TunedUnfused:
    """The unfused layer with every buffer allocated once, the directions' skips folded into one, and all maps from one
    matrix product: the best without fusing. channels_last float32, per-channel weights, forward and backward."""

    def __init__(self, layer: gspn.GSPN2d, x: Tensor):
        self.layer, self.x = layer, x
        batch, channels, height, width = x.shape
        self.pixels, self.channels = batch * height * width, channels
        self.shape = (batch, height, width)
        output, skip = (t.detach() for t in layer._merged_projections())
        count = len(layer.directions)
        # columns: D x 3 x C logits, D x C input gates, D x C output gates, C skip gates
        self.matrix = torch.cat(
            [
                layer.weight_proj.detach().flatten(0, 2),
                layer.input_proj.detach().flatten(0, 1),
                output.flatten(0, 1),
                skip,
            ]
        ).T.contiguous()
        self.proxy_matrix = layer.proxy_proj.weight.detach().flatten(1).T.contiguous()
        rows = lambda n: torch.zeros(self.pixels, n)  # noqa: E731
        self.proxy, self.grad_proxy = rows(self.proxy_matrix.shape[1]), rows(self.proxy_matrix.shape[1])
        self.maps, self.grad_maps = rows(self.matrix.shape[1]), rows(self.matrix.shape[1])
        self.y, self.scratch = (self._map(rows(channels)) for _ in range(2))
        self.h = self._map(rows(count * channels)).unflatten(1, (count, channels))
        self.grad_h = self._map(rows(count * channels)).unflatten(1, (count, channels))
        self.grad_x = self._map(rows(channels))
        self.grad_matrix, self.grad_proxy_matrix = torch.zeros_like(self.matrix), torch.zeros_like(self.proxy_matrix)

    def _map(self, rows: Tensor) -> Tensor:
        return rows.view(*self.shape, -1).permute(0, 3, 1, 2)

    def _parts(self, maps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        count, channels = len(self.layer.directions), self.channels
        logits, gates, outputs, skip = self._map(maps).split(
            [3 * count * channels, count * channels, count * channels, channels], 1
        )
        by_direction = lambda t: t.unflatten(1, (count, channels))  # noqa: E731
        return (
            logits.unflatten(1, (count, 3, channels)).transpose(2, 3),
            by_direction(gates),
            by_direction(outputs),
            skip,
        )

    def _rows(self, t: Tensor) -> Tensor:
        return t.permute(0, 2, 3, 1).reshape(self.pixels, -1)

    def forward(self) -> Tensor:
        numbers = [gspn.DIRECTIONS.index(d) for d in self.layer.directions]
        torch.mm(self._rows(self.x), self.proxy_matrix, out=self.proxy)
        torch.mm(self.proxy, self.matrix, out=self.maps)
        logits, gates, outputs, skip = self._parts(self.maps)
        cpu.gated_scan(self.x, gates, logits, numbers, self.layer.segment, out=self.h)
        torch.mul(skip, self.x, out=self.y)
        for d in range(len(numbers)):
            self.y.addcmul_(outputs[:, d], self.h[:, d])
        return self.y

    def backward(self, grad: Tensor) -> Tensor:
        numbers = [gspn.DIRECTIONS.index(d) for d in self.layer.directions]
        logits, gates, outputs, skip = self._parts(self.maps)
        grad_logits, grad_gates, grad_outputs, grad_skip = self._parts(self.grad_maps)
        torch.mul(grad.unsqueeze(1), self.h, out=grad_outputs)
        torch.mul(grad.unsqueeze(1), outputs, out=self.grad_h)
        torch.mul(grad, self.x, out=grad_skip)
        out = (self.grad_x, grad_gates, grad_logits)
        cpu.gated_scan_backward(self.grad_h, self.x, gates, logits, self.h, numbers, self.layer.segment, out=out)
        self.grad_x.addcmul_(grad, skip)
        torch.mm(self.proxy.T, self.grad_maps, out=self.grad_matrix)
        torch.mm(self.grad_maps, self.matrix.T, out=self.grad_proxy)
        torch.mm(self._rows(self.x).T, self.grad_proxy, out=self.grad_proxy_matrix)
        self.grad_x += self._map(self.grad_proxy @ self.proxy_matrix.T)
        return self.grad_x


class Prototype:
    """The measured prototype of the fused kernel (AVX-512, float32), from a folder with its two built libraries."""

    def __init__(self, folder: str, layer: gspn.GSPN2d, x: Tensor, threads: int):
        sys.path.insert(0, str(Path(folder).resolve()))
        self.lib = importlib.import_module("bwdlib")
        self.threads, self.x = threads, x.permute(0, 2, 3, 1)
        order = [gspn.DIRECTIONS.index(d) for d in ("right", "left", "down", "up")]
        take = lambda p: p.detach()[order].contiguous()  # noqa: E731
        self.parameters = {
            "Wl": take(layer.weight_proj),
            "Wlam": take(layer.input_proj),
            "Wu": take(layer.output_proj),
            "WD": take(layer.skip_proj),
            "m": take(layer.merger),
        }
        self.proxy_weight = layer.proxy_proj.weight.detach().flatten(1)
        self.packed, self.skip, self.columns = self.lib.pack(self.parameters)
        self.out = torch.zeros_like(self.x)
        batch, height, width, _ = self.x.shape
        self.maps = torch.zeros(batch * height * width, self.columns.shape[0])

    def forward(self) -> Tensor:
        proxy = F.linear(self.x, self.proxy_weight)
        self.lib.fused(self.x, proxy, self.packed, self.skip, self.out, 0, 2, 1, self.threads)
        return self.out.permute(0, 3, 1, 2)

    def unfused_forward(self) -> Tensor:
        """The strongest unfused forward: one matrix product into a buffer that is kept, then a scan that reads it."""
        proxy = F.linear(self.x, self.proxy_weight)
        torch.mm(proxy.flatten(0, 2), self.columns.T, out=self.maps)
        self.lib.scan_pf(self.x, proxy, self.packed, self.skip, self.out, 2, self.threads, self.maps)
        return self.out.permute(0, 3, 1, 2)

    def train(self, grad: Tensor) -> Tensor:
        grad = grad.permute(0, 2, 3, 1)
        packed, skip, _ = self.lib.pack(self.parameters)  # weights change with every step
        proxy = F.linear(self.x, self.proxy_weight)
        self.lib.fused(self.x, proxy, packed, skip, self.out, 0, 2, 1, self.threads)
        dx, dproxy, *packed_grads = self.lib.fbwd(self.x, proxy, packed, skip, grad, 0, self.threads)
        self.lib.unpack(*packed_grads, self.parameters)
        dproxy = dproxy.contiguous()
        dproxy.flatten(0, 2).T @ self.x.flatten(0, 2)
        return (dx + dproxy @ self.proxy_weight).permute(0, 3, 1, 2)


class KernelAlone:
    """Our kernel as the prototype is called: no autograd, no dispatcher, the output in a buffer that is kept."""

    def __init__(self, layer: gspn.GSPN2d, x: Tensor):
        self.x = x
        output, skip = (t.detach() for t in layer._merged_projections())
        self.projections = (layer.weight_proj.detach(), layer.input_proj.detach(), output, skip)
        self.options = ([gspn.DIRECTIONS.index(d) for d in layer.directions], layer.segment)
        self.proxy_weight = layer.proxy_proj.weight.detach().flatten(1)
        self.out = torch.zeros_like(x)

    def _proxy(self) -> Tensor:
        return F.linear(self.x.permute(0, 2, 3, 1), self.proxy_weight).permute(0, 3, 1, 2)

    def forward(self) -> Tensor:
        return cpu.propagate(self.x, self._proxy(), *self.projections, *self.options, out=self.out)

    def train(self, grad: Tensor) -> Tensor:
        proxy = self._proxy()
        cpu.propagate(self.x, proxy, *self.projections, *self.options, out=self.out)
        dx, dproxy, *_ = cpu.propagate_backward(grad, self.x, proxy, *self.projections, *self.options)
        rows = dproxy.permute(0, 2, 3, 1)
        rows.flatten(0, 2).T @ self.x.permute(0, 2, 3, 1).flatten(0, 2)
        return dx + (rows @ self.proxy_weight).permute(0, 3, 1, 2)
