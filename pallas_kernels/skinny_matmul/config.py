"""Chooses the kernel's tile for a product: one measured on this GPU, or none.

XLA's own products are good, and only a measurement tells where the kernel is faster: without
an entry for its card and shape a product stays XLA's.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

from pallas_kernels.dispatch import this_card

# Written by `examples/gpu/products.py`: products that the kernel does faster than XLA.
MEASURED = Path(__file__).with_name("tiles.json")
KEY = ("card", "rows", "inner", "outer")  # of an entry, beside its tile and times
MIN_ROWS = 64  # of a warp group's product; fewer rows are padded
FEWEST, MOST = 9, 128  # rows of products for which the kernel is considered


@dataclasses.dataclass(frozen=True)
class Tile:
    """The work of one program.

    Attributes:
      columns: of the output.
      depth: contracted elements per step.
      steps: loads in flight.
      splits: parts of the contracted axis, each summed by a separate program.
    """

    columns: int
    depth: int
    steps: int
    splits: int = 1

    def divides(self, inner: int, outer: int) -> bool:
        """Whether it divides a product with a weight [inner, outer]."""
        return outer % self.columns == 0 and inner % (self.depth * self.splits) == 0


def groups(rows: int) -> int:
    """Warp groups that share the rows of a program."""
    return 1 if rows <= MIN_ROWS else 2


def padded(rows: int) -> int:
    """Rows that a product of so many computes."""
    multiple = MIN_ROWS * groups(rows)
    return -(-rows // multiple) * multiple


def bucket(rows: int) -> int:
    """Products of so many rows, up to a power of two, share a measurement."""
    return 1 << (rows - 1).bit_length()


def choose(rows: int, inner: int, outer: int, *, card: str | None = None) -> Tile | None:
    """The tile measured for rows [R, inner] and a weight [inner, outer]; None leaves it to XLA.

    Args:
      card: the GPU's `device_kind`; this machine's by default.
    """
    if not FEWEST <= rows <= MOST:
        return None
    return read_measured(MEASURED).get((card or this_card(), bucket(rows), inner, outer))


@functools.cache
def read_measured(path: Path) -> dict[tuple, Tile]:
    """By (card, rows, inner, outer), the tiles that were faster than XLA."""
    entries = json.loads(path.read_text())
    return {tuple(entry[name] for name in KEY): Tile(**entry["tile"]) for entry in entries}
