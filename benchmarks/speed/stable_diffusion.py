"""Stable Diffusion's UNets with GSPN instead of self-attention: structure, and the time of a denoising step.

    python -m benchmarks.speed.stable_diffusion structure        SD-1.5, SD-2.1 and SDXL; no GPU, no weights, 2 minutes
    python -m benchmarks.speed.stable_diffusion speed            on a GPU a step of SDXL, 512x512 to 16384x8192 pixels;
                                                                 on a CPU one of its blocks, and one self-attention
    ... speed --sizes 1024 16384x8192 --resume                   height x width; keeps what is there
    ... speed --rehearse --out runs/rehearsal                    the GPU's path at toy sizes

A step is one call of the UNet for one image, with both halves of guidance, random weights and bfloat16; attention is
torch's scaled_dot_product_attention. Above 4096x4096 pixels the halves are computed one after the other, and
feed-forward layers work in pieces, for all contenders alike. On a CPU one half is computed in float32: the first block
with attention (down_blocks.1, 640 channels), and one of its self-attentions. Layers are first compared with the
reference backend. A contender is not run where the smaller sizes predict a call longer than --limit; the file says so.
Each size is written as soon as it is measured. --out gets stable-diffusion-structure, -gpu or -cpu: .json and .md, and
.png of the speed.
"""

import argparse
import json
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch

import gspn
from benchmarks.contenders import stable_diffusion_models
from benchmarks.contenders.stable_diffusion_models import CONTENDERS, HYBRIDS, PUBLISHED, SIZES, THREE
from benchmarks.harness import gpu_harness, harness
from benchmarks.speed import stable_diffusion_report
from benchmarks.speed.stable_diffusion_report import KEPT, STEP, pixels
from gspn.stable_diffusion.highres.savers import Savers, saving

LIMIT = 1e-3  # relative error of a layer's float32 output against the reference backend's
SAVED = 4096 * 4096  # pixels above which memory is saved
BLOCK = "down_blocks.1"
CPU_SIZES = {
    "block": ((256, 256), (512, 512), (768, 768), (1024, 1024), (2048, 2048)),
    "layer": ((256, 256), (512, 512), (768, 768), (1024, 1024), (2048, 2048), (4096, 4096)),
}
TOY_SIZES = ((64, 64), (96, 64), (128, 128))


def gate(device: torch.device) -> dict:
    """By form the relative error of a layer against the reference backend. Raises WrongResult."""
    errors = {}
    for form in ("pure", "qkv"):
        torch.manual_seed(0)
        with device, torch.no_grad():
            layer = gspn.GSPNAttention(640, form=form)
            tokens = torch.randn(2, 12 * 20, 640)
            found = layer(tokens, map_size=(12, 20))
            for part in layer.modules():
                if hasattr(part, "backend"):
                    part.backend = "reference"
            wanted = layer(tokens, map_size=(12, 20))
        errors[form] = ((found - wanted).norm() / wanted.norm()).item()
        if not errors[form] <= LIMIT:
            raise gpu_harness.WrongResult(f"the {form} layer differs from the reference: {errors[form]:.2e}")
    return errors


# -- what is timed: names of contenders to calls --


def steps(unets: dict, size: tuple[int, int], apart: bool) -> dict:
    """Denoising steps of whole UNets; `apart`: with the savers of memory."""
    given = stable_diffusion_models.arguments(next(iter(unets.values())), size)
    halves = [_half(given, i) for i in range(2)]

    def call(unet):
        def run():
            with torch.inference_mode(), savers(unet):
                if apart:
                    unconditional, conditional = (unet(**half)[0] for half in halves)
                else:
                    unconditional, conditional = unet(**given)[0].chunk(2)
                return unconditional + 7 * (conditional - unconditional)

        return run

    def savers(unet):
        return saving(SimpleNamespace(unet=unet), Savers(chunked_feed_forward=True)) if apart else nullcontext()

    return {name: call(unet) for name, unet in unets.items()}


def _half(value, i: int):
    """One half of guidance of a UNet's arguments."""
    if isinstance(value, dict):
        return {key: _half(part, i) for key, part in value.items()}
    return value[i : i + 1] if isinstance(value, torch.Tensor) and value.ndim else value


def cpu_blocks() -> dict:
    """SDXL's block with attention by contender, in float32 on the CPU; nothing else of the UNet takes memory."""
    blocks = {}
    for name, unet in stable_diffusion_models.contenders(
        stable_diffusion_models.build("SDXL", dtype=torch.float32), THREE
    ).items():
        block = unet.get_submodule(BLOCK).to_empty(device="cpu")
        torch.manual_seed(0)
        for module in block.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        blocks[name] = block
    return blocks


def block_calls(blocks: dict, size: tuple[int, int]) -> dict:
    x, temb = torch.randn(1, 320, size[0] // 16, size[1] // 16), torch.randn(1, 1280)
    text = torch.randn(1, stable_diffusion_models.TOKENS, 2048)
    return {n: harness.eval_call(lambda _, b=b: b(x, temb, encoder_hidden_states=text), x) for n, b in blocks.items()}


def layer_calls(blocks: dict, size: tuple[int, int]) -> dict:
    map_size = (size[0] // 16, size[1] // 16)
    tokens, calls = torch.randn(1, map_size[0] * map_size[1], 640), {}
    for name, block in blocks.items():
        layer = block.attentions[0].transformer_blocks[0].attn1
        given = {"map_size": map_size} if isinstance(layer, gspn.GSPNAttention) else {}
        calls[name] = harness.eval_call(lambda x, layer=layer, given=given: layer(x, **given), tokens)
    return calls


# -- timing --


def without_the_slow(calls: dict, rows: dict, size: tuple[int, int], limit: float) -> tuple[dict, dict, float | None]:
    """Splits off what would take longer than `limit` seconds a call, judged by the sizes before: (calls to make, rows
    of those not made, seconds that a round of the calls to make takes, None where that is not known)."""
    kept, left, total = {}, {}, 0.0
    for name, call in calls.items():
        ms = stable_diffusion_report.predicted(rows, name, pixels(size))
        if ms is not None and ms > 1e3 * limit:
            why = f"not measured: about {ms / 1e3:.0f} s a call, more than the limit of {limit:g} s"
            left[name] = {"why": why, "extrapolated_ms": round(ms, 1)}
        else:
            kept[name] = call
            total = None if ms is None or total is None else total + ms / 1e3
    return kept, left, total


def on_cpu(calls: dict, expected: float | None, options) -> dict:
    torch.set_num_threads(options.threads)
    if expected is None:
        start = time.perf_counter()
        for call in calls.values():
            call()
        expected = time.perf_counter() - start
    rounds = max(1, min(9, int(options.seconds / max(expected, 1e-9)) - 1))  # a call more warms up
    return finished(harness.interleaved(calls, rounds, options.threads))


def on_gpu(machine, calls: dict, options) -> dict:
    found, once = {}, {}
    for name, run in calls.items():
        extra, why = gpu_harness.attempt(machine, lambda run=run: machine.extra_mib(run))  # compiles too
        if why is None:
            sample, why = gpu_harness.attempt(machine, lambda run=run, name=name: machine.round([(name, run)])[name])
        found[name] = {"extra_mib": extra} if why is None else {"why": why}
        if why is None:
            once[name] = sample
    samples, total = {name: [sample] for name, sample in once.items()}, sum(once.values())
    if once and total <= options.seconds:
        rounds = 1 if machine.rehearsal else max(3, min(30, int(options.seconds / total)))
        samples = gpu_harness.interleaved(machine, {name: calls[name] for name in once}, rounds)
    for name, row in finished(samples).items():
        found[name] |= row
    return found


def finished(samples: dict[str, list[float]]) -> dict:
    """Times, and how many times faster than attention each is (median of the rounds)."""
    rows = harness.summary(samples, "attention")
    for name, row in rows.items():
        row["rounds"] = len(samples[name])
        ratio = row.pop("ratio", None)
        if ratio and name != "attention":
            row["speed-up"] = round(1 / ratio[1], 3)
    return rows


def speed(options) -> None:
    rehearsal = options.rehearse
    machine = gpu_harness.Rehearsal() if rehearsal else gpu_harness.Gpu() if torch.cuda.is_available() else None
    status = gspn.available_backends()["triton" if machine and not rehearsal else "cpu"]
    if not status.available and not rehearsal:
        raise SystemExit(f"the native backend is not available, so nothing can be measured: {status.reason}")
    environment = harness.environment()
    environment["commit"] = environment["commit"] or options.commit
    head = {
        "what": gpu_harness.REHEARSAL if rehearsal else "SDXL, random weights: GSPN in the place of self-attention",
        "environment": environment,
        "device": machine.describe() if machine else {"threads": options.threads},
        "gate": gate(machine.device if machine else torch.device("cpu")),
    }
    path = options.out / f"stable-diffusion-{'gpu' if machine else 'cpu'}.json"
    if options.resume and path.exists() and not machine:
        before = json.loads(path.read_text())["device"]
        if before != head["device"]:
            raise SystemExit(f"{path} was measured with {before}, not {head['device']}: start again without --resume")
    results = gpu_harness.Results(path, head, options.minutes, options.resume)
    if options.retry:
        for cases in results.content["sections"].values():
            for size in [size for size, row in cases.items() if any("why" in r for r in [row, *_rows(row)])]:
                del cases[size]
    if machine:
        dtype, saved = (torch.float32, 96 * 64) if rehearsal else (torch.bfloat16, SAVED)
        unet = stable_diffusion_models.build("toy" if rehearsal else "SDXL", machine.device, dtype)
        unets = stable_diffusion_models.contenders(unet, options.contenders or CONTENDERS)
        sections = {
            "step": (
                options.sizes or (TOY_SIZES if rehearsal else SIZES),
                lambda size: steps(unets, size, pixels(size) > saved),
            )
        }
    else:
        blocks = cpu_blocks()
        sections = {
            "layer": (options.sizes or CPU_SIZES["layer"], lambda size: layer_calls(blocks, size)),
            "block": (options.sizes or CPU_SIZES["block"], lambda size: block_calls(blocks, size)),
        }
    for section, (sizes, calls_of) in sections.items():
        for size in sorted(sizes, key=pixels):

            def run(section=section, size=size, calls_of=calls_of):
                rows = results.content["sections"][section]
                calls, left, expected = without_the_slow(calls_of(size), rows, size, options.limit)
                found = on_gpu(machine, calls, options) if machine else on_cpu(calls, expected, options)
                if machine:
                    calls.clear()
                    machine.free()
                apart = machine and pixels(size) > saved
                return found | left | ({"savers": "halves apart, feed-forward in pieces"} if apart else {})

            name = f"{size[0]}x{size[1]}"
            row = results.case(section, name, run)
            print(f"{section} {name}: {stable_diffusion_report.in_words(row)}", flush=True)
    results.content["growth"] = {s: stable_diffusion_report.growth(r) for s, r in results.content["sections"].items()}
    results.write(quiet=False)
    stable_diffusion_report.write_speed(path)


def _rows(row: dict) -> list[dict]:
    return [value for value in row.values() if isinstance(value, dict)]


def structures(options) -> None:
    path = options.out / "stable-diffusion-structure.json"
    content = {"what": "shapes and counts, nothing is timed", "environment": harness.environment()}
    content |= {"models": {}, STEP: {}, KEPT: {}}
    if options.resume and path.exists():
        before = json.loads(path.read_text())
        content |= {key: before.get(key, {}) for key in ("models", STEP, KEPT)}
    for name in PUBLISHED:
        if name not in content["models"]:
            content["models"][name] = stable_diffusion_models.structure(name)
            harness.write_json(path, content, quiet=True)
        found = content["models"][name]
        print(f"{name}: {len(found['layers'])} layers, parameters {found['parameters']}", flush=True)
    for section, names in ((STEP, THREE), (KEPT, HYBRIDS)):
        unets = stable_diffusion_models.contenders(stable_diffusion_models.build("SDXL"), names)
        for size in options.sizes or SIZES:
            name = f"{size[0]}x{size[1]}"
            if name not in content[section]:
                content[section][name] = stable_diffusion_models.step(unets, size)
                harness.write_json(path, content, quiet=True)
            print(f"{section}, {name}: {content[section][name]}", flush=True)
    stable_diffusion_report.write_structure(path)


def _size(text: str) -> tuple[int, int]:
    sides = [int(side) for side in text.split("x")]
    size = (sides[0], sides[-1])
    if len(sides) > 2 or min(size) < 64 or any(side % 16 for side in size):
        raise argparse.ArgumentTypeError(
            f"expected a side or height x width, multiples of 16, at least 64, got {text!r}"
        )
    return size


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("structure", "speed"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/speed"))
    parser.add_argument("--sizes", type=_size, nargs="+", help="in pixels, such as 1024 or 16384x8192 (height x width)")
    parser.add_argument("--contenders", nargs="+", choices=tuple(CONTENDERS), help="contenders on a GPU; default: all")
    parser.add_argument("--resume", action="store_true", help="keep the sizes that the file has already")
    parser.add_argument(
        "--retry", action="store_true", help="with --resume: repeat the sizes where something is missing"
    )
    parser.add_argument("--minutes", type=float, default=60, help="begin no size after this many minutes")
    parser.add_argument("--seconds", type=float, default=20, help="seconds that the rounds of a size may take, roughly")
    parser.add_argument("--limit", type=float, default=90, help="run no call that is expected to take more seconds")
    parser.add_argument("--threads", type=int, default=1, help="threads on a CPU")
    parser.add_argument("--commit", default="", help="the commit to record if the sources have no git history")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on the CPU; no measurement")
    options = parser.parse_args()
    if options.what == "structure":
        structures(options)
    else:
        speed(options)


if __name__ == "__main__":
    main()
