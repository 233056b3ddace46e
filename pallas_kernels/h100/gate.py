"""The command line of a gate: compile every item, report, and fail on a fault."""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any


def parser(prog: str, description: str) -> argparse.ArgumentParser:
    """A parser with the options that gates share."""
    options = argparse.ArgumentParser(
        prog=prog,
        description=f"{description} Floors are estimates from datasheet numbers; nothing here "
        "is a timing.",
    )
    options.add_argument("--json", action="store_true", help="print the whole report as JSON")
    options.add_argument("--quick", action="store_true", help="only what the gate needs")
    options.add_argument(
        "--cache",
        type=pathlib.Path,
        default=pathlib.Path("out/h100"),
        help="folder of results; a program compiled before is not compiled again",
    )
    options.add_argument("--only", nargs="+", default=[], help="only names with all of these")
    return options


def run(
    options: argparse.Namespace,
    items: Sequence[Any],
    row: Callable[[Any], dict],
    *,
    title: str,
    line: Callable[[dict], str],
) -> int:
    """Compiles the chosen items; returns the exit code, 1 if one has faults.

    Args:
      options: of `parser`.
      items: their text is their name.
      row: compiles one and reports on it; "faults" says what breaks the gate.
      title, line: of the table; a row's line may be several.
    """
    chosen = [item for item in items if all(part in str(item) for part in options.only)]
    rows = [dict(name=str(item), **row(item)) for item in _progress(chosen)]
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        print(title, *map(line, rows), sep="\n")
    broken = [row for row in rows if row["faults"]]
    for found in broken:
        for fault in found["faults"][:5]:
            print(f"FAULT {found['name']}: {fault}", file=sys.stderr)
    print(f"{len(rows) - len(broken)} passed, {len(broken)} failed", file=sys.stderr)
    return 1 if broken else 0


def _progress(items: Sequence[Any]):
    for i, item in enumerate(items, 1):
        start = time.monotonic()
        print(f"[{i}/{len(items)}] {item}", end="", file=sys.stderr, flush=True)
        yield item
        print(f"  {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
