"""Product of few rows with a weight, where the kernel was measured to be faster than XLA."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.skinny_matmul.config import Tile, choose
from pallas_kernels.skinny_matmul.reference import (
    skinny_matmul_reference,
    skinny_swiglu_reference,
)
from pallas_kernels.slopes import with_slope_of


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
    return _call(skinny_matmul_reference, "skinny_matmul_mosaic", rows, weight, tile)


def skinny_swiglu(
    rows: Float[Array, "R I"], weight: Float[Array, "I 2 F"], *, tile: Tile | None = None
) -> Float[Array, "R F"] | None:
    """See `skinny_swiglu_reference` for the meaning, `skinny_matmul` for the rest."""
    return _call(skinny_swiglu_reference, "skinny_swiglu_mosaic", rows, weight, tile)


def _call(reference, kernel: str, rows, weight, tile: Tile | None) -> jax.Array | None:
    inner, outer = weight.shape[0], weight.shape[-1]
    narrow = rows.dtype == weight.dtype == jnp.bfloat16
    found = tile or (
        choose(len(rows), inner, outer, swiglu=weight.ndim == 3) if narrow else None
    )
    if found is None:
        return None
    if not (narrow and found.divides(inner, outer)):
        raise ValueError(
            f"{found} is not for rows {rows.shape} and a weight {weight.shape}, both of "
            f"{weight.dtype}: expected bfloat16, a multiple of {found.columns} outputs and of "
            f"{found.depth * found.splits} inputs"
        )
    from pallas_kernels.skinny_matmul import mosaic  # a second to import

    run = functools.partial(getattr(mosaic, kernel), tile=found)
    by_platform = functools.partial(jax.lax.platform_dependent, cuda=run, default=reference)
    return with_slope_of(reference, by_platform)(rows, weight)
