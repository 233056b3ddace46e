"""The one call behind which implementations of the grouped matrix product live."""

from __future__ import annotations

import functools

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul.reference import grouped_matmul_reference
from pallas_kernels.slopes import with_slope_of


def grouped_matmul(
    rows: Float[Array, "R A"],
    weights: Float[Array, "E A F"],
    group_sizes: Int[Array, " E"],
    *,
    implementation: str | None = None,
) -> Float[Array, "R F"]:
    """See `grouped_matmul_reference` for shapes and meaning, and for its derivative.

    Args:
      implementation: "xla" (the reference, any platform), "triton" (NVIDIA GPUs), or None:
        triton where the program is compiled for an NVIDIA GPU and the shape is supported,
        else xla.

    Raises:
      ValueError: "triton" was asked for and does not take this shape.
    """
    if implementation not in (None, "xla", "triton"):
        raise ValueError(
            f"implementation is {implementation!r}; expected 'xla', 'triton' or None"
        )
    arrays = (rows, weights, group_sizes)
    if implementation == "xla":
        return grouped_matmul_reference(*arrays)
    # Pallas takes a fifth of a second to import: only where it is used.
    from pallas_kernels.grouped_matmul.triton import grouped_matmul_triton, unsupported

    reason = unsupported(rows, weights)
    if implementation == "triton" and reason:
        raise ValueError(f"implementation 'triton' does not take this: {reason}; use 'xla'")
    if reason:
        return grouped_matmul_reference(*arrays)
    kernel = grouped_matmul_triton
    if implementation is None:
        kernel = functools.partial(
            jax.lax.platform_dependent, cuda=kernel, default=grouped_matmul_reference
        )
    return with_slope_of(grouped_matmul_reference, kernel)(*arrays)
