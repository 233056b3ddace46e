"""Grouped matrix product with 8-bit values: the kernel or its reference."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import dispatch
from pallas_kernels.grouped_scaled_matmul.reference import grouped_scaled_matmul_reference


def grouped_scaled_matmul(
    rows: Float[Array, "R I"],
    values: Float[Array, "E O I"],
    scale: Float[Array, "E A C"],
    group_sizes: Int[Array, " E"],
    *,
    implementation: str | None = None,
) -> Float[Array, "R O"]:
    """See `grouped_scaled_matmul_reference` for shapes and meaning, `dispatch` for
    implementations: the kernel is for GPUs that convert float8_e4m3fn, from compute capability
    8.9."""

    def load():
        from pallas_kernels.grouped_scaled_matmul import triton

        return triton.grouped_scaled_matmul_triton, triton.unsupported(rows, values, scale)

    arrays = (rows, values, scale, group_sizes)
    return dispatch(grouped_scaled_matmul_reference, load, arrays, implementation)
