"""The command that looks at the installation: doctor."""

import platform
from importlib.metadata import PackageNotFoundError, requires, version

import typer

import gspn
from gspn.cli.app import app, out

LIMIT = 1e-4  # of the largest value; float32 differs by less than 1e-5


def missing_packages(extra: str) -> list[str]:
    """The distributions of an extra of gspn that are not installed, also those of the extras that it contains."""
    from packaging.requirements import Requirement

    missing = []
    for requirement in map(Requirement, requires("gspn") or []):
        if requirement.marker is None or not requirement.marker.evaluate({"extra": extra}):
            continue
        if requirement.name == "gspn":
            missing += [name for inner in sorted(requirement.extras) for name in missing_packages(inner)]
            continue
        try:
            version(requirement.name)
        except PackageNotFoundError:
            missing.append(requirement.name)
    return sorted(set(missing))


def largest_difference(backend: str, device: str) -> float:
    """How far outputs and gradients of a small layer are from the reference's on the CPU, over their largest value."""
    import torch

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, 13, 17, generator=generator)
    reference = gspn.GSPN2d(8, backend="reference")
    layer = gspn.GSPN2d(8, backend=backend)
    layer.load_state_dict(reference.state_dict())
    found = []
    for module, where in ((reference, "cpu"), (layer.to(device), device)):
        inputs = x.to(where, copy=True).requires_grad_()
        y = module(inputs)
        gradients = torch.autograd.grad(y.square().sum(), [inputs, *module.parameters()])
        found.append([tensor.detach().cpu() for tensor in (y, *gradients)])
    errors = [float((got - want).abs().max() / want.abs().max()) for want, got in zip(*found, strict=True)]
    return float(torch.tensor(errors).max())  # NaN if one is


def devices() -> list[tuple[str, str]]:
    """(backend, device) of each native backend that is available."""
    import torch

    status = gspn.available_backends()
    pairs = [("cpu", "cpu")] if status["cpu"].available else []
    if status["triton"].available:
        pairs += [("triton", f"cuda:{i}") for i in range(torch.cuda.device_count())]
    return pairs


@app.command()
def doctor():
    """Look at the installation: versions, kernels, extras, and a small computation on each device.

    The outputs and gradients of a small layer are compared with the reference's. The exit code is 1 if they differ on a
    device, and 0 otherwise: a missing kernel or extra is no error.
    """
    import torch

    from gspn.kernels.cpu import COMPILERS

    def line(text):
        out.print(text, markup=False, highlight=False)

    line(
        f"gspn {gspn.__version__}, torch {torch.__version__}, Python {platform.python_version()}, {platform.platform()}"
    )
    line(f"threads: {torch.get_num_threads()}; GPUs that torch finds: {torch.cuda.device_count()}")
    advice = []
    for name, (available, reason) in gspn.available_backends().items():
        line(f"kernels, {name}: {'available' if available else 'not available'}, {reason}")
        if name == "cpu" and not available:
            advice.append(f"Install a C++ compiler ({COMPILERS}) and install gspn again, for the CPU kernels.")
    try:
        for extra in ("train", "diffusion", "onnx", "timm", "metrics", "hub", "demo"):
            missing = missing_packages(extra)
            line(f"extra, {extra}: {'lacks ' + ', '.join(missing) if missing else 'installed'}")
    except PackageNotFoundError:  # the sources alone, on PYTHONPATH
        line("extras: not known, because gspn itself is not installed")
    wrong = []
    for backend, device in devices():
        try:
            difference = largest_difference(backend, device)
        except Exception as error:  # a doctor reports what a driver or compiler raises
            line(f"check, {backend} on {device}: FAILED: {type(error).__name__}: {error}")
            wrong.append(device)
            continue
        good = difference <= LIMIT  # False for NaN
        line(f"check, {backend} on {device}: {'right' if good else 'WRONG'}, differs by {difference:.1e} at most")
        wrong += [] if good else [device]
    if wrong:
        advice.append(f'Use backend="reference" in place of the kernels on {", ".join(wrong)}, and report this output.')
    for text in advice or ["Nothing to do."]:
        line(text)
    if wrong:
        raise typer.Exit(1)
