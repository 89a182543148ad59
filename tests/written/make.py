"""Made 0.1.tar.xz: a small file of every kind that gspn writes, as version 0.1.0 wrote it (commit c44183d).

    cd CHECKOUT_OF_THAT_COMMIT && PYTHONPATH=tests python THIS_FILE FOLDER && tar -cJf 0.1.tar.xz -C FOLDER .

tests/test_written.py opens these files with today's code. They are never made anew. A later format gets an archive of
its own beside this one.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from helpers.encoding import make_vae
from helpers.stable_diffusion import WORDS, ddim, tiny_sd
from PIL import Image
from typer.testing import CliRunner

from gspn.cli import app
from gspn.train.run import Run

NETWORK = ["--model-arg", "depths=[1]", "--model-arg", "width=8", "--model-arg", "global_levels=[0]"]
GENERATOR = ["--model-arg", "hidden_size=16", "--model-arg", "depth=2"]


def gspn(*arguments, stop=False):
    """Runs a command; `stop`: until its first epoch has been saved, as if it had been killed then."""
    real = Run.save_checkpoint

    def save(run, name, tensors, state):
        real(run, name, tensors, state)
        if name == "last" and stop:
            raise KeyboardInterrupt

    Run.save_checkpoint = save
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    Run.save_checkpoint = real
    print(result.output)
    assert stop or result.exit_code == 0, result.exception


def main(out):
    out.mkdir(parents=True)
    os.chdir(out)
    torch.set_num_threads(1)
    rows = []
    for i in range(16):
        pixels = np.random.RandomState(i).randint(0, 255, (4, 4, 3), np.uint8) // (1 + i % 2)
        file = Path("pictures", ("bright", "dark")[i % 2], f"{i}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize((16, 16)).save(file)
        rows.append({"file_name": str(file.relative_to("pictures")), "text": f"{WORDS[i % 10]} {WORDS[3 * i % 10]}"})
    vae = make_vae()
    vae.save_pretrained("vae")
    tiny_sd(factor=2, scheduler=ddim()).save_pretrained("base")
    shutil.copytree("pictures", "captioned")
    Path("captioned/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["--batch-size", 4, "--workers", 0]
    gspn("train", "pictures", "--out", "classifier", "--epochs", 1, *NETWORK, *common)
    gspn("train", "pictures", "--out", "classifier-stopped", "--epochs", 2, *NETWORK, *common, stop=True)
    gspn("encode", "pictures", "--vae", "vae", "--size", 16, "--out", "latents", "--workers", 0)
    images = [*GENERATOR, *common, "--sample-every", 0]
    gspn("train-diffusion", "latents", "--out", "generator", "--epochs", 1, *images)
    gspn("train-diffusion", "latents", "--out", "generator-stopped", "--epochs", 2, *images, stop=True)
    gspn("sample", "generator", "--per-class", 2, "--steps", 4, "--out", "samples")
    features = ["--features", "classifier:classifier", "--cache", "cache", "--workers", 0, "--out", "fid.json"]
    gspn("fid", "samples", "--reference", "pictures", *features, "--save", "statistics.safetensors")
    base = ["base", "--data", "captioned", *common, "--sample-every", 0, "--precision", "fp32"]
    gspn("distill", *base, "--out", "student", "--epochs", 1)
    gspn("distill", *base, "--out", "student-stopped", "--epochs", 2, stop=True)
    finish()


def finish():
    """Writes expected.json: how the stopped runs ended with that version, and what the classifier predicted."""
    expected = {}
    for run, command in (("classifier", "train"), ("generator", "train-diffusion"), ("student", "distill")):
        shutil.copytree(f"{run}-stopped", "finished")
        gspn(command, "--resume", "finished")
        expected[run] = json.loads(Path("finished/metrics.jsonl").read_text().splitlines()[-1])
        shutil.rmtree("finished")
    predicted = CliRunner().invoke(app, ["predict", "classifier", "pictures/bright/0.png", "--json"])
    expected["predicted"] = json.loads(predicted.stdout)
    Path("expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    for run in ("classifier", "generator", "student"):  # what no test reads
        shutil.rmtree(f"{run}/checkpoints/{'best' if run == 'generator' else 'last'}")
    for drawn in ("curves", "predictions", "context"):
        for picture in Path(".").glob(f"*/{drawn}*.png"):
            picture.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
