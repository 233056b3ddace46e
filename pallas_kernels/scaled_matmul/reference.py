"""Product with 8-bit values and their scales in plain XLA: the kernel's contract."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def scaled_matmul_reference(
    rows: Float[Array, "R I"], values: Float[Array, "O I"], scale: Float[Array, "A C"]
) -> Float[Array, "R O"]:
    """rows times (values times their scales), transposed.

    Only the float32 sums round: rows and values are exact in float32.

    Args:
      rows: [R, I], bfloat16 or float32.
      values: [O, I] float8_e4m3fn, outputs first, as checkpoints store them.
      scale: [A, C] float32, of blocks of O / A outputs and I / C inputs, whole numbers.

    Returns:
      [R, O] float32.
    """
    return jnp.einsum(
        "ri,oi->ro",
        rows.astype(jnp.float32),
        scaled(values, scale),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def scaled_swiglu_reference(
    rows: Float[Array, "R I"], values: Float[Array, "O I"], scale: Float[Array, "A C"]
) -> Float[Array, "R F"]:
    """silu(gate) · up of a product whose outputs are all gates, then as many ups: O = 2 F.

    Args: as `scaled_matmul_reference`; no scale is shared by gates and ups.

    Returns:
      [R, F], in the dtype of the rows, rounded once.
    """
    gate, up = jnp.split(scaled_matmul_reference(rows, values, scale), 2, axis=-1)
    return (jax.nn.silu(gate) * up).astype(rows.dtype)


def scaled(values: Float[Array, "*L"], scale: Float[Array, "*L2"]) -> Float[Array, "*L"]:
    """values times their scales, float32; every axis of `scale` divides that of `values`."""
    for axis, (n, blocks) in enumerate(zip(values.shape, scale.shape, strict=True)):
        scale = jnp.repeat(scale, n // blocks, axis=axis)
    return values.astype(jnp.float32) * scale
