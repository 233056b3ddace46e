"""The one call behind which implementations of the residual sum and norm live."""

from __future__ import annotations

import jax

from pallas_kernels.add_norm.reference import add_norm_reference


def add_norm(
    x: jax.Array,
    update: jax.Array | None,
    gain: jax.Array,
    *,
    eps: float,
    dtype,
    implementation: str = "xla",
) -> tuple[jax.Array, jax.Array]:
    """See `add_norm_reference` for shapes and meaning.

    Args:
      implementation: "xla" (the reference, any platform) or "triton" (NVIDIA GPUs).

    Raises:
      ValueError: there is no such implementation.
    """
    options = dict(eps=eps, dtype=dtype)
    if implementation == "xla":
        return add_norm_reference(x, update, gain, **options)
    if implementation != "triton":
        raise ValueError(f"implementation is {implementation!r}; expected 'xla' or 'triton'")
    # Pallas takes a fifth of a second to import: only where it is used.
    from pallas_kernels.add_norm.triton import add_norm_triton

    return add_norm_triton(x, update, gain, **options)
