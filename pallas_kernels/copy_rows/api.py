"""Moving rows of many arrays: the kernel or its reference."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from pallas_kernels.copy_rows.reference import take_rows_reference, write_rows_reference
from pallas_kernels.mesh import on_one_device

ELEMENTS = 8192  # of one array, sequence and head: a program holds them in registers


def take_rows(
    arrays: tuple[Shaped[Array, "B N K D"], ...], index: Int[Array, "B C"]
) -> tuple[Shaped[Array, "B C K D"], ...]:
    """See `take_rows_reference` for shapes and meaning.

    One kernel where the program is compiled for an NVIDIA GPU, the arrays are bfloat16, and the
    rows are as few as a round commits.
    """
    if not _one_kernel(arrays, index.shape[1]):
        return take_rows_reference(arrays, index)
    # Pallas takes a fifth of a second to import: only where it is used.
    from pallas_kernels.copy_rows.triton import take_rows_triton

    return jax.lax.platform_dependent(
        arrays, index, cuda=take_rows_triton, default=take_rows_reference
    )


def write_rows(
    caches: tuple[Shaped[Array, "B K S D"], ...],
    news: tuple[Shaped[Array, "B C K D"], ...],
    starts: Int[Array, " B"],
) -> tuple[Shaped[Array, "B K S D"], ...]:
    """See `write_rows_reference` for shapes and meaning; one kernel as in `take_rows`."""
    if not _one_kernel(caches, news[0].shape[1]):
        return write_rows_reference(caches, news, starts)
    from pallas_kernels.copy_rows.triton import write_rows_triton

    return jax.lax.platform_dependent(
        caches, news, starts, cuda=write_rows_triton, default=write_rows_reference
    )


def _one_kernel(arrays: tuple[jax.Array, ...], count: int) -> bool:
    dim = arrays[0].shape[-1]
    few = count * dim <= ELEMENTS and dim & (dim - 1) == 0
    return arrays[0].dtype == jnp.bfloat16 and few and on_one_device()
