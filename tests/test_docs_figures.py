"""docs/figures.py draws what the documents say it draws."""

import importlib.util
import json
import re
import statistics
from pathlib import Path

import pytest
import torch

import gspn

pytest.importorskip("sklearn")

ROOT = Path(__file__).parents[1]
PAGES = "".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("benchmarks.md", "quality.md"))
SPEC = importlib.util.spec_from_file_location("docs_figures", ROOT / "docs/figures.py")
figures = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(figures)


def test_the_chart_shows_the_published_times():
    cases = json.loads(figures.GROWTH.read_text())["growth"]["cases"]
    (axes,) = figures.draw_growth().axes
    for line, name in zip(axes.lines, figures.CONTENDERS, strict=True):
        rows = [c for c in cases if c["pass"] == "forward" and name in c["contenders"]]
        assert line.get_xydata().tolist() == [[c["side"] ** 2, c["contenders"][name]["ms"][1]] for c in rows]


@pytest.mark.parametrize("direction", gspn.DIRECTIONS)
def test_weights_set_by_hand_meet_the_stability_context_condition(direction):
    weights = figures.weights_by_colour(torch.rand(1, 3, 5, 7), direction, sharpness=1)
    assert weights.shape == (1, 1, 3, 5, 7) and weights.min() >= 0
    assert weights.sum(2) == pytest.approx(torch.ones(1, 1, 5, 7).numpy(), abs=1e-6)
    even = gspn.normalize_weights(torch.zeros(1, 1, 3, 5, 7), direction=direction)
    assert torch.equal(weights == 0, even == 0)  # where a neighbour is missing


def test_by_hand_a_pixel_takes_from_the_neighbour_of_its_colour():
    x = torch.zeros(1, 3, 3, 2)
    x[:, :, 0, 0] = x[:, :, 1, 1] = 1  # white: one pixel of the first column, and one in the second, a row below
    influence = figures.influence(figures.weights_by_colour(x, "right"), "right", (1, 1))
    assert influence[:, 0].tolist() == pytest.approx([1, 0, 0], abs=1e-6)


def rows_of(page: str) -> list[list[str]]:
    """The cells of the lines of its tables, without the line that begins with dashes."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]


def measured_at_one_thread(name: str) -> dict[str, dict[tuple[str, str], dict[str, float]]]:
    """By size, then by (dtype, pass): how many times the layer's or kernel's time each contender takes."""
    found = {}
    for case in json.loads((ROOT / "benchmarks/results/speed" / name).read_text())["cases"]:
        *size, features = case["size (B,C,H,W,S)"]
        ratios = {name: row["ratio"][1] for name, row in case["1 thread"].items()}
        size = " x ".join(map(str, size)) + f", S = {features}"
        found.setdefault(size, {})[case["dtype"], case["pass"]] = ratios
    return found


def test_the_ratios_of_one_layer_are_those_measured():
    text = PAGES[PAGES.index("## One layer") : PAGES.index("### Shared weights and bfloat16")]
    rows = rows_of(text)
    measured = measured_at_one_thread("layer-cpu-1-thread.json")
    names = {"self-attention": "attention", "linear attention": "linear attention"}
    seen, size = set(), ""
    for first, against, *cells in rows[1:]:
        size = first.partition(" (")[0] or size
        seen.add(size)
        found = [measured[size][dtype, way] for dtype in ("float32", "bfloat16") for way in ("forward", "train")]
        found = [ratios.get(names.get(against, "unfused, tuned")) for ratios in found]
        assert cells == ["" if r is None else f"{r:.0f}" if r >= 10 else f"{r:.1f}" for r in found], (size, against)
    assert seen == set(measured)


def test_the_ratios_on_small_maps_are_those_measured():
    text = PAGES
    text = text[text.index("### Small maps") : text.index("## Whole models")]
    table = {
        line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| 1 x") or "| 4 x" in line
    }
    cases = json.loads((ROOT / "benchmarks/results/speed/small-maps-cpu.json").read_text())["cases"]
    for case in cases:
        ratios = {name: f"{found['ratio'][1]:.2f}" for name, found in case["1 thread"].items()}
        shown = table[" x ".join(map(str, case["size (B,C,H,W,S)"][:4]))] if "dtype" in case else text
        assert ratios["attention"] in shown and ratios["linear attention"] in shown
    assert len(table) == 8


def test_the_ratios_of_shared_weights_and_bfloat16_are_those_measured():
    text = PAGES
    text = text[text.index("### Shared weights and bfloat16") : text.index("### Small maps")]
    rows = rows_of(text)
    measured = measured_at_one_thread("kernel-forms-cpu.json")
    assert len(rows) == 1 + len(measured) == 9
    for size, features, *cells in rows[1:]:
        found, passes = measured[f"{size}, S = {features}"], ("forward", "train")
        shared = [1 / found[dtype, name]["shared"] for dtype in ("float32", "bfloat16") for name in passes]
        assert cells == [f"{r:.2f}" for r in (*shared, *(found["bfloat16", name]["float32"] for name in passes))]


def test_what_the_mixer_is_worth_is_what_the_runs_say():
    pytest.importorskip("matplotlib")
    from benchmarks.quality.mixers import report, study

    text = PAGES
    text = text[text.index("## What the mixer is worth") : text.index("**Beside a convolution.**")]
    rows = rows_of(text)
    done = study.read(study.RESULTS)
    found = {task: report.at_best(done, task, "bare", study.STEPS) for task in ("classes", "tracing")}
    names = {contender.title: name for name, contender in study.CONTENDERS.items()}
    for title, *shown in rows[1:]:
        cells = [("classes", "1"), ("classes", "2"), ("tracing", "1"), ("tracing", "1.5"), ("tracing", "2")]
        means = []
        for task, setting in cells:
            runs = found[task][names[title]]
            means.append(100 * sum(run["test"][setting]["accuracy"] for run in runs) / len(runs))
        assert shown == [f"{mean:.1f}" for mean in means], title
    assert len(rows) == 10


def test_the_segmenters_are_those_of_the_reports():
    text = PAGES
    text = text[text.index("## Segmentation") : text.index("Segmenting one image")]
    folder = ROOT / "benchmarks/results/quality"
    reports = {
        optimizer: (folder / name / "report.md").read_text(encoding="utf-8")
        for optimizer, name in (("", "segmentation"), (", Muon", "segmentation-muon"))
    }
    split = lambda page: [line.split("|") for line in page.splitlines() if line.startswith("| ")]  # noqa: E731
    cells = lambda page: {row[1].strip(): [cell.strip() for cell in row[2:-1]] for row in split(page)}  # noqa: E731
    tables = re.split(r"\n\| `(gspn_\w+)`, (\d+) epochs(, Muon)? \| (\d+) x (\d+) ", text)[1:]
    for model, epochs, optimizer, width, height, rows in zip(*(tables[i::6] for i in range(6)), strict=True):
        (section,) = re.findall(
            rf"## {model}, trained at {width}x{height} for {epochs} epochs\n(.*?)(?=\n## |$)",
            reports[optimizer or ""],
            re.DOTALL,
        )
        measured, shown = cells(section), cells(rows.partition("\n")[2])
        assert shown and all(measured[mixer][3:6] == values for mixer, values in shown.items()), (model, optimizer)
    assert tables[2::6].count(None) == reports[""].count("\n## ")
    assert tables[2::6].count(", Muon") == reports[", Muon"].count("\n## ")


def test_what_the_scans_of_gspn_mobile_are_worth_is_what_the_report_says():
    page = PAGES
    page = page[page.index("| `gspn_mobile` |") : page.index("## Muon")]
    report = (ROOT / "benchmarks/results/quality/photos/report.md").read_text(encoding="utf-8")
    split = lambda text: [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| ")]  # noqa: E731
    measured = {mixer.strip(): [cell.strip() for cell in cells[-4:]] for mixer, *cells in split(report)}
    rows = {mixer.strip(): [cell.strip() for cell in cells] for mixer, *cells in split(page)[1:]}
    assert len(rows) == 3 and all(measured[mixer] == cells for mixer, cells in rows.items())


@pytest.mark.parametrize(
    ("begin", "end", "file", "count"),
    [
        ("Segmenting one image", "Then `gspn_micro`", "segmenters-mobile-cpu", 6),
        ("Then `gspn_micro`", "## Generators", "segmenters-cpu", 5),
    ],
)
def test_the_times_of_segmenters_are_those_measured(begin, end, file, count):
    text = PAGES
    text = text[text.index(begin) : text.index(end)]
    cases = json.loads((ROOT / f"benchmarks/results/speed/{file}.json").read_text())["cases"]
    measured = {f"{case['width']} x {case['height']}": case["mixers"] for case in cases}
    head, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "| " in line]
    sizes = head[1:-1]
    found = list(measured[sizes[-1]].values())
    shown = {(*row[1:-1], row[-1]) for row in rows}
    assert shown == {
        (
            *(f"{measured[size][mixer]['ratio'][1]:.2f}" for size in sizes),
            f"{measured[sizes[-1]][mixer]['extra_mib']:.0f}",
        )
        for mixer in measured[sizes[-1]]
    }
    assert len(rows) == len(found) == count and f"take {found[0]['ms'][1] / 1000:.1f} s" in text


def test_the_multiply_adds_of_generators_are_those_counted():
    text = PAGES
    cases = json.loads((ROOT / "benchmarks/results/speed/generators-macs.json").read_text())["cases"]
    for case in cases:
        ours, theirs = (case["models"][f"{kind}-{case['name']}"]["giga_macs"] for kind in ("GSPN-DiT", "DiT"))
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {case['name']} |")]
        assert f" {ours:,.1f} / {theirs:,.1f} ({ours / theirs:.2f}) |" in row


def test_the_losses_of_denoising_are_those_of_the_report():
    report = (ROOT / "benchmarks/results/quality/denoising/report.md").read_text(encoding="utf-8")
    text = PAGES
    text = text[text.index("GSPN-DiT was trained beside DiT") : text.index("So the scan is worth about half")]
    rows = rows_of(text)[1:]
    assert len(rows) == 6
    measured = {line.split("|")[1].strip(): line.split("|") for line in report.splitlines() if line.startswith("| ")}
    for title, *shown in rows:
        cells = [cell.strip() for cell in measured[title]]
        assert cells[3].endswith(" of 3") and shown == cells[4:10], title
    for run, where in (("dico-lr0.01-seed0-1200", "after 1,200 steps"), ("ours-lr0.01-seed0-800", "after 800 steps")):
        file = ROOT / f"benchmarks/results/quality/denoising/{run}steps.json"
        test = json.loads(file.read_text())["test"]
        told = PAGES[PAGES.index(where, PAGES.index("In as much time")) :].partition(";")[0]
        assert re.findall(r"0\.\d{4}", told)[:3] == [f"{test[s]['loss']:.4f}" for s in ("32x32", "48x48", "64x64")]


def test_random_sizes_and_other_images_are_those_of_the_reports():
    def cells_of(name):
        report = (ROOT / f"benchmarks/results/quality/denoising-{name}/report.md").read_text(encoding="utf-8")
        lines = [line.split("|")[1:-1] for line in report.splitlines() if line.startswith("| ")]
        return {line[0].strip(): [cell.strip() for cell in line] for line in lines}

    sizes, fashion, emoji = map(cells_of, ("sizes", "fashion", "emoji"))
    text = PAGES[PAGES.index("**Random sizes.**") : PAGES.index("**Other images.**")]
    rows = rows_of(text)[1:]
    assert len(rows) == 2
    for title, *shown in rows:
        row = sizes[title]
        assert row[2].endswith("of 3") and row[3] == "2" and shown == [row[4], row[7], row[8]], title
    assert all(sizes["GSPN-DiT"][i] in text for i in (4, 7, 8))
    text = PAGES[PAGES.index("**Other images.**") : PAGES.index("**Two hours.**")]
    rows = rows_of(text)[1:]
    assert len(rows) == 3
    for title, *shown in rows:
        assert shown == [row[title][i] for row in (fashion, emoji) for i in (4, 5, 8)], title
        assert fashion[title][2].endswith("of 3") == (title in ("GSPN-DiT", "DiT"))
        assert fashion[title][3] == emoji[title][3] == "1"


def test_the_longer_trainings_of_denoising_are_those_of_the_runs():
    text = PAGES
    text = text[text.index("| after 4,800 steps") : text.index("All took the rate that was best")]
    rows = rows_of(text)[1:]
    runs = ("ours", "ours-positions", "ours-gated-positions", "dit")
    for name, (_, loss, noisiest, larger) in zip(runs, rows, strict=True):
        file = ROOT / f"benchmarks/results/quality/denoising/{name}-lr0.01-seed0-4800steps.json"
        found = json.loads(file.read_text())["test"]
        expected = (found["32x32"]["loss"], found["32x32"]["by_timestep"][-1], found["64x64"]["loss"])
        assert [loss, noisiest, larger] == [f"{value:.4f}" for value in expected], name


def test_the_ways_to_larger_samples_are_those_of_the_results():
    rows = json.loads((ROOT / "benchmarks/results/quality/cifar10-generation.json").read_text())["rows"]
    text = " ".join(PAGES.split())
    text = text[text.index("For larger images `--enlarge") : text.index("A denoising step with guidance takes")]
    ways = ("enlarged", "dilated", "shifted", "guided")
    told = [row for row in rows if any(way in row["run"] for way in ways)]
    assert len(told) == 12
    for row in told:
        share = format(row["accuracy"], ".0%")
        assert re.search(rf"{row['frechet_distance']:.2f} and {share}", text), row["run"]


def test_what_keeping_attentions_costs_is_what_was_counted():
    counted = json.loads((ROOT / "benchmarks/results/speed/stable-diffusion-structure.json").read_text())
    counted = counted["SDXL, one step, attentions kept"]
    text = (ROOT / "docs/text-to-image.md").read_text(encoding="utf-8")
    text = text[text.index("| kept | 1024x1024 |") : text.index("In SDXL the lowest level")]
    rows = rows_of(text)
    sizes = rows[0][1:]
    for names, row in zip(("none", "mid_block", "lowest", "level:1"), rows[1:], strict=True):
        shares = [counted[size][names]["operations"] / counted[size]["all"]["operations"] for size in sizes]
        assert row[1:] == [f"{share:.0%}" for share in shares]


def test_the_losses_of_distilling_for_sizes_are_those_of_the_report():
    report = (ROOT / "benchmarks/results/quality/text-to-image-sizes/report.md").read_text(encoding="utf-8")
    text = (ROOT / "docs/text-to-image.md").read_text(encoding="utf-8")
    text = text[text.index("| student | optimizer |") : text.index("Away from the trained size")]
    split = lambda page: [[c.strip() for c in line.split("|")[1:-1]] for line in page.splitlines() if "|" in line]  # noqa: E731
    measured = {}
    for steps, page in zip(("600", "2,400"), report[: report.index("## 64x64")].split("## 2400 steps"), strict=True):
        rows = split(page[: page.index("Minus attention")])
        measured |= {(title, optimizer, steps): row for title, optimizer, _, *row in rows}
    rows = split(text)[2:]
    assert len(rows) == 8
    for title, optimizer, steps, teachers, *losses in rows:
        found = measured[title.replace("`", ""), optimizer, steps]
        assert teachers == found[0]
        assert losses == [cell.partition("(")[2].partition(" ")[0] for cell in found[1:]]


def test_what_replacing_the_weights_costs_is_what_was_measured():
    found = json.loads((ROOT / "benchmarks/results/quality/mixers/inside/classes-bare.json").read_text())
    text = PAGES
    text = text[text.index("| | learning rate | its own weights |") : text.index("So centring, at either rate")]
    rows = rows_of(text)[1:]
    names = ("gspn-global", "gspn-global, rate 0.012", "gspn-center", "gspn-center, rate 0.012")
    for row, content in zip(rows, (found[name] for name in names), strict=True):
        assert (content["steps"], content["seed"]) == (600, 0)
        kept = ("nothing", "weights are 1/3", "weights of another photo")
        shares = [content["replaced"]["1"][part]["accuracy"] for part in kept]
        largest, first, last = (
            mean_of_blocks(content, value)
            for value in (
                lambda block, way: way["largest"],
                lambda block, way: way["state by line"][0] / block["x"]["rms"],
                lambda block, way: way["state by line"][-1] / block["x"]["rms"],
            )
        )
        wanted = [f"{content['rate']:g}", *(f"{100 * share:.1f}" for share in shares), f"{largest:.2f}"]
        assert row[1:] == [*wanted, f"{last / first:.1f}"]


def mean_of_blocks(content, value):
    """The mean over blocks and directions of value(block, direction)."""
    return statistics.fmean(value(block, way) for block in content["blocks"] for way in block["directions"].values())


def test_what_the_mixer_is_worth_beside_a_convolution_is_what_the_report_says():
    report = (ROOT / "benchmarks/results/quality/mixers/report.md").read_text(encoding="utf-8")
    text = PAGES
    text = text[text.index("**Beside a convolution.**") : text.index("The convolution narrows the differences")]
    split = lambda page: [[c.strip() for c in line.split("|")[1:-1]] for line in page.splitlines() if "|" in line]  # noqa: E731
    measured = {row[0]: row for row in split(report[report.index("## classes, conv") :].partition("Times are")[0])}
    rows = split(text)[2:]
    assert len(rows) == 5
    for title, *shown in rows:
        row = measured[title]
        assert row[3] == "1" and shown == [row[7], row[5], row[8], row[9]]


def test_what_muon_brings_is_what_the_runs_say():
    pytest.importorskip("matplotlib")
    from benchmarks.quality.mixers import study

    text = PAGES[PAGES.index("## Muon") : PAGES.index("## What the mixer is worth")]
    told = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")][1:]
    names = {contender.title: name for name, contender in study.CONTENDERS.items()}
    for optimizer, title, rates, *accuracies in told:
        done = study.read(study.RESULTS.with_name("mixers" if optimizer == "AdamW" else "mixers-muon"))
        name = names[title]
        best = done[study.Run("classes", "bare", name, study.best_rate(done, "classes", "bare", name), 0)]
        tried = [run for run in done if run[:3] == ("classes", "bare", name) and run.seed == 0 and run.steps == 600]
        assert int(rates) == len(tried), title
        assert accuracies == [f"{100 * best['test'][s]['accuracy']:.1f}" for s in ("1", "1.5", "2")], title
    assert len(told) >= 6
    rows = {
        name: [json.loads(line) for line in (ROOT / f"benchmarks/results/quality/{name}.jsonl").open()]
        for name in ("gspn-mobile-cifar10", "gspn-mobile-cifar10-muon", "gspn-mobile-cifar10-50-muon")
    }
    for best in (max(row["top1"] for row in each) for each in rows.values()):
        assert f"{best:.2%}" in PAGES
    assert f"{rows['gspn-mobile-cifar10-muon'][9]['top1']:.1%}" in text
    assert f"{rows['gspn-mobile-cifar10'][9]['top1']:.1%}" in text
    for name, folder in (
        ("ours", "denoising"),
        ("dit", "denoising"),
        ("ours", "denoising-muon"),
        ("dit", "denoising-muon"),
    ):
        file = ROOT / f"benchmarks/results/quality/{folder}/{name}-lr0.01-seed0-800steps.json"
        test = json.loads(file.read_text())["test"]
        assert all(f"{test[size]['loss']:.4f}" in text for size in ("32x32", "64x64")), (name, folder)
    for name in ("gspn-center", "dw7"):  # beside a convolution
        file = ROOT / f"benchmarks/results/quality/mixers-muon/classes-conv-{name}-lr0.006-seed0-600steps.json"
        test = json.loads(file.read_text())["test"]
        assert all(f"{100 * test[size]['accuracy']:.1f}" in text for size in ("1", "1.5", "2")), name
