"""Residual sum and RMS norm in plain XLA: the contract the kernel meets."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def add_norm_reference(
    x: jax.Array, update: jax.Array | None, gain: jax.Array, *, eps: float, dtype
) -> tuple[jax.Array, jax.Array]:
    """x plus what a sublayer adds to it, and the RMS norm of that.

    Args:
      x: [R, M] float32, the residual stream.
      update: [R, M] float32; None adds nothing.
      gain: [M].
      dtype: of the normed rows.

    Returns:
      (the new stream [R, M] float32, normed rows [R, M] in `dtype`).
    """
    x = x if update is None else x + update
    scale = lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return x, (x * scale * gain.astype(jnp.float32)).astype(dtype)
