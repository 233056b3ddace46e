"""Blocks of known sequences: their anchors and supervised slots."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxspec.drafters.teacher_forced import take


def sample_anchors(
    key: jax.Array, supervised: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    """Samples anchors uniformly, without replacement, in ascending order.

    A position may be an anchor if it and the next are supervised: an answer's first token comes
    from prefill and is never drafted.

    Args:
      key: consumed.
      supervised: [B, T] bool, tokens the target wrote.
      count: A.

    Returns:
      anchors [B, A] int32, and whether they are real, [B, A] bool; if a sequence has too few
      candidates, the others are 0.
    """
    length = supervised.shape[1]
    possible = supervised & jnp.pad(supervised[:, 1:], [(0, 0), (0, 1)])
    lots = jnp.where(possible, jax.random.uniform(key, possible.shape), -1.0)
    drawn, anchors = jax.lax.top_k(lots, min(count, length))
    anchors = jnp.sort(jnp.where(drawn >= 0, anchors, length), axis=1)
    anchors = jnp.pad(anchors, [(0, 0), (0, count - anchors.shape[1])], constant_values=length)
    kept = anchors < length
    return jnp.where(kept, anchors, 0).astype(jnp.int32), kept


def supervised_slots(
    supervised: jax.Array, anchors: jax.Array, kept: jax.Array, depth: int
) -> jax.Array:
    """Slots whose label, and all labels before it in the block, are supervised: [B, A, P].

    Args:
      supervised: [B, T] bool.
      anchors, kept: [B, A], from `sample_anchors`.
    """
    length = supervised.shape[1]
    at = anchors[..., None] + 1 + jnp.arange(depth)
    label = take(supervised, jnp.minimum(at, length - 1)) & (at < length)
    return jnp.cumprod(label & kept[..., None], axis=-1).astype(bool)


def before_labels(hidden: jax.Array, anchors: jax.Array, depth: int) -> jax.Array:
    """The target's hidden state that decides each label: [B, T, M] -> [B, A, P, M]."""
    at = anchors[..., None] + jnp.arange(depth)
    return take(hidden, jnp.minimum(at, hidden.shape[1] - 1))
