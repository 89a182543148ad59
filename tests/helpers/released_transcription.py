"""A straight transcription of the released classification forward, for comparison only.

It was written from a description in words, by someone who had not seen the library (neither its
source nor its tests) nor any public code of the model, so that the library's own implementation
can be tested against it. Plain torch, plain loops, slow; not meant for use.
"""

import torch
from torch import nn
from torch.nn import functional as F

MLP_RATIO = 4
LAYER_NORM_EPS = 1e-5
GRN_EPS = 1e-6
SUM_CLAMP = 1e-7
LOCAL_SEGMENT = 2
GLOBAL_SEGMENT = {2: 14, 3: 7}  # by 0-based level


def normalised_weights(left, middle, right):
    """Logits (..., P, T) to the three weights; p, the place in the line, is the axis before last."""
    left = torch.sigmoid(left)
    middle = torch.sigmoid(middle)
    right = torch.sigmoid(right)
    places = left.shape[-2]
    rows_left, rows_middle, rows_right = [], [], []
    for p in range(places):
        total = middle[..., p, :]
        if p != 0:
            total = total + left[..., p, :]
        if p != places - 1:
            total = total + right[..., p, :]
        total = total.clamp(min=SUM_CLAMP)
        rows_left.append(left[..., p, :] / total)
        rows_middle.append(middle[..., p, :] / total)
        rows_right.append(right[..., p, :] / total)
    return (
        torch.stack(rows_left, dim=-2),
        torch.stack(rows_middle, dim=-2),
        torch.stack(rows_right, dim=-2),
    )


def scan(x, wl, wm, wr, segment):
    """Scan (..., P, T) along its last axis, the state reset to 0 at each segment's start.

    x is the scan's input with lam already multiplied in. Where `segment` does not divide T the
    last segment is the shorter one.
    """
    steps = x.shape[-1]
    columns = []
    state = None
    for t in range(steps):
        if t % segment == 0:
            state = torch.zeros_like(x[..., 0])
        nothing = torch.zeros_like(state[..., :1])
        above = torch.cat([nothing, state[..., :-1]], dim=-1)  # h[p-1, t-1]
        below = torch.cat([state[..., 1:], nothing], dim=-1)  # h[p+1, t-1]
        state = (
            wl[..., t] * above + wm[..., t] * state + wr[..., t] * below  # weights of this pixel
        ) + x[..., t]
        columns.append(state)
    return torch.stack(columns, dim=-1)


class ChannelsFirstLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W)."""

    def __init__(self, channels):
        super().__init__(channels, eps=LAYER_NORM_EPS)

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def linear_over_channels(linear, x):
    """Apply a Linear to each pixel of (B, C, H, W)."""
    return linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GRN(nn.Module):
    def __init__(self, channels):
        super().__init__()
        # The initial values are not described; zeros make it the identity until weights are loaded.
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, a):
        g = (a * a).sum(dim=(2, 3), keepdim=True).sqrt()
        n = g / (g.mean(dim=1, keepdim=True) + GRN_EPS)
        return self.gamma * (a * n) + self.beta + a


class Op(nn.Module):
    def __init__(self, width, proxy, segment):
        super().__init__()
        inner = width * 3 // 2
        self.inner = inner
        self.segment = segment
        self.in_proj = nn.Linear(width, inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 7, padding=3, groups=inner, bias=False)
        self.x_conv_down = nn.Conv2d(inner, proxy, 1, bias=False)
        self.w_conv_up = nn.Conv2d(proxy, 12 * inner, 1, bias=False)
        self.l_conv_up = nn.Conv2d(proxy, 4 * inner, 1, bias=False)
        self.u_conv_up = nn.Conv2d(proxy, 4 * inner, 1, bias=False)
        self.d_conv = nn.Conv2d(proxy, 4 * inner, 1, bias=False)
        self.m_conv = nn.Conv2d(4, 1, 1, bias=False)
        self.grn = GRN(inner)
        self.out_norm = ChannelsFirstLayerNorm(inner)
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, z):
        height, width = z.shape[-2:]
        if height != width:
            raise ValueError("the transcription is for square maps only")
        inner = self.inner

        a = self.conv2d(linear_over_channels(self.in_proj, z))
        proxy = self.x_conv_down(a)
        w = self.w_conv_up(proxy)
        lam = self.l_conv_up(proxy)  # as predicted: no sigmoid or other activation is described
        u = self.u_conv_up(proxy)
        d = self.d_conv(proxy)

        left = w[:, 0 : 4 * inner]
        middle = w[:, 4 * inner : 8 * inner]
        right = w[:, 8 * inner : 12 * inner]

        transposed = a.transpose(-1, -2)
        inputs = [a, transposed, a.flip(-1), transposed.flip(-1)]

        total = 0
        for direction in range(4):
            mine = slice(direction * inner, (direction + 1) * inner)  # direction-major: 4 x D
            x = inputs[direction]
            wl, wm, wr = normalised_weights(left[:, mine], middle[:, mine], right[:, mine])
            h = scan(x * lam[:, mine], wl, wm, wr, self.segment)
            # "(scan input) * d" is read as the direction's input before lam is multiplied in.
            o = h * u[:, mine] + x * d[:, mine]
            total = total + self.m_conv.weight[0, direction, 0, 0] * o

        return linear_over_channels(self.out_proj, self.grn(self.out_norm(total)))


class MLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, MLP_RATIO * width)
        self.fc2 = nn.Linear(MLP_RATIO * width, width)

    def forward(self, x):
        # "GELU" is read as the exact (erf) form, here and in the stem.
        return linear_over_channels(self.fc2, F.gelu(linear_over_channels(self.fc1, x)))


class Block(nn.Module):
    def __init__(self, width, proxy, segment):
        super().__init__()
        self.norm = ChannelsFirstLayerNorm(width)
        self.op = Op(width, proxy, segment)
        self.norm2 = ChannelsFirstLayerNorm(width)
        self.mlp = MLP(width)

    def forward(self, x):
        x = x + self.op(self.norm(x))
        x = x + self.mlp(self.norm2(x))
        return x


class Level(nn.Module):
    def __init__(self, width, proxy, segments, last):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, proxy, segment) for segment in segments)
        self.downsample = None
        if not last:
            self.downsample = nn.Sequential(
                nn.Identity(),
                nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
                nn.Identity(),
                ChannelsFirstLayerNorm(2 * width),
            )

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        if self.downsample is not None:
            x = self.downsample(x)
        return x


class Classifier(nn.Module):
    def __init__(self, width, num_classes):
        super().__init__()
        self.norm = ChannelsFirstLayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.head(self.norm(x).mean(dim=(2, 3)))


class ReleasedModel(nn.Module):
    def __init__(self, depths, width, proxy, global_levels, num_classes=1000, image_size=224):
        super().__init__()
        # image_size changes nothing: the global segments are described as fixed, 14 and 7 lines.
        self.image_size = image_size
        self.patch_embed = nn.Sequential(
            nn.Conv2d(3, width // 2, 3, stride=2, padding=1),
            nn.Identity(),
            ChannelsFirstLayerNorm(width // 2),
            nn.Identity(),
            nn.GELU(),
            nn.Conv2d(width // 2, width, 3, stride=2, padding=1),
            nn.Identity(),
            ChannelsFirstLayerNorm(width),
        )
        self.layers = nn.ModuleList()
        for level, depth in enumerate(depths):
            segments = []
            for i in range(depth):
                if level in global_levels and (i < 7 or (i + 1) % 7 == 0):
                    segments.append(GLOBAL_SEGMENT[level])
                else:
                    segments.append(LOCAL_SEGMENT)
            # The proxy size S is read as the same in all levels.
            self.layers.append(Level(width * 2**level, proxy, segments, level == len(depths) - 1))
        self.classifier = Classifier(width * 2 ** (len(depths) - 1), num_classes)

    def forward(self, images):
        x = self.patch_embed(images)
        for layer in self.layers:
            x = layer(x)
        return self.classifier(x)
