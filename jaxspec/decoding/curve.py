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

from jaxspec.decoding.habit import Habit
from jaxspec.decoding.schedule import Batch
from jaxspec.decoding.staircase import Staircase, VerifySize
from jaxspec.decoding.state import Decoder, Params
from jaxspec.models.target import Target
from jaxspec.whole_files import replace_text

# Step times are flat if the slowest size takes less than this times the fastest. A single
# number of rows may be flat, where reading weights takes longer than multiplying nodes.
FLAT = 1.02


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
        stored = json.loads(json.dumps(self.setup))
        wrong = [name for name in expected if stored.get(name) != expected[name]]
        if wrong:
            name = wrong[0]
            raise ValueError(
                f"the step-time curve was measured for {name} = {stored.get(name)!r}, but this "
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

    def staircase(self, rows: int) -> Staircase:
        """The staircase for a batch of `rows`."""
        totals, per_row = (self.setup[name][str(rows)] for name in ("totals", "per_row"))
        return Staircase.of(map(VerifySize, totals, per_row), self.seconds[rows])

    def save(self, path: str | Path) -> None:
        """Writes a JSON file, atomically."""
        replace_text(Path(path), json.dumps(dataclasses.asdict(self), indent=1) + "\n")

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
        "totals": {str(rows): [s.total for s in sizes[rows]] for rows in sizes},
        "per_row": {str(rows): [s.per_row for s in sizes[rows]] for rows in sizes},
    }


def values_by_dtype(params: Params) -> dict[str, int]:
    """Number of weights of every dtype, target's and drafter's: differs by format too."""
    counts = Counter()
    for x in jax.tree.leaves(params):
        counts[str(x.dtype)] += x.size
    return dict(sorted(counts.items()))


def half_full(empty: Batch, decoder: Decoder) -> Batch:
    """Rows in the middle of an answer, as step times are measured on them.

    Args:
      empty: from `empty_rows`.
    """
    rows, capacity = empty.state.tokens.shape
    length = np.full(rows, capacity // 2, np.int32)
    limit = np.full(rows, capacity - decoder.drafter.depth - 1, np.int32)
    changed = jax.device_put(dict(length=length, limit=limit, done=np.zeros(rows, bool)))
    return dataclasses.replace(empty, state=dataclasses.replace(empty.state, **changed))


def time_sizes(
    decode: Callable[[Batch, Habit, Staircase, int], tuple[Batch, Habit]],
    batch: Batch,
    habit: Habit,
    staircase: Staircase,
) -> list[float]:
    """Seconds of one round in each size, one after the other; `batch` is donated.

    Args:
      decode: runs a number of rounds, as `decode_rows`.
    """
    carry, seconds = jax.block_until_ready((batch, habit)), []
    for i in range(len(staircase.sizes)):
        began = time.perf_counter()
        carry = jax.block_until_ready(decode(*carry, staircase.only(i), 1))
        seconds.append(time.perf_counter() - began)
    return seconds


def least(repeats: Sequence[Mapping[int, Sequence[float]]]) -> dict[int, list[float]]:
    """The least seconds of every size over interleaved repeats, by number of rows.

    Interference only adds time, and a slow phase of the machine affects all sizes alike.
    """
    return {
        rows: np.min([seconds[rows] for seconds in repeats], axis=0).tolist()
        for rows in repeats[0]
    }
