"""What the documents say of benchmarks and results is there: files, commands, and a row for each published figure."""

import importlib
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS, RESULTS = ROOT / "benchmarks", ROOT / "benchmarks" / "results"
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS += sorted(BENCHMARKS.rglob("*.md"))
SOURCES = sorted([*BENCHMARKS.rglob("*.py"), *(ROOT / "examples").rglob("*.py")])
JSON_FILES = sorted(RESULTS.rglob("*.json"))
LINK = re.compile(r"\]\(([^)\s#]*)(?:#[^)\s]*)?\)")
COMMAND = re.compile(r"python -m ((?:benchmarks|examples)[\w.]*\w)")
SOURCE = re.compile(r"(?<![\w/.])(?:benchmarks|examples)/[\w/.-]*\w")
PROGRAMS = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in SOURCES if "ArgumentParser(" in path.read_text()
]
# folders with a file for each run, which a report sums up
STUDIES = ("mixers", "mixers-muon", "photos", "segmentation", "segmentation-muon", "text-to-image-sizes")
STUDIES += ("denoising", "denoising-muon", "denoising-sizes", "denoising-fashion", "denoising-emoji")
RENAMED = ("stable_diffusion", "generators")  # of benchmarks.speed, which also go by their names of before


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def strings(value) -> list[str]:
    """Every text in what a JSON file holds."""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    return (
        [value] if isinstance(value, str) else [s for v in value for s in strings(v)] if isinstance(value, list) else []
    )


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_every_relative_link_resolves(document):
    targets = [t for t in LINK.findall(document.read_text(encoding="utf-8")) if t and "://" not in t]
    assert [t for t in targets if not (document.parent / t).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_every_link_to_a_heading_resolves(document):
    for page, anchor in re.findall(r"\]\(([\w./-]*\.md)?#([\w-]+)\)", document.read_text(encoding="utf-8")):
        target = document.parent / page if page else document
        headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, page


def test_links_are_found_at_all():
    links = {
        name: LINK.findall((ROOT / name).read_text(encoding="utf-8")) for name in ("README.md", "docs/benchmarks.md")
    }
    assert {"docs/images/growth.png", "docs/training.md"} <= set(links["README.md"])
    assert "../benchmarks/results/speed/models-cpu.md" in links["docs/benchmarks.md"]


def rows_of(page: str, header: str) -> list[list[str]]:
    """The cells of the table with that first header cell."""
    lines = page[page.index(f"| {header} |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_page_of_benchmarks_has_the_published_figures():
    """Its tables whose rows are cases of one result file."""
    page = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    content = {name: json.loads((RESULTS / f"speed/{name}.json").read_text()) for name in ("growth-cpu", "models-cpu")}
    times = {(case["side"], case["pass"]): case["contenders"] for case in content["growth-cpu"]["growth"]["cases"]}
    sizes = [(64, "forward"), (256, "forward"), (1024, "forward"), (64, "training"), (1024, "training")]
    told = rows_of(page, "layer")
    assert len(told) == 7
    for name, *cells in told:
        for size, cell in zip(sizes, cells, strict=False):
            measured = times[size].get(name)
            assert (
                cell == ""
                if measured is None
                else float(cell.replace(",", "")) == pytest.approx(measured["ms"][1], rel=5e-3)
            ), (name, size)
    told = rows_of(page, "model | pass")
    cases = {
        tuple(case[key] for key in ("model", "side", "batch", "pass", "dtype")): case["1 thread"]
        for case in content["models-cpu"]["cases"]
    }
    assert 2 * len(told) == len(cases)
    rivals = ["attention", "linear attention", "relu attention + 5x5"]
    wanted = {}
    for (name, side, batch, passes, dtype), found in cases.items():
        ratios = [found[other]["ratio"][1] for other in (*rivals, *(["reference"] if dtype == "float32" else []))]
        row = wanted.setdefault((f"{name}, {side} x {side}, batch {batch}", passes), [])
        row += [1000 * batch / found["gspn"]["ms"][1], *ratios]
    for model, passes, *cells in told:
        row = wanted[model, passes]
        assert [float(cell) for cell in cells] == [
            pytest.approx(value, abs=0.051 if i in (0, 5) else 0.0051) for i, value in enumerate(row)
        ]


def test_the_page_of_benchmarks_has_every_case_where_a_model_loses():
    """Its table of them: all rivals whose time, over GSPN's, rounds to less than 1 on one thread or two."""
    measured = {}
    for threads, name in (("1 thread", "models-cpu"), ("2 threads", "models-cpu-2-threads")):
        for case in json.loads((RESULTS / f"speed/{name}.json").read_text())["cases"]:
            where = f"{case['model']}, {case['side']} x {case['side']}"
            for rival, found in case[threads].items():
                key = (where, f"batch {case['batch']}, {case['pass']}", case["dtype"], rival)
                measured.setdefault(key, []).append(f"{found['ratio'][1]:.2f}")
    lost = {(*key[1:], *ratios) for key, ratios in measured.items() if min(map(float, ratios)) < 1}
    assert {key[0] for key, ratios in measured.items() if min(map(float, ratios)) < 1} == {"gspn_micro, 28 x 28"}
    page = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    told = [tuple(row) for row in rows_of(page, "gspn_micro, 28 x 28")]
    assert set(told) == lost and len(told) == len(lost)


@pytest.mark.parametrize("name", [n for n in STUDIES if not n.startswith("mixers")])  # whose report draws too
def test_a_study_s_report_is_what_its_runs_give(name):
    pytest.importorskip("matplotlib")
    pytest.importorskip("diffusers")
    program = name.replace("-", "_") if name.startswith("text") else name.partition("-")[0]
    study, folder = importlib.import_module(f"benchmarks.quality.{program}"), RESULTS / "quality" / name
    assert study.report(folder) == (folder / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", [*DOCUMENTS, *SOURCES, *JSON_FILES], ids=named)
def test_every_command_and_file_that_is_named_exists(path):
    text = path.read_text(encoding="utf-8")
    text = "\n".join(strings(json.loads(text))) if path.suffix == ".json" else text
    assert [name for name in COMMAND.findall(text) if not importlib.util.find_spec(name)] == []
    files = [name for name in SOURCE.findall(text) if not name.startswith("benchmarks/results/")]
    assert [name for name in files if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_tells_how_it_is_called(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("benchmarks", "examples", "gspn"):
            raise
        pytest.skip(f"{error.name} is not installed")
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert not ended.value.code and f"python -m {name}" in capsys.readouterr().out


@pytest.mark.parametrize("name", RENAMED)
def test_commands_of_before_are_todays(name):
    pytest.importorskip("diffusers")
    old, new = (importlib.import_module(f"{room}.{name}") for room in ("benchmarks", "benchmarks.speed"))
    assert old.main is new.main


def test_every_published_figure_and_every_program_is_in_the_table():
    table = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    files = set(LINK.findall(table))
    published = {str(path.relative_to(BENCHMARKS)) for path in JSON_FILES if path.parent.name not in STUDIES}
    assert published - files == set() and {f"results/quality/{name}/report.md" for name in STUDIES} <= files
    assert [name for name in PROGRAMS if name not in table] == []
