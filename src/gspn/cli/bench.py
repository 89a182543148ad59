"""The command that measures: bench."""

import time
from pathlib import Path

from gspn.cli.app import command, fail, out, progress_on, warn
from gspn.options import OptionError
from gspn.options.bench import SUITES, BenchOptions
from gspn.places import check_out

RESULTS = "bench.json"


@command("bench", BenchOptions)
def bench(options):
    """Measure what GSPN costs on this machine, against attention, linear attention and convolutions.

    Writes bench.json (every sample, machine, versions) and a picture for each suite; prints ratios and what was left
    out. Other work on the machine disturbs several threads and a GPU; one thread is measured by its own CPU time.
    Example: gspn bench layer --minutes 2
    """
    folder = options.out or Path("runs") / time.strftime("bench-%Y%m%d-%H%M%S")
    check_out(folder)
    from gspn.files import check_absent, remove, write_json, writing

    files = [folder / RESULTS, *(folder / f"{suite}.png" for suite in SUITES)]
    check_absent(*files, overwrite=options.overwrite)
    import torch

    from gspn.bench import suites
    from gspn.bench.figures import draw
    from gspn.bench.measuring import Cpu, Gpu, WrongResult
    from gspn.bench.tables import reasons, tables

    there = torch.cuda.is_available()
    if options.device == "cuda" and not there:
        raise OptionError("device must be cpu here: torch finds no CUDA device, got cuda")
    on_cpu = options.device == "cpu" or options.threads is not None or not there
    machine = Cpu(options.threads or torch.get_num_threads()) if on_cpu else Gpu()
    with writing(folder):
        try:
            results = suites.run(
                options.chosen(),
                machine,
                minutes=options.minutes,
                dtype=options.dtype,
                save=lambda results: write_json(folder / RESULTS, results),
                console=progress_on(out),
            )
        except WrongResult as error:
            fail(f"nothing more is measured: {error}", 1)
        drawn = draw(results, folder)
        for file in files[1:]:  # of the earlier results
            if file.name not in drawn:
                remove(file)
    out.print(f"{results['title']}, {results['dtype']}", markup=False, highlight=False)
    for table in tables(results):
        out.print(table)
    warn(reasons(results))
    out.print(f"in {folder}: {', '.join([RESULTS, *drawn])}", markup=False, highlight=False)
