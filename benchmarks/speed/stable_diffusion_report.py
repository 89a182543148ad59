"""Tables and a picture of what benchmarks.speed.stable_diffusion found, and how times grow with the image.

Times marked with ~ were not measured but extrapolated from smaller sizes: the least-squares fit, in relative errors, of
t = a + b N + c N^2 for attention and t = a + b N for GSPN, with N pixels and no negative coefficient.
"""

import json
from itertools import combinations
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.harness.harness import table

# arXiv 2501.12381 and 2512.07884: a whole SDXL pipeline on an A100, how many times faster than with attention
PAPER = {"512x512": 7, "768x768": 9, "1024x1024": 12, "2048x2048": 24, "4096x4096": 28, "8192x8192": 42}
PAPER |= {"16384x8192": 84}
PAPER_2 = {"4096x4096": 32, "16384x8192": 93}
STEP, KEPT = "SDXL, one step", "SDXL, one step, attentions kept"  # the keys of its counted operations
COLOURS = {"attention": "#e07b22", "GSPN pure": "#2f6db3", "GSPN qkv": "#58a55c", "GSPN pure, segment 4": "#8fb8de"}
TITLES = {
    "step": "one denoising step of SDXL, both halves",
    "block": "SDXL's down_blocks.1, one half",
    "layer": "one self-attention of that block",
}


def pixels(size: tuple[int, int] | str) -> int:
    height, width = size if isinstance(size, tuple) else map(int, size.split("x"))
    return height * width


def points(rows: dict, name: str) -> list[tuple[int, float]]:
    """(pixels, median ms) of a contender at the sizes where it was measured."""
    found = [(pixels(size), row[name]["ms"][1]) for size, row in rows.items() if "ms" in row.get(name, {})]
    return sorted(found)


def predicted(rows: dict, name: str, n: int) -> float | None:
    """Milliseconds for `n` pixels by the fit above; None from fewer than three sizes."""
    found = points(rows, name)
    if len(found) < 3:
        return None
    x, t = np.array(found).T
    fits = []
    powers = (0, 1, 2) if name == "attention" else (0, 1)
    for some in (c for count in (1, 2, 3) for c in combinations(powers, count)):  # no part of a time is negative
        relative = np.stack([x**p / t for p in some], 1)
        factors = np.linalg.lstsq(relative, np.ones_like(t), rcond=None)[0]
        if min(factors) >= 0:
            error = ((relative @ factors - 1) ** 2).sum()
            fits.append((error, float(sum(f * float(n) ** p for f, p in zip(factors, some, strict=True)))))
    return min(fits)[1]


def growth(rows: dict) -> dict:
    """By contender the exponent p of time ~ pixels^p: fitted to all sizes measured, and between the last two."""
    found = {}
    for name in COLOURS:
        measured = points(rows, name)
        if len(measured) > 1:
            x, t = np.log(np.array(measured).T)
            last = (t[-1] - t[-2]) / (x[-1] - x[-2])
            found[name] = {"all": round(float(np.polyfit(x, t, 1)[0]), 2), "last": round(float(last), 2)}
    return found


def in_words(row: dict | None) -> str:
    """A size in a few words, for the terminal."""
    if row is None:
        return "left, the time is up"
    if "why" in row:
        return row["why"]
    parts = []
    for name, found in row.items():
        if isinstance(found, dict):
            faster = f" ({found['speed-up']:.2f} times as fast)" if "speed-up" in found else ""
            parts.append(f"{name} {_time(found['ms'][1]) + faster if 'ms' in found else found['why']}")
    return "; ".join(parts)


def _time(ms: float) -> str:
    for unit, factor in (("h", 3.6e6), ("min", 6e4), ("s", 1e3)):
        if ms >= 3 * factor or (unit == "s" and ms >= factor):
            return f"{ms / factor:,.3g} {unit}" if ms < 1e3 * factor else f"{ms / factor:,.0f} {unit}"
    return f"{ms:.3g} ms"


def _cells(rows: dict, size: str, name: str) -> tuple[str, str]:
    """Time and speed-up of a contender as a table shows them."""
    row = rows.get(size, {})
    found, base = row.get(name, {}), row.get("attention", {})
    ours = found["ms"][1] if "ms" in found else predicted(rows, name, pixels(size))
    attention = base["ms"][1] if "ms" in base else predicted(rows, "attention", pixels(size))
    mark = "" if "ms" in found else "~ "
    why = found.get("why", row.get("why", ""))
    reason = " (out of memory)" if "out of memory" in why else " (failed)" if why and "about" not in why else ""
    time = f"{mark}{_time(ours)}{reason}" if ours else f"-{reason}"
    if not ours or not attention:
        return time, "-"
    return time, f"{'' if 'speed-up' in found else '~ '}{found.get('speed-up', attention / ours):.2f}"


def _where(content: dict) -> str:
    environment = content["environment"]
    device = environment["gpu"] or f"{environment['cpu']}, {content.get('device', {}).get('threads', 1)} thread(s)"
    changed = ", with uncommitted changes" if environment["uncommitted_changes"] else ""
    return (
        f"{device}; torch {environment['torch']}; commit {environment['commit'][:12]}{changed}; {environment['date']}"
    )


def write_speed(path: Path) -> None:
    """The .md and .png beside a .json of times."""
    content = json.loads(path.read_text())
    on_gpu, rehearsal = "step" in content["sections"], content["what"].startswith("rehearsal")
    counted = path.with_name("stable-diffusion-structure.json")
    counted = json.loads(counted.read_text())[STEP] if counted.exists() and on_gpu else {}
    parts = [f"# Stable Diffusion: GSPN in the place of self-attention, {'GPU' if on_gpu else 'CPU'}"]
    parts.append(f"{content['what']}. {_where(content)}." + (" NOT A MEASUREMENT." if rehearsal else ""))
    parts.append(
        ("bfloat16" if on_gpu else "float32, batch 1, map sides a 16th of the image's")
        + "; attention is torch's scaled_dot_product_attention. Medians; faster: attention's time over GSPN's, median "
        "of the rounds. ~ is extrapolated, not measured: t = a + bN + cN^2 (attention), a + bN (GSPN), N pixels, "
        "fitted to the sizes measured. The paper's and GSPN-2's numbers are published for a whole SDXL pipeline on an "
        "A100."
    )
    for section, rows in content["sections"].items():
        names = [n for n in COLOURS if any(n in row for row in rows.values())]
        head = ["height x width", "attention"]
        head += [cell for n in names if n != "attention" for cell in (n, "faster")]
        head += (["operations, ratio"] if counted else []) + (["paper", "GSPN-2"] if section != "layer" else [])
        lines = []
        for size in sorted({*rows, *([] if rehearsal else PAPER)}, key=pixels):
            line = [size, _cells(rows, size, "attention")[0]]
            line += [cell for n in names if n != "attention" for cell in _cells(rows, size, n)]
            if counted:
                one = counted.get(size)
                line.append(f"{one['attention']['operations'] / one['GSPN pure']['operations']:.2f}" if one else "-")
            line += [PAPER.get(size, "-"), PAPER_2.get(size, "-")] if section != "layer" else []
            lines.append(line)
        parts += [f"## {TITLES[section][0].upper()}{TITLES[section][1:]}", table(head, lines)]
        memory = _memory(rows, names)
        parts += [memory] if memory else []
        found = content["growth"].get(section, {})
        exponents = [
            f"{n} {p['all']:.2f} over all sizes, {p['last']:.2f} between the last two" for n, p in found.items()
        ]
        parts.append(f"Time grows with the number of pixels to the power of: {'; '.join(exponents)}.")
        stopped = [
            f"{size}, {n}: {row[n].get('why')}" for size, row in rows.items() for n in names if "why" in row.get(n, {})
        ] + [f"{size}: {row['why']}" for size, row in rows.items() if "why" in row]
        parts += ["\n".join(f"- {line}" for line in stopped)] if stopped else []
    parts.append(f"![times and speed-ups]({path.stem}.png)")
    path.with_suffix(".md").write_text("\n\n".join(parts) + "\n")
    _draw(content, path.with_suffix(".png"))
    print(f"wrote {path.with_suffix('.md')} and {path.with_suffix('.png')}")


def _memory(rows: dict, names: list[str]) -> str:
    cell = lambda row, n: f"{row[n]['extra_mib'] / 1024:.2f}" if "extra_mib" in row.get(n, {}) else "-"  # noqa: E731
    lines = [[size, *(cell(row, n) for n in names), row.get("savers", "-")] for size, row in rows.items()]
    if not any("extra_mib" in row.get(n, {}) for row in rows.values() for n in names):
        return ""
    return table(["GiB beside the weights", *names, "savers of memory"], lines)


def _draw(content: dict, path: Path) -> None:
    sections = content["sections"]
    figure = Figure(figsize=(4.6 * (len(sections) + 1), 4.2), layout="constrained")
    *axes, last = figure.subplots(1, len(sections) + 1)
    for axis, (section, rows) in zip(axes, sections.items(), strict=True):
        for name, colour in COLOURS.items():
            found = points(rows, name)
            if found:
                power = content["growth"].get(section, {}).get(name, {}).get("last")
                label = name if power is None else f"{name}: pixels^{power:.2f} at last"
                axis.plot([n**0.5 for n, _ in found], [t for _, t in found], marker="o", color=colour, label=label)
        axis.set(title=TITLES[section], ylabel="ms")
    rows = sections.get("step", sections.get("block", {}))
    for name, colour in COLOURS.items():
        found = sorted(
            (pixels(s) ** 0.5, r[name]["speed-up"]) for s, r in rows.items() if "speed-up" in r.get(name, {})
        )
        if found:
            last.plot(*zip(*found, strict=True), marker="o", color=colour, label=name)
    for label, published, style in (("GSPN", PAPER, "k--"), ("GSPN-2", PAPER_2, "k:")):
        line = sorted((pixels(size) ** 0.5, value) for size, value in published.items())
        last.plot(*zip(*line, strict=True), style, lw=1, label=f"published, {label}: pipeline, A100")
    last.axhline(1, color="grey", lw=0.8)
    last.set(title="attention's time over GSPN's", ylabel="times as fast")
    for axis in (*axes, last):
        axis.set(xscale="log", yscale="log", xlabel="side of the image, pixels (square root of the area)")
        ticks = [
            t for t in (64, 128, 256, 512, 1024, 2048, 4096, 8192) if axis.get_xlim()[0] <= t <= axis.get_xlim()[1]
        ]
        axis.set_xticks(ticks, map(str, ticks))
        axis.set_xticks([], minor=True)
        axis.title.set_fontsize(10)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    figure.suptitle(_where(content).split(";")[0], fontsize=10)
    figure.savefig(path, dpi=130, facecolor="white")


def write_structure(path: Path) -> None:
    """The .md beside the .json of shapes and counts."""
    content = json.loads(path.read_text())
    parts = ["# Stable Diffusion: what a swap changes, counted on the published configurations"]
    parts.append(
        "Shapes alone, without weights. No Stable Diffusion weights were at hand: nothing here says how images look."
    )
    head = ["UNet", "attn1 swapped", "parameters", "published", "after, pure", "after, qkv", "native size"]
    lines = []
    for name, model in content["models"].items():
        counts = [f"{model['parameters'][n]:,}" for n in ("attention", "GSPN pure", "GSPN qkv")]
        lines.append([name, len(model["layers"]), counts[0], f"{model['published']:,}", *counts[1:], model["native"]])
    parts.append(table(head, lines))
    for name, model in content["models"].items():
        sizes = list(model["layers"][0]["maps"])
        parts.append(f"## {name}: swapped layers and their feature maps, H x W, by the image's height x width")
        parts.append(table(["block", "layers", "C", "parameters: attention", "pure", "qkv", *sizes], _grouped(model)))
    parts.append("## SDXL: a denoising step with guidance, counted")
    head = ["height x width", "TFLOP, attention", "GSPN pure", "GSPN qkv", "attention / pure"]
    head += ["paper's speed-up", "GSPN-2's", "GiB beside the weights"]
    lines = []
    for size, row in sorted(content[STEP].items(), key=lambda item: pixels(item[0])):
        found = {n: one["operations"] for n, one in row.items()}
        ratio = found["attention"] / found["GSPN pure"]
        least, most = (pick(one["mib"] for one in row.values()) / 1024 for pick in (min, max))
        memory = f"{least:.2f}" if most - least < 0.005 else f"{least:.2f} to {most:.2f}"
        numbers = [f"{n / 1e12:,.4g}" if n < 1e16 else f"{n / 1e12:,.0f}" for n in found.values()]
        lines.append([size, *numbers, f"{ratio:.2f}", PAPER.get(size, "-"), PAPER_2.get(size, "-"), memory])
    parts.append(table(head, lines))
    parts.append(
        "A multiply-add counts two. GiB: the most that tensors hold at once, bfloat16, both halves in one batch, "
        "without savers, without what kernels take inside, attention without a matrix of all pairs; all contenders. "
        "A published speed-up above the ratio of the operations cannot come from the arithmetic of one step alone: the "
        "attention compared with ran less efficiently, or more than the step was compared."
    )
    if kept := content.get(KEPT):
        names = list(next(iter(kept.values())))
        parts.append("## SDXL: a denoising step with guidance where some attentions stay, counted")
        lines = []
        for size, row in sorted(kept.items(), key=lambda item: pixels(item[0])):
            counts = [row[name]["operations"] for name in names]
            cells = [f"{n / 1e12:,.4g} ({counts[0] / n:.2f})" for n in counts]
            lines.append([size, *cells, f"{max(one['mib'] for one in row.values()) / 1024:.2f}"])
        parts.append(table(["height x width", *(f"kept: {name}" for name in names), "GiB beside the weights"], lines))
        parts.append(
            "TFLOP, and in brackets how many times fewer than with all attentions; the others are GSPN, pure. The "
            "lowest level is level:2 with the middle block, 60 of 70 attentions; level:1 has the other ten. GiB as "
            "above: the same for all, as attention keeps no matrix of all pairs."
        )
    path.with_suffix(".md").write_text("\n\n".join(parts) + "\n")
    print(f"wrote {path.with_suffix('.md')}")


def _grouped(model: dict) -> list[list]:
    """One line for the layers of a block that have the same shapes."""
    lines: dict[tuple, list] = {}
    for layer in model["layers"]:
        block = layer["name"].split(".attentions")[0]
        counts = [f"{n:,}" for n in layer["parameters"].values()]
        maps = [f"{h} x {w}" for h, w in layer["maps"].values()]
        line = lines.setdefault((block, *counts, *maps), [block, 0, layer["channels"], *counts, *maps])
        line[1] += 1
    return list(lines.values())
