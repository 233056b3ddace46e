"""Processes a long axis piece by piece, which bounds the memory of intermediate arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def split(arrays: Any, size: int) -> Any:
    """Splits arrays [B, R, ...] into pieces [ceil(R / size), B, size, ...], zero-padded."""

    def one(x):
        batch, length, *rest = x.shape
        count = -(-length // size)
        pad = [(0, 0)] * x.ndim
        pad[1] = (0, count * size - length)
        return jnp.moveaxis(jnp.pad(x, pad).reshape(batch, count, size, *rest), 1, 0)

    return jax.tree.map(one, arrays)


def join(pieces: Any, length: int) -> Any:
    """The inverse of `split`, for arrays with R = `length`."""

    def one(x):
        x = jnp.moveaxis(x, 0, 1)
        batch, count, size, *rest = x.shape
        return x.reshape(batch, count * size, *rest)[:, :length]

    return jax.tree.map(one, pieces)


def map_chunks(function: Callable[..., Any], *arrays: Any, size: int) -> Any:
    """`function(*arrays)` on `size` entries of axis 1 at a time, recomputed in the backward
    pass.

    Args:
      function: independent along axis 1; takes and returns pytrees of arrays [B, n, ...].
      arrays: pytrees of arrays [B, R, ...].
    """
    length = jax.tree.leaves(arrays)[0].shape[1]
    function = jax.checkpoint(function)
    if size >= length:
        return function(*arrays)
    pieces = jax.lax.map(lambda piece: function(*piece), split(arrays, size))
    return join(pieces, length)
