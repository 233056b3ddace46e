"""Grouped matrix product as a Triton kernel, written in Pallas.

XLA has no GPU kernel for `ragged_dot`: it multiplies all rows by every group's matrix and keeps
the blocks it needs. Here a program multiplies one tile of one group's rows by one block of
columns, so only matrices of groups with rows are read, each once per tile of rows.

Groups end anywhere, so tiles are laid out per group and the last one of each is masked. Their
number depends on the data, but the grid is static: it has the maximum number, and spare tiles
have an empty range of rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

COLUMNS = 128  # of the output, per program
DEPTH = 64  # contracted elements per step
MIN_ROWS = 16  # the smallest side of a Triton matrix product


def unsupported(rows: jax.Array, weights: jax.Array, *_) -> str | None:
    """Why the Triton kernel does not support these shapes; None if it does."""
    _, depth, columns = weights.shape
    if rows.dtype != jnp.bfloat16 or weights.dtype != jnp.bfloat16:
        return f"rows are {rows.dtype} and weights {weights.dtype}; expected bfloat16"
    if depth % DEPTH or columns % COLUMNS:
        return f"matrices are {depth} x {columns}; expected multiples of {DEPTH} and {COLUMNS}"
    return None


def tile_rows(total: int, groups: int) -> int:
    """Rows of a tile: the average group's, as a power of two from 16 to 64."""
    average = max(1, total // groups)
    return min(64, max(MIN_ROWS, 1 << (average - 1).bit_length()))


@functools.partial(jax.jit, static_argnames="interpret")
def grouped_matmul_triton(
    rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """See `grouped_matmul_reference`; `interpret` runs it on the CPU, to check numbers."""
    tile = tile_rows(rows.shape[0], weights.shape[0])

    def product(x, group, columns, inputs, weights_ref):
        return plgpu.dot(x, weights_ref[group, inputs, columns])

    return multiply_groups(
        product,
        rows,
        (weights,),
        group_sizes,
        columns=weights.shape[2],
        depth=DEPTH,
        tile=tile,
        warps=4,
        stages=3 if tile == 64 else 4,
        interpret=interpret,
        name="grouped_matmul",
    )


def multiply_groups(
    product: Callable,
    rows: jax.Array,
    matrices: Sequence[jax.Array],
    group_sizes: jax.Array,
    *,
    columns: int,
    depth: int,
    tile: int,
    warps: int,
    stages: int,
    interpret: bool,
    name: str,
) -> jax.Array:
    """Rows [R, A] times their group's matrix: [R, columns] float32.

    Args:
      product: product(x, group, columns, inputs, *refs) -> [tile, COLUMNS] float32, of `depth`
        inputs x [tile, depth], the slices of the group's matrix, and references of `matrices`.
      tile: rows of a tile.
    """
    group, start, stop = lay_tiles(group_sizes, rows.shape[0], tile)
    return pl.pallas_call(
        functools.partial(multiply, product=product, depth=depth, tile=tile),
        out_shape=jax.ShapeDtypeStruct((rows.shape[0], columns), jnp.float32),
        grid=(columns // COLUMNS, group.size),
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
        name=name,
    )(group, start, stop, rows, *matrices)


def lay_tiles(
    group_sizes: jax.Array, total: int, tile: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The group of every tile, its first row, and the end of its group's rows.

    For groups of 5, 0 and 3 rows and tiles of 4, with one tile left over::

        group  0 0 2 2
        start  0 4 5 9
        stop   5 5 8 8
    """
    groups = group_sizes.size
    most = total // tile + min(groups, total)
    per_group = -(-group_sizes // tile)
    first_tile = jnp.cumsum(per_group) - per_group
    first_row = jnp.cumsum(group_sizes) - group_sizes
    index = jnp.arange(most)
    # The last group that starts at or before this tile, among those that have any.
    starts_here = (first_tile[None, :] <= index[:, None]) & (group_sizes > 0)
    group = jnp.max(jnp.where(starts_here, jnp.arange(groups), 0), axis=1)
    start = first_row[group] + (index - first_tile[group]) * tile
    return (
        group.astype(jnp.int32),
        start.astype(jnp.int32),
        (first_row + group_sizes)[group].astype(jnp.int32),
    )


def multiply(group_ref, start_ref, stop_ref, rows_ref, *refs, product, depth: int, tile: int):
    """One tile of rows times one block of columns."""
    *matrices, out_ref = refs
    first_column = pl.program_id(0) * COLUMNS
    column = first_column + jnp.arange(COLUMNS)
    t = pl.program_id(1)
    group, start, stop = group_ref[t], start_ref[t], stop_ref[t]
    row = start + jnp.arange(tile)
    real = row < stop

    def step(i, total):
        lane = i * depth + jnp.arange(depth)
        x = plgpu.load(
            rows_ref.at[row[:, None], lane[None, :]],
            mask=jnp.broadcast_to(real[:, None], (tile, depth)),
            other=0.0,
        )
        own = pl.ds(first_column, COLUMNS), pl.ds(i * depth, depth)
        return total + product(x, group, *own, *matrices)

    # No steps for an empty range; a comparison or `where` here loses its type when lowered.
    steps = jnp.clip(stop - start, 0, 1) * (rows_ref.shape[1] // depth)
    total = lax.fori_loop(0, steps, step, jnp.zeros((tile, COLUMNS), jnp.float32))
    plgpu.store(
        out_ref.at[row[:, None], column[None, :]],
        total,
        mask=jnp.broadcast_to(real[:, None], (tile, COLUMNS)),
    )
