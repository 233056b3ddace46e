"""One run that the tests of this folder share."""

import shutil

import pytest

from jaxspec.training.trainer import train
from tests.training import tiny


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory):
    """The folder of a run that nothing interrupts; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("whole")
    train(tiny.CONFIG, tiny.target(), tiny.examples(), folder)
    return folder


@pytest.fixture
def copied(whole_run, tmp_path):
    """A copy of that folder, which a test may change."""
    return shutil.copytree(whole_run, tmp_path / "run")
