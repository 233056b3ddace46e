"""Grouped product with 8-bit values and their scales as a Triton kernel, written in Pallas.

The tiles are those of `grouped_matmul`, laid per group; a step reads, converts and scales as
`scaled_matmul` does. Only matrices of groups that have rows are read.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.grouped_matmul.triton import COLUMNS, multiply_groups, tile_rows


def unsupported(rows: jax.Array, values: jax.Array, scale: jax.Array, *_) -> str | None:
    """Why the Triton kernel does not support these shapes; None if it does."""
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
    groups, outputs, depth = values.shape
    per_scale = outputs // scale.shape[1], depth // scale.shape[2]  # outputs and inputs
    tile = tile_rows(rows.shape[0], groups)
    warps, stages = {16: (4, 4), 32: (8, 4), 64: (8, 3)}[tile]  # with 4 warps 32 rows spill

    def product(x, group, columns, inputs, values_ref, scale_ref):
        w = values_ref[group, columns, inputs]
        column = columns.start + jnp.arange(COLUMNS)
        block = column // per_scale[0], inputs.start // per_scale[1]
        factor = plgpu.load(scale_ref.at[group, *block])
        return plgpu.dot(x, w.astype(x.dtype).T) * factor[None, :]

    return multiply_groups(
        product,
        rows,
        (values, scale),
        group_sizes,
        columns=outputs,
        depth=128 if per_scale[1] % 128 == 0 else 64,  # one scale covers a step's inputs
        tile=tile,
        warps=warps,
        stages=stages,
        interpret=interpret,
        name="grouped_scaled_matmul",
    )
