"""The one call behind which implementations of the grouped matrix product live."""

from __future__ import annotations

import jax

from pallas_kernels.grouped_matmul.reference import grouped_matmul_reference


def grouped_matmul(
    rows: jax.Array,
    weights: jax.Array,
    group_sizes: jax.Array,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """See `grouped_matmul_reference` for shapes and meaning.

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
    if implementation == "triton":
        if reason:
            raise ValueError(f"implementation 'triton' does not take this: {reason}; use 'xla'")
        return grouped_matmul_triton(*arrays)
    if reason:
        return grouped_matmul_reference(*arrays)
    return jax.lax.platform_dependent(
        *arrays, cuda=grouped_matmul_triton, default=grouped_matmul_reference
    )
