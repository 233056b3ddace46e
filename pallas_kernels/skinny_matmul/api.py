"""Product of few rows with a weight, where the kernel was measured to be faster than XLA."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dispatch import dispatch
from pallas_kernels.skinny_matmul.config import Tile, choose
from pallas_kernels.skinny_matmul.reference import skinny_matmul_reference


def skinny_matmul(
    rows: Float[Array, "R I"], weight: Float[Array, "I O"], *, tile: Tile | None = None
) -> Float[Array, "R O"] | None:
    """See `skinny_matmul_reference`; None if XLA is not known to be slower.

    Args:
      tile: of the kernel; by default the one measured on this GPU. The kernel needs an H100 or
        H200 and bfloat16 operands.

    Raises:
      ValueError: the given tile does not divide the product.
    """
    narrow = rows.dtype == weight.dtype == jnp.bfloat16
    found = tile or (choose(len(rows), *weight.shape) if narrow else None)
    if found is None:
        return None
    if not (narrow and found.divides(*weight.shape)):
        raise ValueError(
            f"{found} is not for rows {rows.shape} and a weight {weight.shape}, both of "
            f"{weight.dtype}: expected bfloat16, a multiple of {found.columns} outputs and of "
            f"{found.depth * found.splits} inputs"
        )

    def load():
        from pallas_kernels.skinny_matmul.mosaic import skinny_matmul_mosaic

        return functools.partial(skinny_matmul_mosaic, tile=found), None

    return dispatch(skinny_matmul_reference, load, (rows, weight), None)
