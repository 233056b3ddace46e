"""python -m jaxspec.planning: compile whole decoding steps for H100s, fail on a broken gate."""

from __future__ import annotations

import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported: there is no GPU to look for

from jaxspec.planning import steps  # noqa: E402
from pallas_kernels.h100 import gate  # noqa: E402


def main() -> int:
    options = gate.parser(
        "python -m jaxspec.planning",
        "Compiles whole decoding steps for H100s without one, from shapes alone.",
    ).parse_args()

    def row(step: steps.Step) -> dict:
        program = steps.compile_step(step, options.cache)
        return dict(**steps.report(step, program), faults=steps.faults(step, program))

    title = (
        "per device, GiB; the floor is an estimate, not a timing\n"
        "arguments  temp  peak  fits launches copies  moved/floor  floor ms  step"
    )
    return gate.run(options, steps.steps(options.quick), row, title=title, line=_line)


def _line(row: dict) -> str:
    arguments, temporaries, peak = (
        row[name] / 2**30 for name in ("arguments", "temporaries", "peak")
    )
    return (
        f"{arguments:9.2f} {temporaries:5.2f} {peak:5.1f} {row['fits']!s:>5} "
        f"{row['launches']:8} {len(row['copies']):6} {row['moved_over_floor']:12.2f} "
        f"{row['floor_ms_estimate']:9.2f}  {row['name']}"
    )


if __name__ == "__main__":
    sys.exit(main())
