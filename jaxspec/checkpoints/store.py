"""Checkpoints of a training run, and weights of a target. The only user of Orbax."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from jaxspec.checkpoints.checksums import by_path, checksums

STATE, POSITION, CHECKSUMS = "state", "position", "checksums"
CHUNK_BYTES = 64 * 2**20  # smallest chunk of a larger array
IN_FLIGHT_BYTES = 256 * 2**20  # of copies while arrays are written or read


class Store:
    """Numbered checkpoints in a folder, written atomically.

    It keeps the newest ones and the one with the best score.

    Attributes:
      scores: of checkpoints by step, the higher the better; the caller sets them.
    """

    def __init__(self, folder: str | Path, *, keep: int = 2):
        """Args: keep: number of newest checkpoints to keep."""
        self.folder = Path(folder).absolute()
        self.scores: dict[int, float] = {}
        policies = ocp.training.preservation_policies
        kept = [policies.LatestN(keep), _Best(self)]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._checkpoints = ocp.training.Checkpointer(
            self.folder,
            preservation_policy=policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,
        )

    def save(self, step: int, state: Any, position: dict[str, int]) -> None:
        """Writes a checkpoint, replacing one of the same step; returns when it is on disk.

        Args:
          state: a pytree of arrays.
          position: position in the data; not empty.

        Raises:
          OSError: it cannot be written; those of other steps are as they were.
        """
        written = {STATE: state, POSITION: position, CHECKSUMS: _sums(state, position)}
        try:
            with _quiet():
                self._checkpoints.save_checkpointables(
                    step, written, force=True, overwrite=True
                )
        except Exception as error:  # whatever Orbax and TensorStore raise on a full disk
            raise OSError(
                f"checkpoint {step} cannot be written to {self.folder} ({_reason(error)}); "
                "make room there, then run again: earlier checkpoints are as they were"
            ) from error

    def restore(self, like: Any, step: int | None = None) -> tuple[int, Any, dict[str, int]]:
        """A checkpoint's step, state and position.

        Args:
          like: a state with the shapes, dtypes and shardings of the result; its devices may
            differ from those at saving.
          step: step of the checkpoint; the newest by default.

        Raises:
          ValueError: there is no such checkpoint, it is damaged, or belongs to another model.
        """
        steps = self.steps
        if not steps:
            raise ValueError(f"{self.folder} holds no checkpoint; train in a new folder")
        step = steps[-1] if step is None else step
        if step not in steps:
            raise ValueError(f"{self.folder} has no checkpoint {step}; it has {steps}")
        wanted = {STATE: jax.tree.map(_abstract, like), POSITION: None}
        if (self.folder / str(step) / CHECKSUMS).exists():  # older ones have none
            wanted[CHECKSUMS] = None
        try:
            with _quiet():
                found = self._checkpoints.load_checkpointables(step, wanted)
            if CHECKSUMS in found:
                _compare(found[CHECKSUMS], _sums(found[STATE], found[POSITION]))
        except Exception as error:  # whatever Orbax and TensorStore raise on a damaged file
            older = [other for other in steps if other < step]
            remedy = (
                f"resume from checkpoint {older[-1]}, the one before"
                if older
                else "there is none before it: start again in a new folder"
            )
            raise ValueError(
                f"checkpoint {step} in {self.folder} cannot be read ({_reason(error)}); "
                + remedy
            ) from error
        position = {name: int(value) for name, value in found[POSITION].items()}
        return step, found[STATE], position

    def drop_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps, the newest first."""
        for later in [x for x in reversed(self.steps) if x > step]:
            self._checkpoints.delete(later)

    @property
    def steps(self) -> list[int]:
        """Steps of all checkpoints, ascending."""
        return sorted(checkpoint.step for checkpoint in self._checkpoints.checkpoints)

    @property
    def best(self) -> int | None:
        """Step of the checkpoint with the highest score, of equals the later one."""
        return _best(self.scores, self.steps)

    def close(self) -> None:
        self._checkpoints.close()


@dataclasses.dataclass(frozen=True)
class _Best:
    """Orbax's policy that keeps the best checkpoint.

    A policy of Orbax's own reads scores that are saved with a checkpoint. To add one it is
    deleted and written again, so that a run killed meanwhile would lose it.
    """

    store: Store

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        best = _best(self.store.scores, [x.step for x in checkpoints])
        return [x.step == best for x in checkpoints]


def save_weights(folder: Path, params: Any) -> None:
    """Writes a pytree of arrays as a new uncompressed store; each process writes its shards."""
    sums = checksums(params)
    in_order = np.array([sums[path] for path in sorted(sums)], np.uint32)
    stored = by_path(params) | {CHECKSUMS: in_order}
    with _weights_context(params):
        ocp.save(folder.absolute(), stored)


def load_weights(folder: Path, like: Any) -> Any:
    """The arrays of a store; every process reads the shards of its devices.

    Args:
      like: a pytree of shapes, dtypes and shardings, possibly of only some of the arrays.

    Raises:
      ValueError: the store is damaged, or belongs to another model.
    """
    wanted = by_path(like)
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
            # In the stored dtype, for the checksums; cast below.
            abstract = {x: _abstract(like, stored[x].dtype) for x, like in wanted.items()}
            read = dict.fromkeys(stored, ocp.PLACEHOLDER) | abstract
            if CHECKSUMS in stored:  # older stores have none
                read[CHECKSUMS] = np.empty(stored[CHECKSUMS].shape, np.uint32)
            arrays = ocp.load(folder.absolute(), read)
            if CHECKSUMS in stored:
                written = zip(sorted({*stored} - {CHECKSUMS}), arrays[CHECKSUMS], strict=True)
                found = checksums({path: arrays[path] for path in wanted})
                _compare({x: int(sum) for x, sum in written if x in found}, found)
        except Exception as error:  # whatever Orbax and TensorStore raise on a damaged file
            raise ValueError(
                f"{folder} cannot be read ({_reason(error)}); convert the checkpoint again"
            ) from error
    cast = [arrays.pop(path).astype(x.dtype) for path, x in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(like), cast)


def _sums(state: Any, position: dict[str, Any]) -> dict[str, int]:
    """The checksums that are stored with a checkpoint."""
    return checksums(state) | {f"{POSITION}.{k}": int(x) for k, x in position.items()}


def _compare(written: dict[str, int], found: dict[str, int]) -> None:
    """Raises ValueError if something is not what was written."""
    other = [path for path, sum in found.items() if int(written.get(path, -1)) != sum]
    if other:
        more = f" and {len(other) - 1} more" if len(other) > 1 else ""
        raise ValueError(f"'{other[0]}'{more} is not what was written: its checksum differs")


def _weights_context(arrays: Any) -> ocp.Context:
    largest = max(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(arrays))
    context = ocp.Context()
    context.array.saving.use_compression = False
    context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    context.memory.write_concurrent_bytes = max(IN_FLIGHT_BYTES, largest + 1)
    context.memory.read_concurrent_bytes = max(IN_FLIGHT_BYTES, largest + 1)
    return context


def _best(scores: dict[int, float], steps: Iterable[int]) -> int | None:
    scored = [(scores[step], step) for step in steps if step in scores]
    return max(scored)[1] if scored else None


def _reason(error: Exception) -> str:
    """The first line of an error of Orbax."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _abstract(x: Any, dtype: Any = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(
        x.shape, dtype or x.dtype, sharding=getattr(x, "sharding", None)
    )


@contextlib.contextmanager
def _quiet():
    """Keeps the tracebacks of Orbax's own threads out of a one-line error."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
