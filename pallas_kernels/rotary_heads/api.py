"""Norm, rotation and rounding of heads: the kernel or its reference."""

from __future__ import annotations

import functools

from jaxtyping import Array, Float

from pallas_kernels.rotary_heads.reference import rotary_heads_reference
from pallas_kernels.slopes import with_slope_of


def rotary_heads(
    qkv: Float[Array, "rows K columns D"],
    bias: Float[Array, "K columns D"] | None,
    q_gain: Float[Array, " D"] | None,
    k_gain: Float[Array, " D"] | None,
    cos: Float[Array, "R pairs"],
    sin: Float[Array, "R pairs"],
    *,
    eps: float,
    dtype,
    gated: bool = False,
    implementation: str = "xla",
) -> tuple[Float[Array, "R H D"], Float[Array, "R K D"], Float[Array, "R K D"]]:
    """See `rotary_heads_reference` for shapes and meaning, and for its derivative.

    Args:
      implementation: "xla" (the reference, any platform), or "triton" (NVIDIA GPUs; heads whose
        size is a power of two).

    Raises:
      ValueError: "triton" was asked for and does not take this shape.
    """
    arrays = (qkv, bias, q_gain, k_gain, cos, sin)
    options = dict(eps=eps, dtype=dtype, gated=gated)
    reference = functools.partial(rotary_heads_reference, **options)
    if implementation == "xla":
        return reference(*arrays)
    if implementation != "triton":
        raise ValueError(f"implementation is {implementation!r}; expected 'xla' or 'triton'")
    # Pallas takes a fifth of a second to import: only where it is used.
    from pallas_kernels.rotary_heads.triton import rotary_heads_triton, unsupported

    if reason := unsupported(qkv):
        raise ValueError(f"implementation 'triton' does not take this: {reason}; use 'xla'")
    kernel = functools.partial(rotary_heads_triton, **options)
    return with_slope_of(reference, kernel)(*arrays)
