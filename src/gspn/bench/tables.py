"""What `gspn bench` prints: short tables, and what was left out."""

from rich.table import Table

from gspn.bench.contenders import CONTENDERS, OURS
from gspn.bench.suites import PASSES


def reasons(results: dict) -> list[str]:
    """A line for each reason why something was left out."""
    lines: dict[tuple, list] = {}
    for each in results["left out"]:
        lines.setdefault((each["suite"], each["why"]), []).append(each["what"])
    return [f"left out of {suite}: {'; '.join(what)}: {why}" for (suite, why), what in lines.items()]


def tables(results: dict) -> list[Table]:
    """Ratios of layers, growth, models: of those that were measured."""
    found = []
    for told in PASSES:
        if cases := [case for case in results.get("layer", ()) if case["pass"] == told]:
            found.append(_layer(cases, told))
    if results.get("growth", {}).get("cases"):
        found.append(_growth(results["growth"]))
    if results.get("models", {}).get("cases"):
        found.append(_models(results["models"]))
    return found


def _table(title, *columns):
    table = Table(title=title, title_justify="left", padding=(0, 0), collapse_padding=True)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def _layer(cases, told):
    sizes = ["{1}\n{2}x{3}".format(*case["shape"]) for case in cases]
    table = _table(f"One layer, {told}: times the time of GSPN2d", "layer", *sizes)
    ours = [case["contenders"].get(OURS) for case in cases]
    table.add_row("gspn, ms", *(f"{row['ms'][1]:.3g}" if row else "" for row in ours))
    for name in CONTENDERS:
        ratios = [case["contenders"].get(name, {}).get("ratio") for case in cases]
        if name != OURS:
            table.add_row(name, *(f"{ratio[1]:.2f}" if ratio else "" for ratio in ratios))
    return table


def _growth(part):
    table = _table("Cost ~ pixels^p; the side from which on GSPN2d is faster, of those measured", "layer")
    for told in part["exponents"]:
        for column in ("p, time", "p, memory", "faster from"):
            table.add_column(f"{told}\n{column}", justify="right")
    for name in CONTENDERS:
        cells = []
        for told, rows in part["exponents"].items():
            cells += ["" if p is None else f"{p:.2f}" for p in (rows[name]["time"], rows[name]["memory"])]
            cross = part["crossovers"][told].get(name)
            side = cross and cross["behind from side"]
            last = cross and cross["compared up to side"]
            cells.append("" if cross is None else f"not to {last}" if side is None else f"{side:.0f}")
        table.add_row(name, *cells)
    return table


def _models(part):
    columns = "size, model", "M params", "G MACs", "images/s", "x tiny", "MiB"
    table = _table("Models, evaluation; x tiny: times the time of gspn_tiny", *columns)
    for case in part["cases"]:
        for name, row in case["models"].items():
            memory = "" if row["extra_mib"] is None else f"{row['extra_mib']:,.0f}"
            ratio = f"{row['ratio'][1]:.2f}" if "ratio" in row else ""
            figures = f"{row['parameters'] / 1e6:.1f}", f"{row['macs'] / 1e9:.2f}", f"{row['images/s']:.3g}"
            table.add_row(f"{case['side']}, {name}", *figures, ratio, memory)
    return table
