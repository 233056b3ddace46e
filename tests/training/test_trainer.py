"""Runs that are killed end where runs that are not do."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from checkpoints.drafters import load_drafter
from checkpoints.store import Store
from jaxspec.config import TreeConfig
from jaxspec.training.step import copy_layers, init_state, learning_rate
from jaxspec.training.trainer import train
from tests.training import tiny

ROOT = Path(__file__).parents[2]


def start(folder, cache, *mesh, **variables):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **variables,
    }
    command = [sys.executable, "-m", "tests.training.tiny", str(folder), *mesh]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    )


def finish(process):
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


def signal_after(process, folder, lines, number):
    """Sends a signal once the run has logged so many steps."""
    path = folder / "metrics.jsonl"
    while not path.exists() or path.read_text().count("\n") < lines:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    process.send_signal(number)
    process.communicate(timeout=300)


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A run that nothing interrupts, and the cache of its compiled programs."""
    folder, cache = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("cache")
    finish(start(folder, cache))
    return folder, cache


def test_interrupted_runs_end_the_same(whole_run, tmp_path):
    whole, cache = whole_run
    for lines, number in [(1, signal.SIGKILL), (4, signal.SIGTERM), (7, signal.SIGKILL)]:
        process = start(tmp_path, cache)
        signal_after(process, tmp_path, lines, number)
        assert process.returncode == (0 if number == signal.SIGTERM else -number)
        assert not (tmp_path / "drafter").exists()
    finish(start(tmp_path, cache))
    for name in ("metrics.jsonl", "drafter/model.safetensors", "drafter/config.json"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.gate
@pytest.mark.parametrize("processes", [1, 2])
def test_many_devices_train_as_one_does(whole_run, tmp_path, processes):
    whole, cache = whole_run
    devices = f"--xla_force_host_platform_device_count={8 // processes}"
    where = f"localhost:{free_port()}"
    started = [
        start(
            tmp_path,
            cache,
            *("4", "2"),
            *((where, str(i)) if processes > 1 else ()),
            XLA_FLAGS=devices,
        )
        for i in range(processes)
    ]
    for process in started:
        finish(process)
    one, many = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (whole, tmp_path)
    )
    for expected, got in zip(one, many, strict=True):
        for name in ("loss", "gradient_norm", "acceptance"):
            np.testing.assert_allclose(got[name], expected[name], rtol=1e-4)
    assert (tmp_path / "drafter" / "model.safetensors").exists()


def test_the_checkpoint_is_what_was_trained_and_loads(whole_run):
    folder, _ = whole_run
    target = tiny.target()
    _, params = load_drafter(folder / "drafter", target.config, target.params, TreeConfig())
    state = init_state(tiny.CONFIG, target.params)
    step, state, _ = Store(folder / "checkpoints").restore(state)
    assert step == tiny.CONFIG.steps
    jax.tree.map(np.testing.assert_array_equal, params.head, state.weights)


def test_other_settings_do_not_go_on_with_a_run(whole_run):
    folder, _ = whole_run
    other = dataclasses.replace(tiny.CONFIG, anchors=5, seed=1)
    with pytest.raises(ValueError, match=r"other settings \(anchors, seed differ\)"):
        train(other, tiny.target(), tiny.examples(), folder)


def test_a_finished_run_is_left_as_it_is(whole_run):
    folder, _ = whole_run
    before = (folder / "metrics.jsonl").read_bytes()
    assert train(tiny.CONFIG, tiny.target(), tiny.examples(), folder) == folder / "drafter"
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_the_first_weights_are_the_targets_last_layers():
    target = tiny.target()
    weights = init_state(tiny.CONFIG, target.params).weights
    last = target.params.layers[-1]
    np.testing.assert_array_equal(weights.layers[0].down[...], last.mlp.down)
    queries, keys = last.attention.qkv[:, :, :-2], last.attention.qkv[:, :, -2]
    np.testing.assert_array_equal(weights.layers[0].q[...], queries)
    np.testing.assert_array_equal(weights.layers[0].kv[:, :, 0], keys)


def test_layers_of_other_shapes_are_refused():
    wide = dataclasses.replace(tiny.DRAFTER, intermediate_size=48)
    config = dataclasses.replace(tiny.CONFIG, drafter=wide, initial="random")
    weights = init_state(config, tiny.target().params).weights
    with pytest.raises(ValueError, match="set initial to 'random'"):
        copy_layers(wide, weights, tiny.target().params)


def test_the_learning_rate_warms_up_and_decays():
    rate = learning_rate(tiny.CONFIG.optimizer, 100)
    assert jax.numpy.allclose(rate(0), 0.01 / 4)
    assert jax.numpy.allclose(rate(4), 0.01)
    assert rate(52) < 0.01 > rate(100) and abs(rate(100)) < 1e-9
