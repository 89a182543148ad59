"""A tiny generator's run, and a finished folder of its samples. Tests read them only."""

import pytest
from helpers.diffusion import generator_run
from helpers.sampling import options

from gspn.sampling.sample import sample


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    return generator_run(tmp_path_factory.mktemp("runs") / "run")[0].path


@pytest.fixture(scope="session")
def done(run, tmp_path_factory):
    """A finished folder of samples, and what `sample` said."""
    folder = tmp_path_factory.mktemp("samples") / "done"
    return folder, sample(run, folder, options(npz=True))
