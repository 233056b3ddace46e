"""The one call behind which implementations of the product with scaled values live."""

from __future__ import annotations

import functools

import jax
from jaxtyping import Array, Float

from pallas_kernels.scaled_matmul.reference import (
    scaled_matmul_reference,
    scaled_swiglu_reference,
)
from pallas_kernels.slopes import with_slope_of


def scaled_matmul(
    rows: Float[Array, "R I"],
    values: Float[Array, "O I"],
    scale: Float[Array, "A C"],
    *,
    implementation: str | None = None,
) -> Float[Array, "R O"]:
    """See `scaled_matmul_reference` for shapes and meaning, and for its derivative.

    Args:
      implementation: "xla" (the reference, any platform), "triton" (NVIDIA GPUs that convert
        float8_e4m3fn, from compute capability 8.9), or None: triton where the program is
        compiled for an NVIDIA GPU and the shape is supported, else xla.

    Raises:
      ValueError: "triton" was asked for and does not take this shape.
    """
    kernels = scaled_matmul_reference, "scaled_matmul_triton"
    return _call(*kernels, rows, values, scale, implementation)


def scaled_swiglu(
    rows: Float[Array, "R I"],
    values: Float[Array, "O I"],
    scale: Float[Array, "A C"],
    *,
    implementation: str | None = None,
) -> Float[Array, "R F"]:
    """See `scaled_swiglu_reference` for shapes and meaning; else as `scaled_matmul`."""
    kernels = scaled_swiglu_reference, "scaled_swiglu_triton"
    return _call(*kernels, rows, values, scale, implementation)


def _call(reference, kernel: str, rows, values, scale, implementation: str | None) -> jax.Array:
    if implementation not in (None, "xla", "triton"):
        raise ValueError(
            f"implementation is {implementation!r}; expected 'xla', 'triton' or None"
        )
    arrays = (rows, values, scale)
    if implementation == "xla":
        return reference(*arrays)
    # Pallas takes a fifth of a second to import: only where it is used.
    from pallas_kernels.scaled_matmul import triton
    from pallas_kernels.scaled_matmul.config import unsupported

    reason = unsupported(*arrays)
    if implementation == "triton" and reason:
        raise ValueError(f"implementation 'triton' does not take this: {reason}; use 'xla'")
    if reason:
        return reference(*arrays)
    chosen = getattr(triton, kernel)
    if implementation is None:
        chosen = functools.partial(jax.lax.platform_dependent, cuda=chosen, default=reference)
    return with_slope_of(reference, chosen)(*arrays)
