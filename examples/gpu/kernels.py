"""The kernels that the device ran, from a profile of a few rounds."""

from __future__ import annotations

import collections
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

SHOWN = 40


def by_time(run: Callable[[], Any], rounds: int) -> dict:
    """Runs `rounds` rounds under the profiler.

    Returns:
      Per round: `launches`; `busy_ms`, the sum of all kernels' times; `span_ms`, from the
      first's start to the last's end; and `by_name`, rows of (name, launches, ms), costliest
      first.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (path,) = Path(folder).glob("**/*.xplane.pb")
        events = list(_events(jax.profiler.ProfileData.from_file(str(path))))
    total, count = collections.Counter(), collections.Counter()
    for event in events:
        total[event.name] += event.duration_ns
        count[event.name] += 1
    first = min((event.start_ns for event in events), default=0)
    last = max((event.start_ns + event.duration_ns for event in events), default=0)
    return dict(
        launches=round(len(events) / rounds, 1),
        busy_ms=round(sum(total.values()) / 1e6 / rounds, 4),
        span_ms=round((last - first) / 1e6 / rounds, 4),
        by_name=[
            (name[:80], round(count[name] / rounds, 2), round(ns / 1e6 / rounds, 4))
            for name, ns in total.most_common(SHOWN)
        ],
    )


def _events(profile):
    """Kernels of a GPU's streams; on a CPU, what the program's operations took."""
    planes = list(profile.planes)
    cards = [plane for plane in planes if "GPU" in plane.name]
    for line in (line for plane in cards or planes for line in plane.lines):
        for event in line.events:
            if "Stream" in line.name if cards else "hlo_op" in dict(event.stats):
                yield event


def show(case: str, found: dict, layers: int) -> None:
    """Prints the kernels of a round, costliest first, on stderr."""
    print(
        f"{case}: {found['launches']:g} kernels a round ({found['launches'] / layers:.1f} a "
        f"layer), busy {found['busy_ms']:.3f} of {found['span_ms']:.3f} ms",
        "ms/round  us each  /round  /layer  kernel",
        *(
            f"{ms:8.4f} {1e3 * ms / count:8.2f} {count:7.1f} {count / layers:7.2f}  {name}"
            for name, count, ms in found["by_name"]
        ),
        sep="\n",
        file=sys.stderr,
    )
