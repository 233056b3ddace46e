"""Runs on several devices, and by several processes, train as one device does."""

import shutil

import numpy as np
import pytest

from tests.processes import free_port
from tests.training import tiny

MESH = ("--mesh", "4", "2")


def assert_same_steps(folder, expected):
    for want, got in zip(tiny.steps(expected), tiny.steps(folder), strict=True):
        for name in ("loss", "gradient_norm", "acceptance"):
            np.testing.assert_allclose(got[name], want[name], rtol=1e-4)


def tau(folder) -> float:
    return tiny.metrics(folder)[-1]["tau"]


@pytest.fixture(scope="module")
def run_on_eight(tmp_path_factory):
    """The same run, the drafter cut over 4 devices and the target over 2 of each, its features
    kept on disk."""
    folder, features = tmp_path_factory.mktemp("eight"), tmp_path_factory.mktemp("features")
    options = (*MESH, "--validate", "--features", str(features))
    tiny.finish(tiny.start(folder, *options, devices=8))
    return folder


@pytest.mark.gate
def test_many_devices_train_and_validate_as_one_does(whole_run, run_on_eight, tmp_path):
    assert_same_steps(run_on_eight, whole_run)
    tiny.finish(tiny.start(tmp_path, "--validate"))
    assert tau(tmp_path) == tau(run_on_eight) >= 1


@pytest.mark.gate
def test_two_processes_train_and_validate_as_one_does(whole_run, run_on_eight, tmp_path):
    """They fill the cache of features together, and agree when an answer is validated."""
    where, folder = f"localhost:{free_port()}", tmp_path / "run"
    options = (*MESH, "--validate", "--features", str(tmp_path / "features"), "--join", where)
    started = [tiny.start(folder, *options, str(i), devices=4) for i in range(2)]
    for process in started:
        tiny.finish(process)
    assert_same_steps(folder, whole_run)
    assert tau(folder) == tau(run_on_eight)
    assert (folder / "drafter" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "processes"),
    [
        ((1, 2), 2),
        pytest.param((2, 1), 2, marks=pytest.mark.gate),
        pytest.param((2, 2), 2, marks=pytest.mark.gate),
        pytest.param((2, 2), 4, marks=pytest.mark.gate),
        pytest.param((2, 2), 1, marks=pytest.mark.gate),
    ],
)
def test_processes_train_as_one_does_however_the_mesh_lies(tmp_path, mesh, processes):
    """A copy of the target may be cut over processes, which then train on the same rows."""
    where, devices = f"localhost:{free_port()}", mesh[0] * mesh[1] // processes
    options = ("--mesh", *map(str, mesh), "--steps", "3", "--processes", str(processes))
    started = [
        tiny.start(
            tmp_path / "run",
            *options,
            *(("--join", where, str(i)) if processes > 1 else ()),
            devices=devices,
        )
        for i in range(processes)
    ]
    for process in started:
        tiny.finish(process)
    tiny.finish(tiny.start(tmp_path / "alone", "--steps", "3"))
    found, expected = (tiny.losses(tmp_path / name) for name in ("run", "alone"))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.gate
@pytest.mark.parametrize("devices", [1, 8])
def test_a_run_goes_on_with_other_devices(whole_run, run_on_eight, tmp_path, devices):
    """Saved on 8 devices and resumed on 1, and the reverse."""
    folder = tmp_path / "run"
    shutil.copytree(run_on_eight if devices == 1 else whole_run, folder)
    shutil.rmtree(folder / "drafter")
    for step in (6, 8, 10, 12):
        shutil.rmtree(folder / "checkpoints" / str(step))
    options = MESH if devices == 8 else ("--validate",)  # as the run was begun
    tiny.finish(tiny.start(folder, *options, devices=devices))
    assert_same_steps(folder, whole_run)
