"""Grouped matrix product: the kernel or its reference."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import dispatch
from pallas_kernels.grouped_matmul.reference import grouped_matmul_reference


def grouped_matmul(
    rows: Float[Array, "R A"],
    weights: Float[Array, "E A F"],
    group_sizes: Int[Array, " E"],
    *,
    implementation: str | None = None,
) -> Float[Array, "R F"]:
    """See `grouped_matmul_reference` for shapes and meaning, `dispatch` for implementations."""

    def load():
        from pallas_kernels.grouped_matmul.triton import grouped_matmul_triton, unsupported

        return grouped_matmul_triton, unsupported(rows, weights)

    arrays = (rows, weights, group_sizes)
    return dispatch(grouped_matmul_reference, load, arrays, implementation)
