"""Exported files on a CPU: size of the file, nodes of the graph, and the time in onnxruntime against torch.

python -m benchmarks.speed.export --out benchmarks/results/speed/export-cpu.json
"""

import argparse
import tempfile
import time
from pathlib import Path

import onnx
import onnxruntime
import torch

import gspn
from benchmarks.harness import harness

CASES = {  # name: how to make it, an input (B,C,H,W)
    "gspn_micro 28x28, batch 1": (
        lambda **b: gspn.create_model("gspn_micro", num_classes=10, in_chans=1, **b),
        (1, 1, 28, 28),
    ),
    "gspn_micro 28x28, batch 8": (
        lambda **b: gspn.create_model("gspn_micro", num_classes=10, in_chans=1, **b),
        (8, 1, 28, 28),
    ),
    "gspn_tiny 224x224, batch 1": (lambda **b: gspn.create_model("gspn_tiny", **b), (1, 3, 224, 224)),
    "GSPN2d(144) 56x56": (lambda **b: gspn.GSPN2d(144, **b), (1, 144, 56, 56)),
    "GSPN2d(64) 128x128": (lambda **b: gspn.GSPN2d(64, **b), (1, 64, 128, 128)),
    "GSPN2d(576) 14x14": (lambda **b: gspn.GSPN2d(576, **b), (1, 576, 14, 14)),
}


def nodes_of(graph) -> int:
    bodies = [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
    return len(graph.node) + sum(nodes_of(body) for body in bodies)


def session_of(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def torch_call(model: torch.nn.Module, x: torch.Tensor):
    model, x = (t.to(memory_format=torch.channels_last) for t in (model.eval(), x))

    def run():
        with torch.inference_mode():
            model(x)

    return run


def measure(name: str, folder: Path, precisions: list[str], rounds: int, threads: int) -> dict:
    make, shape = CASES[name]
    torch.manual_seed(0)
    native, reference = make(), make(backend="reference")
    x, row = torch.randn(shape), {"case": name, "input": list(shape), "files": {}}
    calls = {"torch": torch_call(native, x), "torch, eager reference": torch_call(reference, x)}
    for precision in precisions:
        path, start = folder / f"{precision}.onnx", time.perf_counter()
        written = gspn.export_onnx(native, path, precision=precision)
        row["files"][precision] = {
            "MB": round(written.size_bytes / 1e6, 2),
            "nodes": nodes_of(onnx.load(path).graph),
            "difference": written.difference,
            "seconds to export and check": round(time.perf_counter() - start, 1),
        }
        given = x.numpy() if precision == "fp32" else x.half().numpy()
        session = session_of(path, threads)
        calls[f"onnxruntime, {precision}"] = lambda session=session, given=given: session.run(None, {"input": given})
    return row | {"times": harness.summary(harness.interleaved(calls, rounds, threads), "torch")}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/speed/export-cpu.json"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "fp16"), default=["fp32", "fp16"])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    environment = harness.environment() | {"onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__}
    content = {"what": "exported models", "environment": environment, "threads": options.threads, "cases": []}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.cases:
            row = measure(name, Path(folder), options.precisions, options.rounds, options.threads)
            content["cases"].append(row)
            harness.write_json(options.out, content)
            print(name, row["files"], {n: t["ratio"][1] for n, t in row["times"].items()}, flush=True)


if __name__ == "__main__":
    main()
