"""One denoising step of class-conditional generators: GSPN-DiT, GSPN and DiT of the same name, time and memory.

    python -m benchmarks.speed.generators --out DIR      XL/2 and L/2 on a GPU, B/2 on a CPU
    python -m benchmarks.speed.generators --out DIR --names B/2 --sizes 256 512 --rounds 3 --threads 1
    python -m benchmarks.speed.generators --out DIR --count     only multiply-adds and parameters, nothing is timed

A step is one forward pass for one image with guidance, so two maps: latents of 4 channels, an eighth of the image's
side. The weights are random and made anew for each size, so that DiT's positional embedding is computed beforehand;
DiT's attention is torch's scaled_dot_product_attention. The dtype is bfloat16 on a GPU and, unless --dtype says
otherwise, float32 on a CPU. The outputs of GSPN and GSPN-DiT are first compared with those of the reference backend in
float32. DIR gets generators-cpu.json, generators-cpu-bfloat16.json or generators-gpu.json, which is written after every
size, and a figure.
"""

import argparse
import json
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import gpu_harness, harness
from gspn.layers import GSPN2d
from gspn.models.dit import create_dit
from gspn.models.generator import create_generator

SIZES = (256, 512, 1024, 2048)
LIMIT = 1e-3  # relative error of the float32 output against the reference backend's
COLOURS = {"GSPN-DiT": "#3a8f5c", "GSPN": "#2f6db3", "DiT": "#e07b22"}
BASE = "GSPN-DiT"  # whose time the ratios are to


def build(kind: str, name: str, size: int, device: torch.device, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """In eval; without `dtype` in bfloat16 on a GPU and in float32 elsewhere."""
    torch.manual_seed(0)
    create = create_dit if kind == "DiT" else create_generator
    with device:
        model = create(f"{kind}-{name}", sample_size=size // 8)
        for parameter in model.parameters():  # DiT and GSPN start with zeros where they predict
            if device.type != "meta" and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
    return model.eval().to(dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32))


def call_of(model: torch.nn.Module, size: int, device: torch.device):
    maps = torch.randn(2, 4, size // 8, size // 8, device=device, dtype=model.dtype)
    steps, labels = torch.tensor([500, 500], device=device), torch.tensor([207, 1000], device=device)

    def run():
        with torch.inference_mode():
            return model(maps, timestep=steps, class_labels=labels, return_dict=False)[0]

    return run


def gate(kind: str, name: str, device: torch.device) -> float:
    """The relative error of the output against the reference backend's. Raises WrongResult."""
    model = build(kind, name, 64, device).float()
    run = call_of(model, 64, device)
    torch.manual_seed(1)
    found = run()
    for layer in [m for m in model.modules() if isinstance(m, GSPN2d)]:
        layer.backend = "reference"
    wanted = run()
    error = ((found - wanted).norm() / wanted.norm()).item()
    if not error <= LIMIT:
        raise gpu_harness.WrongResult(f"{kind}-{name} differs from the reference backend: relative error {error:.2e}")
    return error


def measure(machine, name: str, size: int, options) -> dict:
    """{"GSPN-DiT-B/2": {...}, "DiT-B/2": {...}, ...}: ms, ratio to GSPN-DiT's time, extra memory in MiB."""
    device = machine.device if machine else torch.device("cpu")
    dtype = None if machine else getattr(torch, options.dtype)
    calls = {f"{kind}-{name}": call_of(build(kind, name, size, device, dtype), size, device) for kind in COLOURS}
    if machine:
        found = gpu_harness.measure(machine, calls, f"{BASE}-{name}", options.seconds)
        machine.free()
        return found
    torch.set_num_threads(options.threads)
    found = harness.summary(harness.interleaved(calls, options.rounds, options.threads), f"{BASE}-{name}")
    calls.clear()
    for kind in COLOURS:
        asked = json.dumps([kind, name, size, options.threads, options.dtype])
        memory = harness.in_fresh_process("benchmarks.speed.generators", "--memory-of", asked)
        found[f"{kind}-{name}"]["extra_mib"] = memory
    return found


def count(names: list[str], sizes: list[int]) -> list[dict]:
    """Parameters and multiply-adds of a step, by torch's counter and the formula of gspn::propagate, which leave out
    normalisations and activations. Nothing is computed."""
    device, cases = torch.device("meta"), []
    for name in names:
        for size in sizes:
            case = {"name": name, "size": size, "models": {}}
            for kind in COLOURS:
                model = build(kind, name, size, device)
                with FlopCounterMode(display=False) as counter:
                    call_of(model, size, device)()
                by_operator = counter.get_flop_counts()["Global"]
                total = sum(by_operator.values())
                mixed = sum(n for op, n in by_operator.items() if "attention" in str(op) or "propagate" in str(op))
                parameters = sum(parameter.numel() for parameter in model.parameters())
                row = {"parameters": parameters, "giga_macs": total / 2e9, "giga_macs_mixing": mixed / 2e9}
                case["models"][f"{kind}-{name}"] = {key: round(value, 3) for key, value in row.items()}
            print(name, size, {model: row["giga_macs"] for model, row in case["models"].items()}, flush=True)
            cases.append(case)
    return cases


def memory_of(kind: str, name: str, size: int, threads: int, dtype: str) -> None:
    torch.set_num_threads(threads)
    device, type_ = torch.device("cpu"), getattr(torch, dtype)
    run = call_of(build(kind, name, size, device, type_), size, device)
    call_of(build(kind, "micro/2", 64, device, type_), 64, device)()  # what is loaded with the first call
    print(round(harness.peak_extra_mib(run), 1))


def draw(content: dict, path: Path) -> None:
    """Milliseconds and MiB against the image's side, both on logarithmic axes."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, (key, label) in zip(
        figure.subplots(1, 2),
        (("ms", "ms a denoising step"), ("extra_mib", "memory beyond the weights, MiB")),
        strict=True,
    ):
        lines = {}
        for case in content["cases"]:
            for model, row in case["models"].items():
                value = row.get(key)
                value = value[1] if isinstance(value, list) else value
                if value:
                    lines.setdefault(model, []).append((case["size"], value))
        for model, points in lines.items():
            dashed = "--" if "L/2" in model and "XL" not in model else "-"
            axes.plot(
                *zip(*points, strict=True), dashed, marker="o", color=COLOURS[model.rpartition("-")[0]], label=model
            )
        sizes = sorted({case["size"] for case in content["cases"]})
        axes.set(xscale="log", yscale="log", xlabel="side of the image, pixels", ylabel=label)
        axes.set_xticks(sizes, map(str, sizes))
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    where = content["environment"]["gpu"] or content["environment"]["cpu"].split(" (")[0]
    figure.suptitle(f"One denoising step with guidance, {where}, {content['dtype']}", fontsize=11)
    figure.savefig(path, dpi=130, facecolor="white")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/speed"))
    parser.add_argument("--names", nargs="+", help="such as B/2; default: XL/2 and L/2 on a GPU, else B/2")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="sides of the images in pixels")
    parser.add_argument("--rounds", type=int, default=3, help="rounds on a CPU")
    parser.add_argument("--threads", type=int, default=1, help="threads on a CPU")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="on a CPU")
    parser.add_argument("--seconds", type=float, default=6, help="seconds for the rounds of a size on a GPU")
    parser.add_argument("--count", action="store_true", help="count multiply-adds instead of timing")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        memory_of(*json.loads(options.memory_of))
        return
    if options.count:
        cases = count(options.names or ["S/2", "B/2", "L/2", "XL/2"], options.sizes)
        what = "parameters and multiply-adds of one denoising step with guidance, one image: two maps"
        harness.write_json(options.out / "generators-macs.json", {"what": what, "cases": cases})
        return
    machine = gpu_harness.Gpu() if torch.cuda.is_available() else None
    names = options.names or (["XL/2", "L/2"] if machine else ["B/2"])
    short = "gpu" if machine else "cpu" + "-bfloat16" * (options.dtype == "bfloat16")
    path = options.out / f"generators-{short}.json"
    content = {
        "what": "one denoising step with guidance, one image",
        "environment": harness.environment(),
        "device": machine.describe() if machine else f"{options.threads} thread(s)",
        "dtype": "bfloat16" if machine else options.dtype,
        "gate": {
            f"{kind}-{name}": gate(kind, name, machine.device if machine else torch.device("cpu"))
            for kind in COLOURS
            if kind != "DiT"
            for name in names
        },
        "cases": [],
    }
    for name in names:
        for size in options.sizes:
            row = {"name": name, "size": size, "models": measure(machine, name, size, options)}
            content["cases"].append(row)
            harness.write_json(path, content, quiet=True)
            told = [
                f"{model} {found['ms'][1]:.1f} ms, {found['extra_mib']:.0f} MiB" if "ms" in found else found["why"]
                for model, found in row["models"].items()
            ]
            ratio = row["models"][f"DiT-{name}"].get("ratio", [0, float("nan"), 0])[1]
            print(f"{size}x{size}: {'; '.join(told)}; DiT takes {ratio:.2f} times as long", flush=True)
    draw(content, path.with_suffix(".png"))
    print(f"wrote {path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
