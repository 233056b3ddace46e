"""Training metrics: JSON lines, and the same numbers for TensorBoard and Weights & Biases."""

from __future__ import annotations

import hashlib
import importlib
import json
import resource
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax

from jaxspec.whole_files import replace_text

OF_THE_MACHINE = ("tokens_per_second", "peak_memory")  # may differ in a repeated run
Scalars = Mapping[str, float]
Writer = tuple[Callable[[int, Scalars], None], Callable[[], None]]  # writes a step; closes


class MetricsLog:
    """One JSON object per line, in the order of steps."""

    def __init__(
        self,
        path: str | Path,
        *,
        after: int,
        tensorboard: Path | None = None,
        wandb: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ):
        """Args:
        after: step; lines of later steps, which will be computed again, are dropped.
        tensorboard: folder of event files, which get the same numbers.
        wandb: project of Weights & Biases; its run is named after the folder of `path`. It
          keeps earlier values of steps that are computed again.
        settings: the run's settings, for Weights & Biases.

        Raises:
          ValueError: TensorBoard's writer or wandb is not installed.
        """
        path = Path(path)
        self._writers: list[Writer] = []
        if tensorboard is not None:
            self._writers.append(_tensorboard(tensorboard, after))
        if wandb is not None:
            self._writers.append(_wandb(wandb, path.parent, settings or {}))
        lines = _lines(path)
        kept = [
            line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= after
        ]
        if kept != lines:
            replace_text(path, "".join(kept))
        self.path = path

    def write(self, step: int, **values: Any) -> None:
        """Args: values: numbers, or lists of them, one per slot of a block."""
        with self.path.open("a") as stream:
            stream.write(json.dumps({"step": step, **values}) + "\n")
        scalars = {}
        for name, value in values.items():
            if isinstance(value, list):
                scalars |= {f"{name}/{slot}": x for slot, x in enumerate(value)}
            else:
                scalars[name] = value
        for write, _ in self._writers:
            write(step, scalars)

    def close(self) -> None:
        """Waits until everything is written."""
        for _, close in self._writers:
            close()


def logged(path: Path, name: str, *, until: int) -> dict[int, Any]:
    """A metric in a log by step, of the steps up to `until` that have it."""
    lines = [json.loads(line) for line in _lines(path) if line.endswith("\n")]
    return {x["step"]: x[name] for x in lines if name in x and x["step"] <= until}


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines(keepends=True) if path.exists() else []


def peak_memory() -> int:
    """Peak bytes in use on this process's fullest device; on a CPU, of the process."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [x["peak_bytes_in_use"] for x in stats if "peak_bytes_in_use" in x]
    unit = 1 if sys.platform == "darwin" else 1024
    return max(peaks, default=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def check_writers(*, tensorboard: bool, wandb: bool) -> None:
    """Raises ValueError if a requested library is not installed."""
    if tensorboard:
        _library("tensorboardX", "writing for TensorBoard")
    if wandb:
        _library("wandb", "logging to Weights & Biases")


def _library(name: str, purpose: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"{purpose} needs {name}: pip install {name}") from error


def _tensorboard(folder: Path, after: int) -> Writer:
    library = _library("tensorboardX", "writing for TensorBoard")
    events = library.SummaryWriter(str(folder), purge_step=after + 1)

    def write(step: int, scalars: Scalars) -> None:
        for name, value in scalars.items():
            events.add_scalar(name, value, step)

    return write, events.close


def _wandb(project: str, folder: Path, settings: Mapping[str, Any]) -> Writer:
    library, where = _library("wandb", "logging to Weights & Biases"), str(folder.resolve())
    run = library.init(
        project=project,
        name=folder.name,
        id=hashlib.sha256(where.encode()).hexdigest()[:16],  # the same for a resumed run
        resume="allow",
        dir=where,
        config=dict(settings),
    )
    return lambda step, scalars: run.log(dict(scalars), step=step), run.finish
