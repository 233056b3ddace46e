"""A run small enough for a test: `python -m tests.training.tiny --help`."""

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from jaxspec.config import DrafterConfig, TargetConfig
from jaxspec.data.conversations import Example
from jaxspec.models.params import random_params
from jaxspec.models.target import Target
from jaxspec.sharding import make_mesh
from jaxspec.training.losses import LossConfig
from jaxspec.training.metrics import OF_THE_MACHINE
from jaxspec.training.recipe import OptimizerConfig, TrainConfig
from jaxspec.training.run_folder import METRICS
from jaxspec.training.trainer import train
from jaxspec.training.vocabulary_loss import Mixture
from tests.processes import ROOT, many_devices

TARGET_CONFIG = TargetConfig(
    vocab_size=24,
    hidden_size=16,
    intermediate_size=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
)
DRAFTER = DrafterConfig(
    vocab_size=24,
    hidden_size=16,
    intermediate_size=32,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    target_layers=3,
    taps=(0, 1),
    block_size=3,
    mask_token_id=23,
    predict_next=True,
    sequential="markov",
    rank=4,
    confidence="hidden_and_previous",
)
CONFIG = TrainConfig(
    DRAFTER,
    loss=LossConfig(Mixture(chunk=16)),
    optimizer=OptimizerConfig(learning_rate=1e-2),
    steps=12,
    batch_size=8,
    micro_batch=4,
    anchors=4,
    checkpoint_every=2,
    keep=9,
)


def target() -> Target:
    return Target("tiny", TARGET_CONFIG, random_params(TARGET_CONFIG, jax.random.key(0)))


def examples(count: int = 20) -> list[Example]:
    random = np.random.default_rng(0)
    rows = []
    for length in random.integers(20, 100, count):
        tokens = random.integers(0, 22, length).astype(np.int32)
        rows.append(Example(tokens, np.arange(length) >= 8))
    return rows


def metrics(folder) -> list[dict]:
    """The lines of a run's metrics, as far as they follow from its settings and data."""
    lines = (Path(folder) / METRICS).read_text().splitlines()
    return [
        {name: x for name, x in json.loads(line).items() if name not in OF_THE_MACHINE}
        for line in lines
    ]


def steps(folder) -> list[dict]:
    """The lines of a run's metrics that are steps, rather than validations."""
    return [line for line in metrics(folder) if "loss" in line]


def losses(folder) -> list[float]:
    return [line["loss"] for line in steps(folder)]


def start(folder, *options, devices=1) -> subprocess.Popen:
    """A run in a process of its own, with the options of `main`."""
    command = [sys.executable, "-m", "tests.training.tiny", str(folder), *options]
    return subprocess.Popen(
        command, cwd=ROOT, env=many_devices(devices), stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--mesh", type=int, nargs=2, metavar=("DATA", "MODEL"))
    parser.add_argument("--join", nargs=2, metavar=("ADDRESS", "PROCESS"), help="others")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=CONFIG.steps)
    parser.add_argument("--validate", action="store_true")
    parser.add_argument("--features")
    options = parser.parse_args()
    if options.join:
        address, process = options.join
        jax.distributed.initialize(
            address, num_processes=options.processes, process_id=int(process)
        )
    mesh = make_mesh(data=options.mesh[0], model=options.mesh[1]) if options.mesh else None
    prompts = [[1, 2, 3], [4, 5]] if options.validate else []
    train(
        dataclasses.replace(CONFIG, steps=options.steps),
        target(),
        examples(),
        options.folder,
        prompts=prompts,
        features=options.features,
        mesh=mesh,
    )


if __name__ == "__main__":
    main()
