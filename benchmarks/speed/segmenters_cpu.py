"""Time and peak memory of segmenting one image on a CPU, with GSPN and with other mixers in its place.

    python -m benchmarks.speed.segmenters_cpu --out FILE [--rounds 3] [--model gspn_mobile]

The segmenters are those of benchmarks.quality.segmentation_mixers: 11 classes, equal parameters within 2%. The
weights are random, for neither time nor memory depends on them. One image, float32, channels_last as in `gspn segment`.
"""

import argparse
import json
from pathlib import Path

import torch

from benchmarks.harness import harness
from benchmarks.quality.segmentation_mixers import CONTENDERS, made

SIZES = ((90, 120), (180, 240), (360, 480), (720, 960), (900, 1200))  # height, width; the last is over a megapixel
OURS = {"gspn_micro": "gspn", "gspn_mobile": "mobile"}  # what the others are compared with


def call_of(mixer: str, size: tuple[int, int]):
    torch.manual_seed(0)
    model = made(mixer).eval().to(memory_format=torch.channels_last)
    return harness.eval_call(model, torch.randn(1, 3, *size).contiguous(memory_format=torch.channels_last))


def memory_of(mixer: str, size: tuple[int, int], threads: int) -> None:
    """Prints the peak in MiB above what was there before the call."""
    torch.set_num_threads(threads)
    run = call_of(mixer, size)
    call_of(mixer, (64, 64))()  # what is loaded with the first call
    print(round(harness.peak_extra_mib(run), 1))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", choices=OURS, default="gspn_mobile")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        memory_of(*json.loads(options.memory_of))
        return
    if options.out is None:
        parser.error("--out is missing: name the JSON file to write")
    torch.set_num_threads(options.threads)
    content = {"what": f"segmenting one image with {options.model} and other mixers in the place of GSPN, float32"}
    content |= {"environment": harness.environment(), "rounds": options.rounds, "threads": options.threads, "cases": []}
    for size in SIZES:
        mixers = [mixer for mixer, contender in CONTENDERS.items() if contender.model == options.model]
        calls = {mixer: call_of(mixer, size) for mixer in mixers}
        found = harness.summary(harness.interleaved(calls, options.rounds, options.threads), OURS[options.model])
        for mixer in found:
            asked = json.dumps([mixer, size, options.threads])
            found[mixer]["extra_mib"] = harness.in_fresh_process(
                "benchmarks.speed.segmenters_cpu", "--memory-of", asked
            )
        content["cases"].append({"height": size[0], "width": size[1], "mixers": found})
        told = (f"{m} {r['ms'][1]:.0f} ms ({r['ratio'][1]:.2f}), {r['extra_mib']:.0f} MiB" for m, r in found.items())
        print(f"{size[1]}x{size[0]}: {'; '.join(told)}", flush=True)
        harness.write_json(options.out, content, quiet=True)


if __name__ == "__main__":
    main()
