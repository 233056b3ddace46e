"""Checkpoints of a training run, and weights of a target. The only user of Orbax."""

from __future__ import annotations

import contextlib
import logging
import math
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

STATE, POSITION = "state", "position"
CHUNK_BYTES = 64 * 2**20  # least that is read of an array, where it is larger
IN_FLIGHT_BYTES = 256 * 2**20  # copies of arrays while they are written or read


class Store:
    """Numbered checkpoints in a folder; one appears whole or not at all.

    Keeps the newest ones and the one with the best score.
    """

    def __init__(self, folder: str | Path, *, keep: int = 2):
        """Args: keep: how many of the newest to keep."""
        self.folder = Path(folder).absolute()
        policies = ocp.training.preservation_policies
        best = policies.BestN(get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._checkpoints = ocp.training.Checkpointer(
            self.folder,
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
            cleanup_tmp_directories=True,
        )

    def save(
        self, step: int, state: Any, position: dict[str, int], *, score: float | None = None
    ) -> None:
        """Writes a checkpoint over one of the same step; returns when it is on disk.

        Args:
          state: a pytree of arrays.
          position: of the data; not empty.
          score: the higher the better; None for a checkpoint that was not judged.
        """
        self._checkpoints.save_checkpointables(
            step,
            {STATE: state, POSITION: position},
            metrics=None if score is None else {"score": score},
            force=True,
            overwrite=True,
        )

    def restore(self, like: Any, step: int | None = None) -> tuple[int, Any, dict[str, int]]:
        """A checkpoint's step, state and position.

        Args:
          like: a state whose shapes, dtypes and shardings the result takes; the devices may be
            others than those it was saved from.
          step: the newest by default.

        Raises:
          ValueError: there is no such checkpoint, it is damaged, or is of another model.
        """
        steps = self.steps
        if not steps:
            raise ValueError(f"{self.folder} holds no checkpoint")
        step = steps[-1] if step is None else step
        if step not in steps:
            raise ValueError(f"{self.folder} has no checkpoint {step}; it has {steps}")
        abstract = jax.tree.map(_abstract, like)
        try:
            with _quiet():
                found = self._checkpoints.load_checkpointables(
                    step, {STATE: abstract, POSITION: None}
                )
        except Exception as error:  # whatever Orbax and TensorStore raise on a damaged file
            older = [other for other in steps if other < step]
            remedy = (
                f"resume from checkpoint {older[-1]}, the one before"
                if older
                else "there is none before it: start again in a new folder"
            )
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ValueError(
                f"checkpoint {step} in {self.folder} cannot be read ({reason[0][:200]}); "
                + remedy
            ) from error
        position = {name: int(value) for name, value in found[POSITION].items()}
        return step, found[STATE], position

    @property
    def steps(self) -> list[int]:
        """Of all checkpoints, ascending."""
        return sorted(checkpoint.step for checkpoint in self._checkpoints.checkpoints)

    @property
    def best(self) -> int | None:
        """Step of the checkpoint with the highest score, the later one of equals."""
        scored = [
            (_score(c.metrics), c.step) for c in self._checkpoints.checkpoints if c.metrics
        ]
        return max(scored)[1] if scored else None

    def scored(self, step: int) -> bool:
        """Whether the checkpoint of that step was judged."""
        return any(c.step == step and c.metrics for c in self._checkpoints.checkpoints)

    def close(self) -> None:
        self._checkpoints.close()


def save_weights(folder: Path, params: Any) -> None:
    """Writes a pytree of arrays as a new store, uncompressed; every process its own shards."""
    with _weights_context(params):
        ocp.save(folder.absolute(), _by_path(params))


def load_weights(folder: Path, like: Any) -> Any:
    """The arrays of a store; every process reads what its devices hold.

    Args:
      like: a pytree of shapes, dtypes and shardings; a part of what was saved will do.

    Raises:
      ValueError: the store is damaged, or is of another model.
    """
    wanted = _by_path(like)
    with _weights_context(like), _quiet():
        try:
            stored = ocp.metadata(folder.absolute()).metadata
            for path, x in wanted.items():
                found = getattr(stored.get(path), "shape", None)
                if found != x.shape:
                    raise ValueError(
                        f"'{path}' is "
                        + ("missing" if found is None else f"of shape {found}")
                        + f", expected {x.shape}"
                    )
            absent = {path: ocp.PLACEHOLDER for path in stored if path not in wanted}
            arrays = ocp.load(folder.absolute(), wanted | absent)
        except Exception as error:  # whatever Orbax and TensorStore raise on a damaged file
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ValueError(
                f"{folder} cannot be read ({reason[0][:200]}); convert the checkpoint again"
            ) from error
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[path] for path in wanted])


def _by_path(tree: Any) -> dict[str, Any]:
    flat, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in flat}


def _weights_context(arrays: Any) -> ocp.Context:
    largest = max(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(arrays))
    context = ocp.Context()
    context.array.saving.use_compression = False
    context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    context.memory.write_concurrent_bytes = max(IN_FLIGHT_BYTES, largest + 1)
    context.memory.read_concurrent_bytes = max(IN_FLIGHT_BYTES, largest + 1)
    return context


def _score(metrics: dict[str, float]) -> float:
    return metrics["score"]


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))


@contextlib.contextmanager
def _quiet():
    """Keeps the tracebacks of Orbax's own threads out of a one-line error."""
    logger = logging.getLogger("asyncio")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
