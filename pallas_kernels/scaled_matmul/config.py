"""Shapes that the Triton kernel supports, and its tiles.

The tiles were chosen from compiled code (registers, shared memory, instructions) and from how
many programs fill 132 multiprocessors; no GPU has timed them.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

PROGRAMS = 128  # fewest programs of a product, to use every multiprocessor
LEAST_STEPS = 4  # fewest steps of one part of a split product


@dataclasses.dataclass(frozen=True)
class Tile:
    """The work of one program.

    Attributes:
      rows, columns: of the output.
      depth: contracted elements per step; one scale covers them.
      splits: parts of the contracted axis, each summed by a separate program.
      warps, stages: of Triton.
    """

    rows: int
    columns: int
    depth: int
    splits: int
    warps: int
    stages: int


def unsupported(rows: jax.Array, values: jax.Array, scale: jax.Array) -> str | None:
    """Why the kernel does not support these shapes; None if it does."""
    columns, depth = values.shape
    if rows.dtype != jnp.bfloat16 or values.dtype != jnp.float8_e4m3fn:
        return (
            f"rows are {rows.dtype} and values {values.dtype}; expected bfloat16 and "
            "float8_e4m3fn"
        )
    if columns % 32 or depth % 64 or (depth // scale.shape[1]) % 64:
        return (
            f"values are {columns} x {depth} with scales of {depth // scale.shape[1]} inputs; "
            "expected multiples of 32 outputs, and of 64 inputs that share a scale"
        )
    return None


def choose(rows: int, columns: int, depth: int, scales: int, *, halves: int = 1) -> Tile:
    """The tile for [rows, depth] times [columns, depth], of so many scales along the depth.

    Args:
      halves: 2 if a program computes columns of both halves of the matrix, without splits.
    """
    step = 128 if (depth // scales) % 128 == 0 else 64
    height = min(128, max(16, 1 << (rows - 1).bit_length()))
    widths = [width // halves for width in ((64, 32) if height <= 32 else (128, 64, 32))]
    fitting = [width for width in widths if columns // halves % width == 0]
    tall = -(-rows // height)
    # Few rows are cheap to reread, so narrow tiles are better than splits.
    least = PROGRAMS if height <= 32 else PROGRAMS // 2
    filling = [width for width in fitting if columns // halves // width * tall >= least]
    width = filling[0] if filling else fitting[-1]
    splits, steps = 1, depth // step
    while (
        halves == 1
        and 2 * splits * (columns // width) * tall <= PROGRAMS
        and steps % (2 * splits) == 0
        and steps // (2 * splits) >= LEAST_STEPS
    ):
        splits *= 2
    warps, stages = {16: (4, 6), 32: (4, 5), 64: (8, 4), 128: (8, 3)}[height]
    return Tile(height, width, step, splits, warps, stages)
