"""Training metrics, as JSON lines and optionally for TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class MetricsLog:
    """One JSON object per line, in the order of steps."""

    def __init__(self, path: str | Path, *, after: int, tensorboard: Path | None = None):
        """Args:
        after: lines of later steps, which will be computed again, are dropped.
        tensorboard: folder of event files, which get the same numbers.

        Raises:
          ValueError: TensorBoard's writer is not installed.
        """
        path = Path(path)
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [
            line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= after
        ]
        path.write_text("".join(kept))
        self.path = path
        self._events = None if tensorboard is None else _event_writer(tensorboard, after)

    def write(self, step: int, **values: Any) -> None:
        """Args: values: numbers, or lists of them, one per slot of a block."""
        with self.path.open("a") as stream:
            stream.write(json.dumps({"step": step, **values}) + "\n")
        if self._events is not None:
            for name, value in values.items():
                each = enumerate(value) if isinstance(value, list) else [(None, value)]
                for slot, number in each:
                    tag = name if slot is None else f"{name}/{slot}"
                    self._events.add_scalar(tag, number, step)

    def close(self) -> None:
        """Waits until everything is written."""
        if self._events is not None:
            self._events.close()


def _event_writer(folder: Path, after: int):
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "writing for TensorBoard needs tensorboardX: pip install tensorboardX"
        ) from error
    return SummaryWriter(str(folder), purge_step=after + 1)
