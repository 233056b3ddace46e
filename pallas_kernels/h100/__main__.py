"""python -m pallas_kernels.h100: compile our kernels for an H100, fail on a broken gate."""

from __future__ import annotations

import dataclasses
import json
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported: there is no GPU to look for

from pallas_kernels.h100 import gate, kernels  # noqa: E402


def main() -> int:
    parser = gate.parser(
        "python -m pallas_kernels.h100", "Compiles every kernel for an H100 without one."
    )
    parser.add_argument("--sweep", action="store_true", help="compile every tile, then stop")
    options = parser.parse_args()
    if options.sweep:
        for row in kernels.sweep(options.cache):
            print(json.dumps(row), flush=True)
        return 0

    def row(case: kernels.Case) -> dict:
        compiled = case.compile(options.cache)
        described = [dataclasses.asdict(kernel) for kernel in compiled]
        return dict(kernels=described, faults=case.faults(compiled))

    title = "registers spills  shared wgmma  mma  grid          kernel"
    return gate.run(options, kernels.cases(options.quick), row, title=title, line=_lines)


def _lines(row: dict) -> str:
    return "\n".join(
        f"{k['registers']:9} {k['spills']:6} {k['shared']:7} {k['wgmma']:5} {k['mma']:4}  "
        f"{'x'.join(map(str, k['grid'])):12}  {k['name']}  {row['name']}"
        for k in row["kernels"]
    )


if __name__ == "__main__":
    sys.exit(main())
