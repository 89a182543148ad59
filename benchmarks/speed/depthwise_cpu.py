"""The gradients of a depthwise 7x7 convolution on a CPU: gspn's layer against torch's nn.Conv2d, and a training step
with either.

    python -m benchmarks.speed.depthwise_cpu --out benchmarks/results/speed/depthwise-cpu.json [--rounds 7]

The sizes are those of gspn_micro at 32x32 pixels and of gspn_tiny at 224x224. Both compute the gradients of input and
weight, which are compared before they are timed.
"""

import argparse
import copy
from pathlib import Path

import torch
from torch import nn

import gspn
from benchmarks.harness import harness
from gspn.depthwise import DepthwiseConv2d

SIZES = [  # B, C, H, W
    (128, 48, 16, 16),
    (128, 96, 8, 8),
    (128, 192, 4, 4),
    (2, 144, 56, 56),
    (2, 288, 28, 28),
    (2, 576, 14, 14),
    (2, 1152, 7, 7),
]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STEP = ("gspn_micro", 128, 32)  # model, batch, pixels


def torchs(module):
    """A copy of the module with torch's convolutions."""
    module = copy.deepcopy(module)
    for each in module.modules():
        if isinstance(each, DepthwiseConv2d):
            each.__class__ = nn.Conv2d
    return module


def backward_call(conv, x, grad):
    """Only the backward pass; the graph is kept."""
    x = x.detach().requires_grad_()
    y = conv(x)
    return lambda: torch.autograd.grad(y, (x, conv.weight), grad, retain_graph=True)


def backward(size, dtype, rounds, threads):
    torch.manual_seed(0)
    conv = DepthwiseConv2d(size[1], 7, bias=False).to(dtype)
    x, grad = (torch.randn(size).to(dtype).to(memory_format=torch.channels_last) for _ in range(2))
    calls = {"gspn": backward_call(conv, x, grad), "torch": backward_call(torchs(conv), x, grad)}
    for ours, theirs in zip(*(call() for call in calls.values()), strict=True):
        error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        if not error < {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]:
            raise AssertionError(f"a gradient at {size} in {dtype} differs from torch's: {error:.1e}")
    return harness.summary(harness.interleaved(calls, rounds, threads), "gspn")


def step_call(model, images, autocast):
    def run():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(images).float().square().mean()
        loss.backward()

    return run


def step(autocast, rounds, threads):
    name, batch, pixels = STEP
    torch.manual_seed(0)
    model = gspn.create_model(name, num_classes=10).train()
    images = torch.randn(batch, 3, pixels, pixels).to(memory_format=torch.channels_last)
    calls = {"gspn": step_call(model, images, autocast), "torch": step_call(torchs(model), images, autocast)}
    return harness.summary(harness.interleaved(calls, rounds, threads), "gspn")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/speed/depthwise-cpu.json"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    content = {"what": "gradients of input and weight of a depthwise 7x7 convolution, and a training step with it"}
    content |= {"environment": harness.environment(), "rounds": options.rounds, "threads": options.threads, "cases": []}
    cases = [("size (B,C,H,W)", size, name) for size in SIZES for name in DTYPES]
    cases += [("training step of (model, batch, pixels)", STEP, name) for name in DTYPES]
    for what, size, name in cases:
        if size == STEP:
            found = step(name == "bfloat16", options.rounds, options.threads)
        else:
            found = backward(size, DTYPES[name], options.rounds, options.threads)
        content["cases"].append({what: size, "dtype": name} | found)
        print(size, name, f"{found['gspn']['ms'][1]:.2f} ms; torch {found['torch']['ratio'][1]:.2f}x", flush=True)
        harness.write_json(options.out, content, quiet=True)


if __name__ == "__main__":
    main()
