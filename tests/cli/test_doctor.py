"""`gspn doctor`: what it finds in the installation, and what it says of wrong kernels."""

from importlib.metadata import PackageNotFoundError, version

import pytest
import torch
from typer.testing import CliRunner

import gspn
from gspn.cli import app, doctor


def call():
    result = CliRunner().invoke(app, ["doctor"], catch_exceptions=False)
    return result.exit_code, result.stdout


def test_it_finds_a_good_installation():
    code, out = call()
    assert code == 0 and f"gspn {gspn.__version__}, torch {torch.__version__}" in out
    assert "extra, train: installed" in out
    if gspn.available_backends()["cpu"].available:
        assert "check, cpu on cpu: right" in out


def test_it_finds_kernels_that_compute_something_else(monkeypatch):
    """As if the scan of the native kernels were off by a tenth."""
    right = gspn.GSPN2d.forward
    monkeypatch.setattr(doctor, "devices", lambda: [("cpu", "cpu")])

    def wrong(self, x):
        return right(self, x) * (1.1 if self.backend == "cpu" else 1)

    if not gspn.available_backends()["cpu"].available:
        pytest.skip("there are no CPU kernels here")
    monkeypatch.setattr(gspn.GSPN2d, "forward", wrong)
    code, out = call()
    assert code == 1 and "check, cpu on cpu: WRONG" in out and 'backend="reference"' in out


def test_it_reports_what_a_device_raises(monkeypatch):
    monkeypatch.setattr(doctor, "devices", lambda: [("reference", "cuda:99")])
    code, out = call()
    assert code == 1 and "check, reference on cuda:99: FAILED" in out


def test_sources_on_the_path_are_enough(monkeypatch):
    def requires(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "requires", requires)
    monkeypatch.setattr(doctor, "devices", lambda: [])
    code, out = call()
    assert code == 0 and "extras: not known" in out


def test_extras_are_read_with_the_extras_that_they_contain(monkeypatch):
    def absent(name):
        if name in ("datasets", "diffusers"):
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(doctor, "version", absent)
    assert "datasets" in doctor.missing_packages("train") and "diffusers" not in doctor.missing_packages("train")
    assert {"datasets", "diffusers"} <= set(doctor.missing_packages("diffusion"))
