"""Draws tables and figures from layer-gpu.json.

python -m benchmarks.harness.plots_gpu DIR/layer-gpu.json     writes layer-gpu.md and up to three figures beside it
"""

import argparse
import json
from pathlib import Path

from benchmarks.harness import harness
from benchmarks.harness.gpu_harness import REHEARSAL, best_ms

COLOURS = ("#2f6db3", "#e07b22", "#3a8f5c", "#c62828", "#8e6bb0", "#5f6368", "#85aede", "#f0b27a", "#c3aed6")


def contenders(rows: dict[str, dict]) -> list[str]:
    """Every name that was tried, in the order of first appearance."""
    names: dict[str, None] = {}
    for row in rows.values():
        names |= dict.fromkeys(n for n, r in row.items() if isinstance(r, dict))
    return list(names)


def cell(row: dict, key: str | None = None) -> str:
    """A cell: median time as called, the time from a graph if there is one, and the figure `key` if given."""
    if "ms" not in row:
        return row.get("why", "").removeprefix("not measured: ")
    text = f"{row['ms'][1]:.3g}"
    if "ms" in row.get("graph", {}):
        text += f" / {row['graph']['ms'][1]:.3g}"
    if key and key in row:
        text += f" ({row[key]:.0%})" if key == "of copy" else f" ({row[key]:g})"
    return text


def table(rows: dict[str, dict], key: str | None) -> str:
    names, lines = contenders(rows), []
    for case, row in rows.items():
        cells = [cell(row[n], key) if n in row else "" for n in names]
        moved = f", {row['gib']:.3g} GiB" if "gib" in row else ""
        lines.append([f"{case}{moved}", *(cells if "why" not in row else [row["why"], *[""] * (len(names) - 1)])])
    return harness.table(["case", *names], lines)


def document(content: dict) -> str:
    """The whole file as Markdown."""
    environment, device, sections = content["environment"], content["device before"], content["sections"]
    after = content.get("device after", {})
    lines = ["# GSPN on a GPU", ""]
    if content["rehearsal"]:
        lines += [f"**{REHEARSAL}.**", ""]
    lines += [
        f"{device['name']}; {'; '.join(f'{k} {v}' for k, v in device.items() if k != 'name')}.  ",
        f"torch {environment['torch']}, Python {environment['python']}, commit "
        f"{environment['commit'][:12] or 'unknown'}, {environment['date']}.  ",
        f"Clocks afterwards: {'; '.join(f'{k} {v}' for k, v in after.items() if 'clocks' in k)}.",
        "",
        "Times in ms, medians of interleaved rounds, cold L2 cache: as called / replayed from a CUDA graph.",
        "",
    ]
    copy = sections.get("copy", {}).get("copy", {})
    if "GB/s" in copy:
        lines += [
            f"Copy bandwidth (read + written): {', '.join(f'{k} {v} GB/s' for k, v in copy['GB/s'].items())}.",
            "",
        ]
    if content.get("wrong"):
        lines += ["## Wrong results", "", *(f"- {w}" for w in content.get("wrong")), ""]
    goals = [[g["goal"], g["wanted"], g["measured"] or "", g["verdict"]] for g in content.get("goals", [])]
    lines += ["## Goals", "", harness.table(["goal", "wanted", "measured", ""], goals)]
    titles = {
        "scan": ("The scan alone: bytes that it has to move, share of copy bandwidth in brackets", "of copy"),
        "layer": ("The layer with its projections, extra MiB in brackets", "extra_mib"),
        "models": ("Whole models, images/s in brackets", "images/s"),
    }
    for section, (title, key) in titles.items():
        if sections.get(section):
            lines += ["", f"## {title}", "", table(sections[section], key)]
    if sections.get("tune"):
        plans = []
        for case, row in sections["tune"].items():
            won = row.get("winner", {"plan": row.get("why", "none ran"), "times the speed of the chosen": ""})
            plans.append([case, won["plan"], won["times the speed of the chosen"]])
        header = ["case", "the fastest", "times the speed of the chosen"]
        lines += ["", "## Launch plans", "", harness.table(header, plans)]
    if content["packages"]:
        lines += ["", *(f"- {name}: {why}" for name, why in content["packages"].items())]
    if content["left"]:
        lines += ["", f"Not reached in time: {'; '.join(content['left'])}."]
    return "\n".join(lines) + "\n"


def shares(content: dict, path: Path) -> None:
    """Bars: which share of the copy bandwidth each form of the scan reaches, forward, bfloat16, per channel."""
    rows = {
        n: r
        for n, r in content["sections"].get("scan", {}).items()
        if "bfloat16, per channel, forward" in n and "why" not in r
    }
    if rows:
        figure, axes = _figure(content, max(7, 0.9 * len(rows)))
        names = contenders(rows)
        for j, name in enumerate(names):
            at = [i for i, r in enumerate(rows.values()) if "of copy" in r.get(name, {})]
            values = [list(rows.values())[i][name]["of copy"] for i in at]
            positions = [i + (j - (len(names) - 1) / 2) * 0.8 / len(names) for i in at]
            axes.bar(positions, values, 0.8 / len(names), color=COLOURS[j % len(COLOURS)], label=name)
        axes.set_xticks(range(len(rows)), [n.split(",")[0].replace(": ", "\n") for n in rows], fontsize=7, rotation=40)
        axes.set_ylabel("share of copy bandwidth")
        axes.legend(fontsize=7, frameon=False)
        figure.savefig(path, dpi=120)


def crossover(content: dict, path: Path) -> None:
    """Lines: time of each layer over the side of the feature map, bfloat16, forward, one panel a width."""
    rows = [
        (n, r)
        for n, r in content["sections"].get("layer", {}).items()
        if r.get("family") in ("crossover", "toy") and "bfloat16, forward" in n and "+ backward" not in n
    ]
    widths = sorted({n.split()[1] + " " + n.split()[2] for n, _ in rows})
    if rows:
        figure, panels = _figure(content, 6 * len(widths), len(widths))
        for axes, width in zip(panels if len(widths) > 1 else [panels], widths, strict=True):
            some = [(r["side"], r) for n, r in rows if width in n]
            for j, name in enumerate(contenders(dict(enumerate(r for _, r in some)))):
                points = [(side, best_ms(r[name])) for side, r in some if best_ms(r.get(name, {}))]
                if points:
                    colour = COLOURS[j % len(COLOURS)]
                    axes.plot(*zip(*points, strict=True), marker="o", label=name, color=colour)
            axes.set(xscale="log", yscale="log", title=width, xlabel="side of the feature map", ylabel="ms")
            axes.legend(fontsize=7, frameon=False)
        figure.savefig(path, dpi=120)


def models(content: dict, path: Path) -> None:
    """Bars: images/s of whole models, each mixer."""
    rows = content["sections"].get("models", {})
    if rows:
        figure, axes = _figure(content, max(7, 1.1 * len(rows)))
        names = contenders(rows)
        for j, name in enumerate(names):
            at = [i for i, r in enumerate(rows.values()) if "images/s" in r.get(name, {})]
            values = [list(rows.values())[i][name]["images/s"] for i in at]
            positions = [i + (j - (len(names) - 1) / 2) * 0.8 / len(names) for i in at]
            axes.bar(positions, values, 0.8 / len(names), color=COLOURS[j], label=name)
        axes.set_xticks(range(len(rows)), list(rows), fontsize=6, rotation=40)
        axes.set(yscale="log", ylabel="images/s")
        axes.legend(fontsize=7, frameon=False)
        figure.savefig(path, dpi=120)


def _figure(content: dict, width: float, panels: int = 1):
    from matplotlib.figure import Figure  # not every machine with a GPU has it; the table needs nothing

    figure = Figure(figsize=(width, 4.6), layout="constrained")
    environment = content["environment"]
    caption = f"{content['device before']['name']}; torch {environment['torch']}; commit {environment['commit'][:8]}"
    figure.supxlabel(caption, fontsize=7, color="#5f6368")
    return figure, figure.subplots(1, panels)


def write(content: dict, path: Path) -> None:
    path.with_suffix(".md").write_text(document(content))
    print(f"wrote {path.with_suffix('.md')}")
    try:
        for draw in (shares, crossover, models):
            draw(content, path.with_name(f"{path.stem}-{draw.__name__}.png"))
    except ModuleNotFoundError as error:
        print(f"no figures: {error.name} is not installed")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    path = parser.parse_args().result
    write(json.loads(path.read_text()), path)


if __name__ == "__main__":
    main()
