"""`gspn bench` as it is published: into files with a name, with the commit, and with a torchvision for another torch.

    python -m benchmarks.speed.bench growth --minutes 60 --out benchmarks/results/speed/growth-cpu.json

OUT gets the results, and a picture beside it has its name.
"""

import argparse
import json
import tempfile
from pathlib import Path

from benchmarks.harness import torchvision_schemas

torchvision_schemas.define()  # also in the processes that measure memory, which import this module first


def main():
    from rich.console import Console

    from benchmarks.harness import harness
    from gspn.bench import suites
    from gspn.bench.contenders import CONTENDERS
    from gspn.bench.figures import draw
    from gspn.bench.measuring import Cpu
    from gspn.bench.tables import reasons, tables

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=list(suites.WEIGHTS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="fp32", choices=list(suites.DTYPES))
    parser.add_argument("--last-forward", type=int, default=suites.LAST_SIDE, help="growth: the largest side")
    parser.add_argument("--last-training", type=int, default=suites.LAST_SIDE, help="growth: the largest side")
    parser.add_argument("--after", nargs="+", type=Path, default=[], help="growth: measure what these results lack")
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), metavar="NAME", help="growth: these contenders")
    options = parser.parse_args()
    about = harness.environment()
    console = Console(soft_wrap=True)

    def save(results):
        machine = results["machine"] | {name: about[name] for name in ("commit", "uncommitted_changes")}
        harness.write_json(options.out, results | {"machine": machine}, quiet=True)

    results = suites.run(
        [options.suite],
        Cpu(options.threads),
        minutes=options.minutes,
        dtype=options.dtype,
        save=save,
        last_sides={"forward": options.last_forward, "training": options.last_training},
        only=options.only,
        earlier=[json.loads(path.read_text()) for path in options.after],
        console=console,
    )
    with tempfile.TemporaryDirectory(dir=options.out.parent) as folder:
        for name in draw(results, Path(folder)):
            (Path(folder) / name).replace(options.out.with_suffix(".png"))
    for table in tables(results):
        console.print(table)
    for reason in reasons(results):
        console.print(reason, highlight=False)


if __name__ == "__main__":
    main()
