"""Moving the same rows of many arrays, in plain XLA: the kernel's contract."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped


def take_rows_reference(
    arrays: tuple[Shaped[Array, "B N K D"], ...], index: Int[Array, "B C"]
) -> tuple[Shaped[Array, "B C K D"], ...]:
    """Gathers the rows of chosen nodes from every array.

    Args:
      arrays: each [B, N, K, D].
      index: [B, C] int32, 0 … N - 1.

    Returns:
      arrays of [B, C, K, D].
    """
    index = index[:, :, None, None]
    return tuple(jnp.take_along_axis(x, index, axis=1) for x in arrays)


def write_rows_reference(
    caches: tuple[Shaped[Array, "B K S D"], ...],
    news: tuple[Shaped[Array, "B C K D"], ...],
    starts: Int[Array, " B"],
) -> tuple[Shaped[Array, "B K S D"], ...]:
    """Overwrites C rows of every cache, at each sequence's own start.

    Args:
      caches: each [B, K, S, D].
      news: as many, each [B, C, K, D].
      starts: [B] int32, 0 … S - C.
    """
    put = jax.vmap(
        lambda cache, new, start: jax.lax.dynamic_update_slice(
            cache, new.swapaxes(0, 1).astype(cache.dtype), (0, start, 0)
        )
    )
    return tuple(put(cache, new, starts) for cache, new in zip(caches, news, strict=True))
