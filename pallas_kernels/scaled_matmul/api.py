"""Matrix product with 8-bit values and scales: the kernel or its reference."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float

from pallas_kernels.dispatch import dispatch
from pallas_kernels.scaled_matmul.reference import (
    scaled_matmul_reference,
    scaled_swiglu_reference,
)


def scaled_matmul(
    rows: Float[Array, "R I"],
    values: Float[Array, "O I"],
    scale: Float[Array, "A C"],
    *,
    implementation: str | None = None,
) -> Float[Array, "R O"]:
    """See `scaled_matmul_reference` for shapes and meaning, `dispatch` for implementations: the
    kernel is for GPUs that convert float8_e4m3fn, from compute capability 8.9."""
    arrays = rows, values, scale
    return _call(scaled_matmul_reference, "scaled_matmul_triton", arrays, implementation)


def scaled_swiglu(
    rows: Float[Array, "R I"],
    values: Float[Array, "O I"],
    scale: Float[Array, "A C"],
    *,
    implementation: str | None = None,
) -> Float[Array, "R F"]:
    """See `scaled_swiglu_reference` for shapes and meaning, `scaled_matmul` for the rest."""
    arrays = rows, values, scale
    return _call(scaled_swiglu_reference, "scaled_swiglu_triton", arrays, implementation)


def _call(reference, kernel: str, arrays, implementation: str | None) -> jax.Array:
    def load():
        from pallas_kernels.scaled_matmul import triton
        from pallas_kernels.scaled_matmul.config import unsupported

        return getattr(triton, kernel), unsupported(*arrays)

    return dispatch(reference, load, arrays, implementation)
