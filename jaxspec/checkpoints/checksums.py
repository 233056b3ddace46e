"""Checksums of arrays in place, also sharded over devices and processes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}  # by bytes of an item


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by path, as 'layers.0.norm'."""
    flat, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in flat}


def checksums(tree: Any) -> dict[str, int]:
    """A 32-bit number per array: the sum of its words, each times an odd number by position.

    Any change to one word changes it; so does exchanging two different words, unless they or
    their positions differ by multiples of large powers of two. It does not depend on sharding.
    """
    # One at a time: over several devices each sum is a collective, and the CPU client can hang
    # with more of them in flight than it allows (32 per device).
    return {path: int(_checksum(x)) for path, x in by_path(tree).items()}


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(x, WORDS[x.dtype.itemsize]).astype(jnp.uint32)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        place = place * np.uint32(words.shape[axis]) + jax.lax.broadcasted_iota(
            jnp.uint32, words.shape, axis
        )
    return jnp.sum(words * (place * np.uint32(2) + np.uint32(1)), dtype=jnp.uint32)
