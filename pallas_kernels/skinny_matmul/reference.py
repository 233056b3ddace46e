"""Product of few rows with a weight: the definition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def skinny_matmul_reference(
    rows: Float[Array, "R I"], weight: Float[Array, "I O"]
) -> Float[Array, "R O"]:
    """rows · weight, with operands of one dtype, summed in float32."""
    return jnp.einsum("ri,io->ro", rows, weight, preferred_element_type=jnp.float32)


def skinny_swiglu_reference(
    rows: Float[Array, "R I"], weight: Float[Array, "I 2 F"]
) -> Float[Array, "R F"]:
    """silu(gate) · up of [gate, up] = rows · weight, in float32, then in the rows' dtype."""
    both = jnp.einsum("ri,icf->crf", rows, weight, preferred_element_type=jnp.float32)
    return (jax.nn.silu(both[0]) * both[1]).astype(rows.dtype)
