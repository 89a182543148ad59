"""Random shapes, strides, segments, groups and dtypes through the native CPU kernels, against a loop in torch.

    python tests/tools/fuzz_cpu.py --cases 3000 --seed 0

Every case runs forward and backward on a random instruction set and number of threads. A failure prints its seed:
`--seed <that> --cases 1` repeats it.

Under AddressSanitizer and UBSan, for this script and for the tests of the kernels (leaks are Python's own):

    pip install --no-deps -e . -C cmake.define.GSPN_SANITIZE=address,undefined
    export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
    export ASAN_OPTIONS=detect_leaks=0
    python tests/tools/fuzz_cpu.py && python -m pytest tests/kernels/test_cpu_scan.py

and `pip install --no-deps -e .` again afterwards.
"""

import argparse
import random
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
from test_cpu_scan import (
    DTYPES,
    TOLERANCE,
    error,
    gated_loop,
    loop,
    native_gated,
    native_line,
    normalize,
    with_gradients,
)

from gspn.kernels import cpu


def relaid(t: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """The same values in another order of memory, sometimes with gaps that hold NaN."""
    order = list(range(t.dim()))
    if rng.random() < 0.6:
        rng.shuffle(order)
    back = [order.index(i) for i in range(t.dim())]
    step = [rng.choice((1, 1, 1, 2)) if rng.random() < 0.3 else 1 for _ in order]
    shape = [t.shape[i] * s + rng.choice((0, 0, 3)) for i, s in zip(order, step, strict=True)]
    storage = torch.full(shape, torch.nan, dtype=t.dtype)
    view = storage[tuple(slice(0, t.shape[i] * s, s) for i, s in zip(order, step, strict=True))].permute(back)
    return view.copy_(t)


def propagate_loop(x, proxy, weight_proj, input_proj, output_proj, skip_proj, center, directions, segment):
    project = lambda p: torch.einsum("...s,bshw->b...hw", p, proxy)  # noqa: E731
    y = 0 if skip_proj is None else project(skip_proj) * x
    for i, d in enumerate(directions):
        weights = normalize(project(weight_proj[i]).transpose(1, 2), d)
        lines = torch.arange(x.shape[2 if d % 2 else 3])
        lines = lines.flip(0) if d >= 2 else lines
        goes_on = (lines % (segment or len(lines)) > 0)[:, None] if d % 2 else lines % (segment or len(lines)) > 0
        gated = project(input_proj[i]) * x - goes_on * center[:, i, :, None, None]
        y = y + project(output_proj[i]) * loop(gated, weights, d, segment)
    return y


def run_case(seed: int) -> list[tuple[str, float, float]]:
    """(name, error, tolerance) of every output."""
    rng, draw = random.Random(seed), torch.Generator().manual_seed(seed)
    groups, per_group = rng.choice((1, 1, 2, 3, 7)), rng.choice((1, 1, 2, 5, 17, 33))
    if rng.random() < 0.3:
        groups, per_group = groups * per_group, 1
    batch, channels = rng.choice((1, 1, 2, 3)), groups * per_group
    height, width = (rng.choice((1, 2, 3, 7, 14, 16, 17, 31, 40, 66, 108)) for _ in range(2))
    directions = rng.sample(range(4), rng.randint(1, 4))
    segment = rng.choice((None, None, 1, 2, 5, 16, 100))
    dtype, op = rng.choice(DTYPES), rng.choice(("gated", "line", "propagate", "unmerged"))
    options = {"isa": rng.choice(cpu.supported_isas()), "threads": rng.choice((1, 2))}
    maps = lambda *lead: torch.randn(*lead, height, width, generator=draw, dtype=torch.float64)  # noqa: E731
    many, slack = len(directions), 1.0
    if op == "gated":
        tensors = [maps(batch, channels), maps(batch, many, channels), 2 * maps(batch, many, groups, 3)]
        tensors = [t.to(dtype) for t in tensors]
        grad = maps(batch, many, channels).to(dtype)
        found = native_gated(*(relaid(t, rng) for t in (*tensors, grad)), directions, segment, **options)
        function = lambda *a: gated_loop(*a, directions, segment)  # noqa: E731
    elif op == "line":
        weight_dtype = rng.choice((dtype, torch.float32)) if dtype.itemsize == 2 else dtype
        tensors = [maps(batch, channels).to(dtype), (0.4 * maps(batch, groups, 3)).to(weight_dtype)]
        grad = maps(batch, channels).to(dtype)
        x, weights, d = *(relaid(t, rng) for t in tensors), directions[0]
        found = native_line(x, weights, relaid(grad, rng), d, segment, **options)
        function = lambda *a: loop(*a, d, segment)  # noqa: E731
    else:
        features = rng.choice((1, 2, 5, 8, 13, 20, 33, 80))
        sizes = (
            (many, 3, groups, features),
            (many, channels, features),
            (many, channels, features),
            (channels, features) if op == "propagate" else (many, channels, features),
        )
        projections = [torch.randn(s, generator=draw, dtype=torch.float64) / features**0.5 for s in sizes]
        tensors = [t.to(dtype) for t in (maps(batch, channels), maps(batch, features), *projections)]
        grad, skip = maps(batch, channels).to(dtype), rng.random() < 0.7
        if not skip:
            tensors.pop()
        inputs = [relaid(t, rng) for t in tensors[:2]] + tensors[2:] + [None] * (not skip)
        center = torch.randn(batch, many, channels, generator=draw).to(torch.promote_types(dtype, torch.float32))
        center *= rng.random() < 0.5
        slack = 5.0  # sums over pixels and features
    if op == "unmerged":
        kept = dtype if rng.random() < 0.5 or dtype.itemsize > 2 else torch.float32
        merger, average = torch.randn(many, generator=draw).to(kept), rng.random() < 0.5
        lines = torch.tensor([min(segment or 1 << 30, height if d % 2 else width) for d in directions])
        shares = (merger.double() / (lines if average else 1)).view(-1, 1, 1)
        layers = [t if t is None else t.to(kept) for t in inputs[2:]]
        found = [
            cpu.propagate_unmerged(
                *inputs[:2], *layers, merger, directions, segment, average, center.clone(), isa=options["isa"]
            )
        ]
        tensors += [None] * (not skip) + [center]

        def function(x, proxy, weights, inward, outward, skips, center):
            skips = None if skips is None else (skips * merger.double().view(-1, 1, 1)).sum(0)
            return propagate_loop(x, proxy, weights, inward, outward * shares, skips, center, directions, segment)

        expected = [function(*(t if t is None else t.double() for t in tensors))]
    elif op == "propagate":
        y = cpu.propagate(*inputs, directions, segment, center=center, **options)
        grads = cpu.propagate_backward(relaid(grad, rng), *inputs, directions, segment, center=center, **options)
        found = [y, *(g for g in grads if g is not None)]
        tensors.append(center)
        function = lambda *a: propagate_loop(*a[:-1], *[None] * (not skip), a[-1], directions, segment)  # noqa: E731
    if op != "unmerged":
        expected = with_gradients(function, [t.double() for t in tensors], grad.double())
    name = f"seed {seed}: {op} {dtype} {(batch, channels, groups, height, width)} {directions} {segment} {options}"
    pairs = zip(found, expected, strict=False)
    return [(f"{name} output {i}", error(f, e), slack * TOLERANCE[dtype]) for i, (f, e) in enumerate(pairs)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--library", type=Path, help="a library other than the installed one")
    options = parser.parse_args()
    if options.library:
        cpu._find = lambda: options.library
    failures = 0
    for seed in range(options.seed, options.seed + options.cases):
        for name, found, allowed in run_case(seed):
            if not found <= allowed:
                failures += 1
                print(f"{name}: error {found:.2g}, allowed {allowed:.2g}", flush=True)
    print(f"{options.cases} cases, {failures} failures")
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())
