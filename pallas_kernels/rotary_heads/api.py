"""Norm, rotation and rounding of heads: the kernel or its reference."""

from __future__ import annotations

import functools

from jaxtyping import Array, Float

from pallas_kernels.dispatch import dispatch
from pallas_kernels.rotary_heads.reference import rotary_heads_reference


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
    implementation: str | None = "xla",
) -> tuple[Float[Array, "R H D"], Float[Array, "R K D"], Float[Array, "R K D"]]:
    """See `rotary_heads_reference` for shapes and meaning, `dispatch` for implementations: the
    kernel is for heads whose size is a power of two."""
    arrays = (qkv, bias, q_gain, k_gain, cos, sin)
    options = dict(eps=eps, dtype=dtype, gated=gated)
    reference = functools.partial(rotary_heads_reference, **options)

    def load():
        from pallas_kernels.rotary_heads.triton import rotary_heads_triton, unsupported

        return functools.partial(rotary_heads_triton, **options), unsupported(qkv)

    return dispatch(reference, load, arrays, implementation)
