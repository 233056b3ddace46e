"""Several proposals for one anchor as one tree: shared beginnings are shared nodes."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxspec.trees.levels import ROOT, best_nodes
from jaxspec.trees.tree import DraftTree, known


def merge(
    anchor: Int[Array, " B"],
    continuations: Int[Array, "B C P"],
    scores: Float[Array, "B C P"],
    *,
    size: int,
    budget: Int[Array, " B"],
) -> DraftTree:
    """The best nodes of the trie of C continuations.

    `a b c` and `a b d`, the first with the better scores, give::

        anchor(0) - a(1) - b(2) - c(3)
                               \\- d(4)

    Args:
      anchor: [B] int32.
      continuations: [B, C, P] int32.
      scores: [B, C, P] float32, log-probability of every path from the anchor; -inf from where
        a continuation ends. Where several share a node, it has the best of their scores.
      size: N; nodes beyond it are dropped.
      budget: [B] int32, at most this many nodes per row, the root included.

    Returns:
      A DraftTree, best nodes first; of equally good ones earlier continuations' come first.
    """
    batch, count, depth = continuations.shape
    scores = known(scores)
    real = jnp.cumprod(scores > -jnp.inf, axis=-1) == 1
    equal = continuations[:, :, None] == continuations[:, None]  # [B, C, C, P]
    equal &= real[:, :, None] & real[:, None]
    shared = jnp.cumprod(equal, axis=-1) == 1  # the first p + 1 tokens are the same
    # The earliest continuation that begins the same way owns the node.
    owner = jnp.argmax(shared, axis=1)  # [B, C, P]
    own = owner == jnp.arange(count)[:, None]
    best = jnp.max(jnp.where(shared, scores[:, :, None], -jnp.inf), axis=1)
    level = jnp.arange(depth)
    parents = jnp.roll(owner, 1, axis=-1) * depth + level - 1
    parents = jnp.where(level == 0, ROOT, parents)
    depths = jnp.broadcast_to(level + 1, owner.shape)
    nodes = continuations, parents, depths, jnp.where(own & real, best, -jnp.inf)
    flat = (x.reshape(batch, -1) for x in nodes)
    return best_nodes(anchor, *flat, size=size, budget=budget)
