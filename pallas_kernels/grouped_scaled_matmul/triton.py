"""Grouped product with 8-bit values and their scales as a Triton kernel, written in Pallas.

The tiles are those of `grouped_matmul`, laid per group; a step reads, converts and scales as
`scaled_matmul` does. Only matrices of groups that have rows are read.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.grouped_matmul.triton import COLUMNS, lay_tiles, tile_rows


def unsupported(rows: jax.Array, values: jax.Array, scale: jax.Array) -> str | None:
    """Why the Triton kernel does not take these shapes, or None if it does."""
    _, columns, depth = values.shape
    if rows.dtype != jnp.bfloat16 or values.dtype != jnp.float8_e4m3fn:
        return (
            f"rows are {rows.dtype} and values {values.dtype}; expected bfloat16 and "
            "float8_e4m3fn"
        )
    inputs = depth // scale.shape[2]
    if columns % COLUMNS or inputs % 64:
        return (
            f"values are {columns} x {depth} with scales of {inputs} inputs; expected "
            f"multiples of {COLUMNS} outputs, and of 64 inputs that share a scale"
        )
    return None


@functools.partial(jax.jit, static_argnames="interpret")
def grouped_scaled_matmul_triton(
    rows: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    group_sizes: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """See `grouped_scaled_matmul_reference`; `interpret` runs it on the CPU."""
    total, (groups, columns, depth) = rows.shape[0], values.shape
    tile = tile_rows(total, groups)
    group, start, stop = lay_tiles(group_sizes, total, tile)
    step = 128 if (depth // scale.shape[2]) % 128 == 0 else 64  # one scale covers its inputs
    warps, stages = {16: (4, 4), 32: (8, 4), 64: (8, 3)}[tile]  # with 4 warps 32 rows spill
    return pl.pallas_call(
        functools.partial(multiply, tile=tile, depth=step),
        out_shape=jax.ShapeDtypeStruct((total, columns), jnp.float32),
        grid=(columns // COLUMNS, group.size),
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
        name="grouped_scaled_matmul",
    )(group, start, stop, scale, rows, values)


def multiply(
    group_ref,
    start_ref,
    stop_ref,
    scale_ref,
    rows_ref,
    values_ref,
    out_ref,
    *,
    tile: int,
    depth: int,
):
    """One tile of rows times one block of columns, `depth` inputs a step."""
    first_column = pl.program_id(0) * COLUMNS
    column = first_column + jnp.arange(COLUMNS)
    t = pl.program_id(1)
    group, start, stop = group_ref[t], start_ref[t], stop_ref[t]
    row = start + jnp.arange(tile)
    real = row < stop
    shapes = zip(values_ref.shape[1:], scale_ref.shape[1:], strict=True)
    outputs, inputs = (n // m for n, m in shapes)  # that share a scale

    def step(i, total):
        lane = i * depth + jnp.arange(depth)
        x = plgpu.load(
            rows_ref.at[row[:, None], lane[None, :]],
            mask=jnp.broadcast_to(real[:, None], (tile, depth)),
            other=0.0,
        )
        w = values_ref[group, pl.ds(first_column, COLUMNS), pl.ds(i * depth, depth)]
        factor = plgpu.load(scale_ref.at[group, column // outputs, i * depth // inputs])
        return total + plgpu.dot(x, w.astype(x.dtype).T) * factor[None, :]

    # No steps for an empty range, as in `grouped_matmul`.
    steps = jnp.clip(stop - start, 0, 1) * (values_ref.shape[2] // depth)
    total = lax.fori_loop(0, steps, step, jnp.zeros((tile, COLUMNS), jnp.float32))
    plgpu.store(
        out_ref.at[row[:, None], column[None, :]],
        total,
        mask=jnp.broadcast_to(real[:, None], (tile, COLUMNS)),
    )
