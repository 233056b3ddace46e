"""Grouped matrix product in plain XLA: the kernel's contract."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def grouped_matmul_reference(
    rows: Float[Array, "R A"], weights: Float[Array, "E A F"], group_sizes: Int[Array, " E"]
) -> Float[Array, "R F"]:
    """Multiplies each group's rows by the group's matrix, accumulated in float32.

    Args:
      rows: [R, A], sorted by group.
      weights: [E, A, F], in the dtype of the rows.
      group_sizes: [E] int32, rows of each group in order; they add up to at most R.

    Returns:
      [R, F] float32; rows past the last group are undefined.
    """
    return jax.lax.ragged_dot(rows, weights, group_sizes, preferred_element_type=jnp.float32)
