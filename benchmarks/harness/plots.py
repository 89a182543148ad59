"""Draws figures and tables from result files.

python -m benchmarks.harness.plots benchmarks/results/speed/layer-cpu.json [...]   writes NAME.png and NAME.md beside it
"""

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from benchmarks.harness import harness

COLOURS = {
    "gspn": "#2f6db3",
    "gspn, kernel alone": "#85aede",
    "unfused, tuned": "#e07b22",
    "unfused": "#f0b27a",
    "linear attention": "#3a8f5c",
    "relu attention + 5x5": "#8bc34a",
    "attention": "#c62828",
    "reference": "#5f6368",
    "prototype": "#8e6bb0",
    "prototype, unfused": "#c3aed6",
}


def label_of(case: dict) -> str:
    if "model" in case:
        return f"{case['model'].removeprefix('gspn_')} {case['side']}²\nB{case['batch']}"
    batch, channels, height, width, features = case["size (B,C,H,W,S)"]
    return f"B{batch} C{channels}\n{height}x{width} S{features}"


def ratios(content: dict, title: str, cases: list[dict], key: str, path: Path) -> None:
    """Bars: time of each contender as a multiple of ours, with quartiles; the line at 1 is ours."""
    names = [n for n in COLOURS if n != "gspn" and any(n in c[key] for c in cases)]
    figure = Figure(figsize=(max(8, 1.75 * len(cases)), 4.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / max(len(names), 1)
    for j, name in enumerate(names):
        at = [i for i, c in enumerate(cases) if name in c[key]]
        low, middle, high = zip(*(cases[i][key][name]["ratio"] for i in at), strict=True)
        errors = [
            [m - q for m, q in zip(middle, low, strict=True)],
            [q - m for m, q in zip(middle, high, strict=True)],
        ]
        positions = [i + (j - (len(names) - 1) / 2) * width for i in at]
        bars = axes.bar(positions, middle, width, yerr=errors, color=COLOURS[name], label=name, error_kw={"lw": 0.7})
        axes.bar_label(bars, [f"{m:.1f}" if m < 10 else f"{m:.0f}" for m in middle], fontsize=6.5, padding=1)
    axes.axhline(1, color=COLOURS["gspn"], lw=1.5, label="gspn (this library)")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter())
    labels = [label_of(c) + f" {c['pass']}" * ("model" in c) for c in cases]
    axes.set_xticks(range(len(cases)), labels, fontsize=8)
    axes.set_ylabel("time, as a multiple of gspn's")
    axes.set_title(f"{title}: {key}. Above the line gspn is faster.", fontsize=11)
    axes.legend(fontsize=7.5, ncols=4, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    environment = content["environment"]
    figure.supxlabel(
        f"{environment['cpu']}; torch {environment['torch']}; commit {environment['commit'][:8]}; medians of "
        f"{content['rounds']} interleaved rounds{fewer(content, ' (fewer for slow ones: see the table)')}, "
        "bars: quartiles",
        fontsize=7,
        color="#5f6368",
    )
    figure.savefig(path, dpi=120)
    print(f"wrote {path}")


def fewer(content: dict, told: str) -> str:
    """`told`, if a contender was timed in fewer rounds than the file says of all."""
    found = [found for case in content["cases"] for key, found in case.items() if key.endswith(("thread", "threads"))]
    return told if any("rounds" in row for rows in found for row in rows.values()) else ""


def cell(row: dict) -> str:
    """The ratio, with the rounds of a contender that had fewer."""
    return f"{row['ratio'][1]:.2f}" + (f" ({row['rounds']})" if "rounds" in row else "")


def table(content: dict, path: Path) -> None:
    """One row for each case and number of threads: our time, the others as multiples of it, peak extra memory."""
    names = [n for n in COLOURS if any(n in row.get("1 thread", {}) for row in content["cases"])]
    others = [n for n in names if n != "gspn"]
    about = (
        f"Machine: {content['environment']['cpu']}, {content['environment']['cores']} cores; "
        f"torch {content['environment']['torch']}; commit {content['environment']['commit'][:12]}; "
        f"{content['environment']['date']}. Medians of {content['rounds']} interleaved rounds"
        f"{fewer(content, ', or of as many as stand in brackets')}."
    )
    header, rows = ["case", "pass", "dtype", "threads", "gspn, ms", *(f"{n}, x" for n in others), "peak extra MiB"], []
    for case in content["cases"]:
        memory = case.get("peak extra MiB", {})
        told = ", ".join(f"{n} {memory[n]:g}" for n in names if n in memory)
        for key in (k for k in case if k.endswith(("thread", "threads"))):
            found = case[key]
            cells = [" ".join(label_of(case).split()), case["pass"], case.get("dtype", "float32"), key[0]]
            cells += [f"{found['gspn']['ms'][1]:.2f}", *(cell(found[n]) if n in found else "" for n in others)]
            rows.append([*cells, told if key.startswith("1") else ""])
    path.write_text(f"{about}\n\n{harness.table(header, rows)}\n")
    print(f"wrote {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    for path in parser.parse_args().results:
        content = json.loads(path.read_text())
        table(content, path.with_suffix(".md"))
        if "model" in content["cases"][0]:
            for dtype in ("float32", "bfloat16"):
                cases = [c for c in content["cases"] if c.get("dtype", "float32") == dtype]
                to = path.with_name(path.stem + "-bfloat16" * (dtype == "bfloat16") + ".png")
                if cases:
                    ratios(content, f"Whole models, {dtype}", cases, "1 thread", to)
            continue
        for what in ("forward", "train"):
            cases = [c for c in content["cases"] if c["pass"] == what and c["dtype"] == "float32"]
            title = f"GSPN layer, {what}, float32"
            ratios(content, title, cases, "1 thread", path.with_name(f"{path.stem}-{what}.png"))


if __name__ == "__main__":
    main()
