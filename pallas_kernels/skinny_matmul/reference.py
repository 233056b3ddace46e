"""Product of few rows with a weight: the definition."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def skinny_matmul_reference(
    rows: Float[Array, "R I"], weight: Float[Array, "I O"]
) -> Float[Array, "R O"]:
    """rows · weight, with operands of one dtype, summed in float32."""
    return jnp.einsum("ri,io->ro", rows, weight, preferred_element_type=jnp.float32)
