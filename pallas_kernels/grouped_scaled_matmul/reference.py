"""Grouped product with 8-bit values and their scales in plain XLA: the kernel's contract."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.scaled_matmul.reference import scaled


def grouped_scaled_matmul_reference(
    rows: Float[Array, "R I"],
    values: Float[Array, "E O I"],
    scale: Float[Array, "E A C"],
    group_sizes: Int[Array, " E"],
) -> Float[Array, "R O"]:
    """Multiplies each group's rows by the group's scaled values, transposed.

    Only the float32 sums round: rows and values are exact in float32.

    Args:
      rows: [R, I], sorted by group, bfloat16 or float32.
      values: [E, O, I] float8_e4m3fn, outputs before inputs, as checkpoints store them.
      scale: [E, A, C] float32, of blocks of O / A outputs and I / C inputs, whole numbers.
      group_sizes: [E] int32, rows of each group in order; they add up to at most R.

    Returns:
      [R, O] float32; rows past the last group are undefined.
    """
    return jax.lax.ragged_dot(
        rows.astype(jnp.float32),
        scaled(values, scale).swapaxes(1, 2),
        group_sizes,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
