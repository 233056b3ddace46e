"""Step-time curves: the measured time of a round by its size, on the machine that serves."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxspec.decoding.budget import StepTimes
from jaxspec.decoding.fitting import VerifySize
from jaxspec.decoding.state import Decoder, Params
from jaxspec.models.target import Target

# Step times are flat if the slowest size takes less than this times the fastest. A single
# number of rows may be flat, where reading weights takes longer than multiplying nodes.
FLAT = 1.02
NODES_AS_ROUND = 16


@dataclasses.dataclass(frozen=True)
class Curve:
    """Seconds of a round for every number of rows and every verify size.

    Attributes:
      setup: the setup that was measured, see `setup_of`.
      seconds: by number of rows, the seconds of each size in the order of `setup["totals"]`.
    """

    setup: dict[str, Any]
    seconds: dict[int, Sequence[float]]

    def check(self, setup: dict[str, Any]) -> None:
        """Raises ValueError unless the curve fits this setup.

        A missing or flat curve would make every round verify everything (SGLang#35413).
        """
        expected = json.loads(json.dumps(setup))
        own = json.loads(json.dumps(self.setup))
        wrong = [name for name in expected if own.get(name) != expected[name]]
        if wrong:
            name = wrong[0]
            raise ValueError(
                f"the step-time curve was measured for {name} = {own.get(name)!r}, but this "
                f"engine has {expected[name]!r}; measure it again"
            )
        values, flat = [], True
        for rows, totals in setup["totals"].items():
            seconds = self.seconds.get(int(rows))
            if seconds is None or len(seconds) != len(totals):
                raise ValueError(
                    f"the step-time curve for {rows} rows has {seconds}; expected "
                    f"{len(totals)} times, for {totals} nodes. Measure it again"
                )
            values += seconds
            flat &= max(seconds) < FLAT * min(seconds)
        if not all(math.isfinite(x) and x > 0 for x in values):
            raise ValueError(
                f"the step-time curve holds {[x for x in values if not x > 0] or values}; "
                "expected positive seconds. Measure it again"
            )
        if flat:
            raise ValueError(
                f"the step-time curve is flat ({min(values):.3g} … {max(values):.3g} s): "
                "verifying more nodes would cost nothing, so every round would verify "
                "all. Measure it again, or raise max_nodes until a round takes longer"
            )

    def times(self, rows: int) -> StepTimes:
        """The staircase for a batch of `rows`."""
        return StepTimes(
            np.array(self.setup["totals"][str(rows)], np.int32),
            np.array(self.setup["per_row"][str(rows)], np.int32),
            np.array(self.seconds[rows], np.float32),
        )

    def save(self, path: str | Path) -> None:
        """Writes a JSON file, atomically."""
        text = json.dumps(dataclasses.asdict(self), indent=1)
        partial = Path(f"{path}.partial")
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> Curve:
        """Raises ValueError when the file is not a curve."""
        try:
            return cls.parse(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{path} is not a step-time curve ({error}); measure one and save it"
            ) from error

    @classmethod
    def parse(cls, raw: Any) -> Curve:
        """A curve from the JSON of `save`; raises ValueError if it is not one."""
        try:
            seconds = {
                int(rows): [float(x) for x in row] for rows, row in raw["seconds"].items()
            }
            return cls(dict(raw["setup"]), seconds)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error


def setup_of(
    target: Target,
    decoder: Decoder,
    params: Params,
    sizes: dict[int, tuple[VerifySize, ...]],
    capacity: int,
) -> dict[str, Any]:
    """Everything that step times depend on, as JSON values.

    Args:
      sizes: verify sizes by number of rows.
    """
    device = jax.devices()[0]
    return {
        "target": target.name,
        "weights": values_by_dtype(params),
        "drafter": repr(decoder.drafter),
        "rejection": decoder.rejection,
        "implementation": decoder.implementation,
        # A name may be a path, and its model another one by now.
        "decoder": hashlib.sha256(repr(decoder).encode()).hexdigest()[:16],
        "device": f"{device.platform}: {device.device_kind}",
        "devices": len(params.target.embed.devices()),
        "jax": jax.__version__,
        "capacity": capacity,
        "totals": {str(rows): [s.total for s in own] for rows, own in sizes.items()},
        "per_row": {str(rows): [s.per_row for s in own] for rows, own in sizes.items()},
    }


def values_by_dtype(params: Params) -> dict[str, int]:
    """Number of weights of every dtype, target's and drafter's: differs by format too."""
    found = Counter()
    for x in jax.tree.leaves(params):
        found[str(x.dtype)] += x.size
    return dict(sorted(found.items()))


def take_turn(state: Any, steps: Sequence[Callable[[Any], Any]]) -> tuple[Any, list[float]]:
    """Runs each `state = step(state)`; returns the last state and the seconds of every step."""
    state, seconds = jax.block_until_ready(state), []
    for step in steps:
        began = time.perf_counter()
        state = jax.block_until_ready(step(state))
        seconds.append(time.perf_counter() - began)
    return state, seconds


def measure(
    turns: Mapping[int, Callable[[], Sequence[float]]], repeats: int
) -> dict[int, list[float]]:
    """Seconds of the steps that each of `turns` runs, with all turns repeated `repeats` times.

    Takes each step's minimum over interleaved repeats: interference only adds time, and a slow
    phase of the machine affects all curves alike.
    """
    return least([{name: turn() for name, turn in turns.items()} for _ in range(repeats)])


def least(found: Sequence[Mapping[int, Sequence[float]]]) -> dict[int, list[float]]:
    """The minimum over repeats of `measure`, for every step."""
    return {name: np.min([own[name] for own in found], axis=0).tolist() for name in found[0]}


def guessed(sizes: tuple[VerifySize, ...]) -> StepTimes:
    """Step times to use until some are measured: the fixed cost of a round is guessed to equal
    that of `NODES_AS_ROUND` nodes."""
    totals, per_row = ([getattr(s, n) for s in sizes] for n in ("total", "per_row"))
    seconds = 1 + np.array(totals, np.float32) / NODES_AS_ROUND
    return StepTimes(np.array(totals, np.int32), np.array(per_row, np.int32), seconds)


def only(sizes: tuple[VerifySize, ...], chosen: int) -> StepTimes:
    """Step times under which only one size can be chosen."""
    seconds = np.full(len(sizes), np.inf, np.float32)
    seconds[chosen] = 1.0
    totals, per_row = ([getattr(s, n) for s in sizes] for n in ("total", "per_row"))
    return StepTimes(np.array(totals, np.int32), np.array(per_row, np.int32), seconds)
