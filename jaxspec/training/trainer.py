"""The training loop: resumable, interruptible, ending with a checkpoint that decodes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from checkpoints.drafters import save_drafter
from checkpoints.store import Store
from jaxspec.generation import Prompt, Target
from jaxspec.sharding import place
from jaxspec.training.batches import Batch, Position, collate, plan, share
from jaxspec.training.conversations import Example
from jaxspec.training.feature_cache import FeatureCache, open_features
from jaxspec.training.features import Features
from jaxspec.training.recipe import TrainConfig
from jaxspec.training.sharding import (
    any_process,
    gather,
    place_batch,
    state_shardings,
)
from jaxspec.training.step import TrainState, init_state, learning_rate, train_step
from jaxspec.training.validation import trained_drafter, walked_tau

CONFIG, METRICS, CHECKPOINTS, DRAFTER = (
    "config.json",
    "metrics.jsonl",
    "checkpoints",
    "drafter",
)


def train(
    config: TrainConfig,
    target: Target,
    examples: Sequence[Example],
    folder: str | Path,
    *,
    prompts: Sequence[Prompt] = (),
    resume_step: int | None = None,
    features: str | Path | None = None,
    mesh: Mesh | None = None,
) -> Path | None:
    """Trains a drafter, or goes on with the run that the folder holds.

    The folder gets `config.json`, `metrics.jsonl`, `checkpoints/` and, at the end, `drafter/`:
    the best weights by walked tau, or the last ones without prompts. A run that was killed
    goes on from its newest checkpoint and ends with the same weights, bit for bit on the same
    devices. SIGTERM ends it after the current step, with a checkpoint.

    Args:
      examples: from `conversations.read_examples`.
      prompts: held out, for validation.
      resume_step: checkpoint to go on from; the newest by default.
      features: folder of the target's features (`feature_cache`), filled first where it is not
        whole; by default they are computed with every step and not kept.
      mesh: devices to train on (`jaxspec.sharding`), of all processes if there are several:
        each calls this function with the same arguments and a folder they share. A run may go
        on with other devices.

    Returns:
      The folder of the drafter, or None if the run was interrupted.

    Raises:
      ValueError: the folder holds a run with other settings, the checkpoint is damaged, the
        loss is not a number, or several processes shall validate.
    """
    folder, hosts = Path(folder), jax.process_count()
    leads = jax.process_index() == 0
    if prompts and hosts > 1:
        raise ValueError(
            f"{hosts} processes cannot decode together; train without prompts and validate "
            "the drafter afterwards"
        )
    if leads:
        _check_settings(folder, config, target)
    if (folder / DRAFTER).exists():
        return folder / DRAFTER
    store = Store(folder / CHECKPOINTS, keep=config.keep)
    state, position = init_state(config, target.params), Position()
    if mesh is not None:
        target = dataclasses.replace(target, params=place(mesh, target.params))
        state = jax.device_put(state, state_shardings(mesh, state))
    cached = None
    if features is not None:
        cached = open_features(features, target, examples, taps=config.drafter.taps)
    if store.steps or resume_step is not None:
        _, state, saved = store.restore(state, resume_step)
        position = Position(**saved)
    metrics = Metrics(folder / METRICS if leads else os.devnull, after=int(state.step))
    rate = learning_rate(config.optimizer, config.steps)

    def validate(state: TrainState) -> float | None:
        if not prompts:
            return None
        tau = walked_tau(
            target, trained_drafter(config.drafter, state.weights, target), prompts
        )
        metrics.write(int(state.step), tau=tau)
        return tau

    batches = BatchArrays(config, examples, mesh, cached)
    done = int(state.step)
    progress = tqdm(total=config.steps, initial=done, unit="step", file=sys.stderr)
    with contextlib.closing(store), progress, _termination() as terminated:
        upcoming = batches.at(position)
        while done < config.steps:
            epoch = position.epoch
            state, means = train_step(
                config, target.config, target.params, state, *upcoming, mesh
            )
            position = batches.after(position)
            upcoming = batches.at(position)  # while the devices compute
            means = jax.device_get(means)
            if not math.isfinite(means["loss"]):
                raise ValueError(
                    f"the loss of step {done} is {means['loss']}; lower the learning rate and "
                    "start from an earlier checkpoint"
                )
            metrics.write(
                done + 1, epoch=epoch, learning_rate=float(rate(done)), **_plain(means)
            )
            done += 1
            progress.update()
            progress.set_postfix(loss=f"{means['loss']:.3f}")

            last, stop = done == config.steps, any_process(bool(terminated))
            score = validate(state) if last or _due(done, config.validate_every) else None
            if last or score is not None or stop or _due(done, config.checkpoint_every):
                store.save(done, state, dataclasses.asdict(position), score=score)
            if stop and not last:
                return None
        best = store.best
        if best not in (None, done):
            _, state, _ = store.restore(state, best)
    weights = gather(mesh, state.weights)
    if leads:
        export(config, target, weights, folder / DRAFTER)
    return folder / DRAFTER


class BatchArrays:
    """The batches of a run by position, as `train_step` takes them."""

    def __init__(
        self,
        config: TrainConfig,
        examples: Sequence[Example],
        mesh: Mesh | None,
        features: FeatureCache | None,
    ):
        self._config, self._examples = config, examples
        self._mesh, self._features = mesh, features
        self._lengths = [len(example) for example in examples]
        self._epoch, self._batches = -1, []

    def at(self, position: Position) -> tuple[jax.Array, jax.Array, Features | None]:
        """Tokens, supervised and, if they are kept, features, on the devices."""
        batch = self._plan(position.epoch)[position.index]
        part = dict(
            micro_batch=self._config.micro_batch,
            host=jax.process_index(),
            hosts=jax.process_count(),
        )
        features = None
        if self._features is not None:
            features = self._features.read(share(batch, **part), batch.length)
        arrays = collate(self._examples, batch, **part)
        return place_batch(self._mesh, (*arrays, features))

    def after(self, position: Position) -> Position:
        return position.after(len(self._plan(position.epoch)))

    def _plan(self, epoch: int) -> list[Batch]:
        if epoch != self._epoch:
            self._epoch = epoch
            self._batches = plan(
                self._lengths, self._config.batch_size, seed=self._config.seed, epoch=epoch
            )
        return self._batches


def export(config: TrainConfig, target: Target, weights: nnx.State, folder: Path) -> None:
    """Writes a drafter's checkpoint, in the target's dtype; it appears whole or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    dtype = target.params.embed.dtype
    weights = jax.tree.map(lambda x: x.astype(dtype), weights)
    drafter = trained_drafter(config.drafter, weights, target)
    save_drafter(partial, drafter.drafter, drafter.params)
    os.rename(partial, folder)


class Metrics:
    """One JSON object per line, in the order of steps."""

    def __init__(self, path: str | Path, *, after: int):
        """Args: after: lines of later steps, which will be computed again, are dropped."""
        path = Path(path)
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [
            line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= after
        ]
        path.write_text("".join(kept))
        self.path = path

    def write(self, step: int, **values: Any) -> None:
        with self.path.open("a") as stream:
            stream.write(json.dumps({"step": step, **values}) + "\n")


def _check_settings(folder: Path, config: TrainConfig, target: Target) -> None:
    """Writes the settings of a new run; those of an old one must be the same."""
    settings = {"target": target.name, **dataclasses.asdict(config)}
    text = json.dumps(settings, indent=2) + "\n"
    path = folder / CONFIG
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return
    if path.read_text() != text:
        old = json.loads(path.read_text())
        different = [name for name in settings if old.get(name) != json.loads(text)[name]]
        raise ValueError(
            f"{folder} holds a run with other settings ({', '.join(different)} differ); "
            "train in a new folder or use the same ones"
        )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _plain(means: dict[str, Any]) -> dict[str, Any]:
    return {name: value.tolist() for name, value in means.items()}


@contextlib.contextmanager
def _termination() -> Iterator[list]:
    """A list that is filled when SIGTERM arrives; the signal does nothing else meanwhile.

    Outside the main thread, where Python allows no handlers, it stays empty.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, previous)
