"""The pictures of `gspn bench`: one for each suite, with the machine's name in the title."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from gspn.bench.contenders import CONTENDERS, OURS
from gspn.bench.suites import MODELS, PASSES
from gspn.plots import BLUE, GREY, save

COLOURS = (BLUE, "#85aede", "#c62828", "#3a8f5c", "#e0a022", "#8e6bb0", "#e07b22")
STYLES = dict(zip(CONTENDERS, COLOURS, strict=True))
OF_MODELS = ("#0b1f33", "#1c4372", BLUE, "#6d9fd3", "#a9c8ea", "#3a8f5c", "#e07b22", "#c62828")  # GSPN's in blue
SIZES = {"forward": "forward", "training": "forward + backward"}


def draw(results: dict, folder: Path) -> list[str]:
    """Draws what was measured; returns the names of the files."""
    drawn = []
    for suite, figure in {"layer": _layer, "growth": _growth, "models": _models}.items():
        part = results.get(suite)
        if part and (part if suite == "layer" else part["cases"]):
            made = figure(part, results)
            made.supxlabel(_caption(results), fontsize=8, color=GREY)
            save(made, folder / f"{suite}.png")
            drawn.append(f"{suite}.png")
    return drawn


def _caption(results):
    threads = results["threads"]
    where = "GPU" if threads is None else f"{threads} thread{'s' * (threads > 1)}"
    machine = results["machine"]
    flags = machine["cpu"].partition(" (avx")[2].rstrip(")")
    where += f" (avx{flags})" if flags and threads else ""
    return (
        f"{where}, {results['dtype']}, batch {results['batch']}; torch {machine['torch']}, gspn {machine['gspn']}, "
        f"{machine['date']}; {results['clock']}, medians of rounds in which all take turns"
    )


def _bars(axes, groups, values, colours, labels):
    """Bars in groups; `values` has, by name, a number or None for each group. A missing one leaves a gap."""
    width, many = 0.84 / len(values), len(values) * len(groups) > 16
    for j, (name, row) in enumerate(values.items()):
        at = [(i + (j - (len(values) - 1) / 2) * width, value) for i, value in enumerate(row) if value]
        if at:
            bars = axes.bar(*zip(*at, strict=True), width, color=colours[name], label=name)
            axes.bar_label(bars, [labels(value) for _, value in at], fontsize=7, padding=1, rotation=90 * many)
    axes.set_xticks(range(len(groups)), groups, fontsize=9)
    axes.set_yscale("log")
    axes.margins(y=0.15)
    _plain(axes)


def _plain(axes):
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, axis="y")
    axes.set_axisbelow(True)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _layer(cases, results):
    figure = Figure(figsize=(12, 7.6), layout="constrained")
    figure.suptitle(f"One layer on {results['title']}: time as a multiple of GSPN2d's")
    names = [name for name in CONTENDERS if name != OURS]
    for axes, told in zip(figure.subplots(2, 1), PASSES, strict=True):
        rows = [case for case in cases if case["pass"] == told]
        groups = ["x".join(map(str, case["shape"])) for case in rows]
        groups = [
            f"{group}\nGSPN2d: {_digits(case['contenders'][OURS]['ms'][1])} ms" if OURS in case["contenders"] else group
            for group, case in zip(groups, rows, strict=True)
        ]
        values = {n: [case["contenders"].get(n, {}).get("ratio", [None] * 2)[1] for case in rows] for n in names}
        _bars(axes, groups, values, STYLES, _digits)
        axes.axhline(1, color=BLUE, lw=1.5)
        axes.set_ylabel("times as long as GSPN2d")
        axes.set_title(f"{SIZES[told]}; above the line GSPN2d is faster", fontsize=10, loc="left")
    _legend(figure)
    return figure


def _growth(part, results):
    figure = Figure(figsize=(13, 8.4), layout="constrained")
    figure.suptitle(f"One layer of {part['channels']} channels on {results['title']}, against the size of the map")
    panels = figure.subplots(2, 2, sharex="col")
    for column, told in enumerate(PASSES):
        rows = [case for case in part["cases"] if case["pass"] == told]
        for axes, key in zip(panels[:, column], ("ms", "extra_mib"), strict=True):
            what = "time" if key == "ms" else "memory"
            for name in CONTENDERS:
                points = [(row["side"], row["contenders"][name][key]) for row in rows if name in row["contenders"]]
                points = [(side**2, value[1] if key == "ms" else value) for side, value in points if value]
                if points:
                    grows = part["exponents"][told][name][what]
                    label = name if grows is None else f"{grows:.2f}  {name}"
                    style = dict(color=STYLES[name], lw=2.4 if name == OURS else 1.5, ms=4)
                    axes.plot(*zip(*points, strict=True), marker="o", label=label, **style)
            axes.set(xscale="log", yscale="log")
            axes.set_title(f"{what}, {SIZES[told]}", fontsize=10, loc="left")
            axes.set_ylabel("milliseconds" if key == "ms" else "peak beyond the inputs, MiB")
            _plain(axes)
            if axes.lines:
                axes.legend(frameon=False, fontsize=8, title="p, cost ~ pixels^p", title_fontsize=8, loc="upper left")
            sides = [row["side"] for row in rows]
            axes.set_xticks([side**2 for side in sides], [f"{side}²" for side in sides], fontsize=8)
            axes.xaxis.set_minor_locator(NullLocator())
            if key == "extra_mib":
                axes.set_xlabel("pixels of the map")
    return figure


def _models(part, results):
    figure = Figure(figsize=(13, 7.6), layout="constrained")
    figure.suptitle(f"Whole models on {results['title']}, evaluation")
    names = list(dict.fromkeys(name for case in part["cases"] for name in case["models"]))
    spare = iter(OF_MODELS[len(MODELS) :])
    colours = {name: OF_MODELS[MODELS.index(name)] if name in MODELS else next(spare) for name in names}
    groups = [f"{case['side']} x {case['side']}" for case in part["cases"]]
    for axes, key in zip(figure.subplots(2, 1), ("images/s", "extra_mib"), strict=True):
        values = {name: [case["models"].get(name, {}).get(key) for case in part["cases"]] for name in names}
        _bars(axes, groups, values, colours, _digits)
        axes.set_title(
            "images/s" if key == "images/s" else "peak memory beyond weights and images, MiB", fontsize=10, loc="left"
        )
    _legend(figure)
    return figure


def _legend(figure):
    """One legend of all panels: what could not be measured is missing in some of them."""
    handles = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles, loc="outside right center", frameon=False, fontsize=9)


def _digits(value):
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
