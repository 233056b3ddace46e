"""Restricting the target's choices to allowed tokens, as a grammar does.

The allowed tokens depend on the path to a node, so the host computes them once the draft is
known (`Draft.allowed`), and a round becomes two programs (`decoding.halves`). The target
chooses among the allowed tokens after every node, so the output equals plain decoding under the
same masks, whatever was drafted.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxspec.decoding.state import Verified
from jaxspec.trees.tree import unpack_bits


def only_allowed(verified: Verified, allowed: jax.Array | None) -> Verified:
    """Sets logits to -inf for tokens that may not follow a node.

    Args: allowed: as `Draft.allowed`.
    """
    if allowed is None:
        return verified
    bits = allowed if verified.packing is None else verified.packing.gather(allowed)
    return dataclasses.replace(verified, logits=masked(verified.logits, bits))


def masked(logits: jax.Array, bits: jax.Array) -> jax.Array:
    """Logits [..., V], -inf where the bits [..., ceil(V / 32)] are 0."""
    return jnp.where(unpack_bits(bits, logits.shape[-1]), logits, -jnp.inf)
