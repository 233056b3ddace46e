"""python -m pallas_kernels.h100: compile for an H100, report, fail on a broken gate."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import sys
import time

os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported: there is no GPU to look for


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.h100",
        description="Compiles kernels and whole decoding steps for an H100 without one. Floors "
        "are estimates from datasheet numbers; nothing here is a timing.",
    )
    parser.add_argument("--json", action="store_true", help="print the whole report as JSON")
    parser.add_argument("--quick", action="store_true", help="only what the gate needs")
    parser.add_argument("--sweep", action="store_true", help="compile every tile, then stop")
    parser.add_argument(
        "--cache",
        type=pathlib.Path,
        default=pathlib.Path("out/h100"),
        help="folder of results; a program compiled before is not compiled again",
    )
    parser.add_argument("--only", nargs="+", default=[], help="only names with all of these")
    options = parser.parse_args()

    from pallas_kernels.h100 import kernels, steps

    if options.sweep:
        for row in kernels.sweep(options.cache):
            print(json.dumps(row), flush=True)
        return 0

    def named(item):
        return all(part in str(item) for part in options.only)

    result = dict(kernels=[], steps=[])
    chosen = list(filter(named, kernels.cases(options.quick)))
    for case in _progress(chosen):
        compiled = case.compile(options.cache)
        result["kernels"].append(
            dict(
                name=str(case),
                kernels=[dataclasses.asdict(kernel) for kernel in compiled],
                faults=case.faults(compiled),
            )
        )
    chosen = list(filter(named, steps.steps(options.quick)))
    for step in _progress(chosen):
        program = steps.compile_step(step, options.cache)
        result["steps"].append(
            dict(
                name=str(step),
                **steps.report(step, program),
                faults=steps.faults(step, program),
            )
        )

    if options.json:
        print(json.dumps(result, indent=1))
    else:
        _print_tables(result)
    broken = [row for rows in result.values() for row in rows if row["faults"]]
    for row in broken:
        for fault in row["faults"][:5]:
            print(f"FAULT {row['name']}: {fault}", file=sys.stderr)
    compiled = sum(map(len, result.values()))
    print(f"{compiled - len(broken)} passed, {len(broken)} failed", file=sys.stderr)
    return 1 if broken else 0


def _progress(items):
    for i, item in enumerate(items, 1):
        start = time.monotonic()
        print(f"[{i}/{len(items)}] {item}", end="", file=sys.stderr, flush=True)
        yield item
        print(f"  {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)


def _print_tables(result: dict) -> None:
    print("registers spills  shared wgmma  mma  grid          kernel")
    for row in result["kernels"]:
        for k in row["kernels"]:
            grid = "x".join(map(str, k["grid"]))
            print(
                f"{k['registers']:9} {k['spills']:6} {k['shared']:7} {k['wgmma']:5} "
                f"{k['mma']:4}  {grid:12}  {k['name']}  {row['name']}"
            )
    print("\nper device, GiB; the floor is an estimate, not a timing")
    print("arguments  temp  peak  fits launches copies  moved/floor  floor ms  step")
    for row in result["steps"]:
        gib = [row[name] / 2**30 for name in ("arguments", "temporaries", "peak")]
        print(
            f"{gib[0]:9.2f} {gib[1]:5.2f} {gib[2]:5.1f} {row['fits']!s:>5} "
            f"{row['launches']:8} {len(row['copies']):6} {row['moved_over_floor']:12.2f} "
            f"{row['floor_ms_estimate']:9.2f}  {row['name']}"
        )


if __name__ == "__main__":
    sys.exit(main())
