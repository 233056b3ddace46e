"""Product with 8-bit values and their scales as a Triton kernel, written in Pallas.

A program multiplies one tile of rows by one tile of the matrix's outputs. Each step reads 8-bit
values, converts them to bfloat16 (exact), sums their products in float32, and adds these sums
times the scale. The matrix is stored outputs first: a step's values of one output are
contiguous and in the order that matrix instructions need.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.scaled_matmul.config import Tile, choose

LOG2_E = 1.4426950408889634


@functools.partial(jax.jit, static_argnames=("tile", "interpret"))
def scaled_matmul_triton(
    rows: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    *,
    tile: Tile | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See `scaled_matmul_reference`; `interpret` runs it on the CPU, to check numbers."""
    return _call(rows, values, scale, tile, interpret, halves=1, dtype=jnp.float32)


@functools.partial(jax.jit, static_argnames=("tile", "interpret"))
def scaled_swiglu_triton(
    rows: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    *,
    tile: Tile | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See `scaled_swiglu_reference`; a program computes the same columns of gates and ups."""
    return _call(rows, values, scale, tile, interpret, halves=2, dtype=rows.dtype)


def _call(rows, values, scale, tile, interpret: bool, *, halves: int, dtype) -> jax.Array:
    """Runs the kernel: [R, O / halves] in `dtype`; XLA adds the parts of a split product."""
    (count, depth), outputs = rows.shape, values.shape[0]
    tile = tile or choose(count, outputs, depth, scale.shape[1], halves=halves)
    columns = outputs // halves
    parts = pl.pallas_call(
        functools.partial(multiply, tile=tile),
        out_shape=jax.ShapeDtypeStruct((tile.splits, count, columns), dtype),
        grid=(columns // tile.columns, pl.cdiv(count, tile.rows), tile.splits),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="scaled_matmul",
    )(rows, values, scale)
    return parts.sum(0) if tile.splits > 1 else parts[0]


def multiply(rows_ref, values_ref, scale_ref, out_ref, *, tile: Tile):
    """One tile of rows times one tile of outputs, over one part of the inputs.

    If the matrix has twice as many outputs as columns, these are gates and ups.
    """
    count, depth = rows_ref.shape
    start_column, part = pl.program_id(0) * tile.columns, pl.program_id(2)
    row = pl.program_id(1) * tile.rows + jnp.arange(tile.rows)
    column = start_column + jnp.arange(tile.columns)
    columns = out_ref.shape[2]
    halves = range(values_ref.shape[0] // columns)
    outputs, inputs = (n // m for n, m in zip(values_ref.shape, scale_ref.shape, strict=True))
    steps = depth // tile.depth // tile.splits

    def mask(width):
        """Rows that exist; None where all do."""
        if count % tile.rows == 0:
            return None
        return jnp.broadcast_to((row < count)[:, None], (tile.rows, width))

    def step(i, totals):
        start = (part * steps + i) * tile.depth
        lane = start + jnp.arange(tile.depth)
        real = mask(tile.depth)
        x = plgpu.load(
            rows_ref.at[row[:, None], lane[None, :]],
            mask=real,
            other=None if real is None else 0.0,
        )

        def add(half, total):
            first = half * columns + start_column
            w = values_ref[pl.ds(first, tile.columns), pl.ds(start, tile.depth)]
            block = (half * columns + column) // outputs
            factor = plgpu.load(scale_ref.at[block, start // inputs])
            return total + plgpu.dot(x, w.astype(x.dtype).T) * factor[None, :]

        return tuple(map(add, halves, totals))

    zeros = jnp.zeros((tile.rows, tile.columns), jnp.float32)
    totals = lax.fori_loop(0, steps, step, tuple(zeros for _ in halves))
    out = totals[0] if len(halves) == 1 else swiglu(*totals)
    place = out_ref.at[part, row[:, None], column[None, :]]
    plgpu.store(place, out.astype(out_ref.dtype), mask=mask(tile.columns))


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) · up, float32."""
    return gate / (1 + jnp.exp2(gate * -LOG2_E)) * up
