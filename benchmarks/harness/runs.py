"""Keeps the results of a training run, with the command that repeats it: STEM.json, STEM.md, STEM-curves.png.

    python -m benchmarks.harness.runs RUN benchmarks/results/quality/STEM --command "gspn train ..." --commit HASH \\
        [--note TEXT] [--evaluation FILE]

All figures come from the run folder. Its best checkpoint is that of the best epoch on the evaluation split.
"""

import argparse
import json
import shutil
from pathlib import Path

from benchmarks.harness import harness
from gspn.runs import load_classifier
from gspn.train.run import Run

COLUMNS = {"epoch": "", "train_loss": ".3f", "val_loss": ".3f", "top1": ".2%", "top5": ".2%", "seconds": ".0f"}


def table(rows: list[dict]) -> str:
    """The epochs as a Markdown table: all of up to 20, else every tenth of them and the best."""
    best = max(rows, key=lambda row: (row["top1"], -row["val_loss"]))
    shown = rows if len(rows) <= 20 else [row for row in rows if row["epoch"] % 10 == 0 or row is best]
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    for row in shown:
        cells = ["" if row[name] is None else format(row[name], form) for name, form in COLUMNS.items()]
        lines.append(f"| {' | '.join(cells)} |" + (" best" if row is best else ""))
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("stem", type=Path)
    parser.add_argument("--command", required=True, help="the command that made the run")
    parser.add_argument("--commit", required=True, help="the commit of the code that made the run")
    parser.add_argument("--note", action="append", default=[], help="a sentence for the Markdown file")
    parser.add_argument(
        "--evaluation", type=Path, action="append", default=[], help="a file that gspn eval --out wrote"
    )
    arguments = parser.parse_args()

    run = Run.open(arguments.run)
    rows, config = run.metrics, run.config
    best = max(rows, key=lambda row: (row["top1"], -row["val_loss"]))
    parameters = sum(parameter.numel() for parameter in load_classifier(arguments.run).model.parameters())
    evaluations = [json.loads(file.read_text()) for file in arguments.evaluation]
    result = {
        "command": arguments.command,
        "commit": arguments.commit,
        "versions": config["versions"],
        "parameters": parameters,
        "options": config["options"],
        "best": best,
        "last": rows[-1],
        "epochs": rows,
        "evaluations": evaluations,
    }
    harness.write_json(arguments.stem.with_suffix(".json"), result, quiet=True)
    shutil.copyfile(arguments.run / "curves.png", f"{arguments.stem}-curves.png")
    split, name = config["data"]["split"], arguments.stem.name
    text = [
        f"**{best['top1']:.2%}** of {best['images']:,} {split} images right after epoch {best['epoch']} of {len(rows)} "
        f"(the best, chosen on these images), {rows[-1]['top1']:.2%} after the last one; "
        f"{config['model']['name']}, {parameters:,} parameters, seed {config['seed']}; commit {arguments.commit[:12]}.",
        f"```sh\n{arguments.command}\n```",
        *arguments.note,
        table(rows),
    ]
    for metrics in evaluations:
        text.append(
            f"At {metrics['size'][0]}x{metrics['size'][1]}, best checkpoint: top-1 {metrics['top1']:.2%}, expected "
            f"calibration error {metrics['ece']:.2%}. Most frequent mistakes: "
            + ", ".join(f"{label} taken for {guess} ({count})" for label, guess, count in metrics["confused"][:5])
            + "."
        )
    text.append(f"![Learning curves]({name}-curves.png)")
    arguments.stem.with_suffix(".md").write_text("\n\n".join(text) + "\n")


if __name__ == "__main__":
    main()
