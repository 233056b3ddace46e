"""Heads of a gated delta net from its projection: the kernel or its reference."""

from __future__ import annotations

import functools

from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.delta_heads.reference import delta_heads_reference
from pallas_kernels.dispatch import dispatch


def delta_heads(
    inputs: Float[Array, "rows J W"],
    kernel: Float[Array, "J C taps"],
    log_rate: Float[Array, "J R"],
    step_bias: Float[Array, "J R"],
    window: Float[Array, "B before J C"],
    parents: Int[Array, "B N"],
    begun: Bool[Array, " B"],
    *,
    key_dim: int,
    implementation: str | None = "xla",
) -> tuple[
    Float[Array, "B N J dk"],
    Float[Array, "B N J dk"],
    Float[Array, "B N J R dv"],
    Float[Array, "B N J R dv"],
    Float[Array, "B N J R"],
    Float[Array, "B N J R"],
]:
    """See `delta_heads_reference` for shapes and meaning, `dispatch` for implementations: the
    kernel is for keys and values whose size is a power of two."""
    arrays = (inputs, kernel, log_rate, step_bias, window, parents, begun)

    def load():
        from pallas_kernels.delta_heads import triton

        reason = triton.unsupported(kernel, log_rate, key_dim)
        return functools.partial(triton.delta_heads_triton, key_dim=key_dim), reason

    reference = functools.partial(delta_heads_reference, key_dim=key_dim)
    return dispatch(reference, load, arrays, implementation)
