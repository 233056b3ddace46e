"""Several proposals for one anchor as one tree: shared beginnings are shared nodes."""

from __future__ import annotations

import jax
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


def union(
    first: DraftTree, second: DraftTree, *, size: int, depth: int, budget: Int[Array, " B"]
) -> DraftTree:
    """The best nodes of two scored trees over the same anchors, best first.

    A path that both contain has the better of its two scores.

    Args:
      first, second: of Na and Nb nodes.
      size: N.
      depth: a bound of both trees' depths.
      budget: [B] int32, at most this many nodes per row, the root included.
    """
    same = first.tokens[:, :, None] == second.tokens[:, None]  # [B, Na, Nb]
    same &= first.depths[:, :, None] == second.depths[:, None]
    same &= first.valid[:, :, None] & second.valid[:, None]
    rows = jnp.arange(same.shape[0])[:, None, None]
    above = first.parents[:, :, None], second.parents[:, None]  # a root's is not looked at
    is_root = first.depths[:, :, None] == 0
    # Correct for paths of up to i tokens after i steps.
    same = jax.lax.fori_loop(
        0, depth, lambda _, paths: same & (is_root | paths[rows, *above]), same
    )
    twin, has_twin = jnp.argmax(same, axis=1), same.any(axis=1)  # [B, Nb]
    first_scores, second_scores = known(first.scores), known(second.scores)
    better = jnp.max(jnp.where(same, second_scores[:, None], -jnp.inf), axis=2)
    ours = jnp.maximum(first_scores, better)

    # Nodes without the root: the first tree's, then the second's own.
    drafted = first.size - 1
    parents = jnp.where(first.parents == 0, ROOT, first.parents - 1)
    place = jnp.where(has_twin, twin - 1, drafted - 1 + jnp.arange(second.size))
    place = place.at[:, 0].set(ROOT)
    theirs = jnp.take_along_axis(place, jnp.maximum(second.parents, 0), axis=1)
    own = jnp.where(has_twin | ~second.valid, -jnp.inf, second_scores)

    def join(a, b):
        return jnp.concatenate([a[:, 1:], b[:, 1:]], axis=1)

    return best_nodes(
        first.tokens[:, 0],
        join(first.tokens, second.tokens),
        join(parents, theirs),
        join(first.depths, second.depths),
        join(ours, own),
        size=size,
        budget=budget,
    )
