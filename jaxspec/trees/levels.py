"""Growing a tree level by level: the engine of every builder that keeps the best nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxspec.trees.tree import NO_PARENT, DraftTree, known, root_only

ROOT = -1  # parent of nodes at depth 1, before nodes are numbered

# expand(slot, scores, state) -> (candidates, children)
#   slot: int32, the drafted position; scores: [B, F] of the nodes above it, -inf where there is
#   none; state: pytree of [B, F, ...] they carry.
#   candidates: [B, X] scores of possible children, none above its parent's, X >= F. First
#     children of all nodes come first: partial sorts are two to three times as quick where the
#     likely stand in front.
#   children(index [B, F]) -> (parents [B, F] in 0 … F - 1, tokens [B, F], their state).
Expand = Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Callable]]


def grow_by_level(
    expand: Expand,
    state: Any,
    root: Int[Array, " B"],
    *,
    depth: int,
    size: int,
    budget: Int[Array, " B"],
) -> DraftTree:
    """The `budget` best nodes of the tree that `expand` spans, without a heap.

    A node never scores above its parent, so the best N - 1 nodes of all levels are closed
    under parents and each level contributes at most its own best N - 1. Keep those level by
    level, then the best of all. Node i is the i-th best (ties: lower depth first), so parents
    come before children and a larger budget's tree contains a smaller one's.

    Args:
      expand: see `Expand`; traced once, F = size - 1.
      state: what the nodes of a level carry; at the first level only entry 0, the root, counts.
      root: [B] int32.
      depth: P, levels below the root.
      size: N.
      budget: [B] int32.
    """
    batch, frontier = root.shape[0], size - 1
    if frontier == 0:
        return root_only(root)

    def level(carry, slot):
        candidates, children = expand(slot, *carry)
        scores, index = lax.top_k(known(candidates), frontier)
        parents, tokens, state = children(index)
        return (scores, state), (scores, parents, tokens)

    start = jnp.where(jnp.arange(frontier) == 0, 0.0, -jnp.inf)
    start = jnp.broadcast_to(start, (batch, frontier))
    _, levels = lax.scan(level, (start, state), jnp.arange(depth))
    scores, parents, tokens = (jnp.moveaxis(x, 0, 1) for x in levels)
    return best_of_levels(root, tokens, parents, scores, size=size, budget=budget)


def best_of_levels(
    root: Int[Array, " B"],
    tokens: Int[Array, "B P F"],
    parents: Int[Array, "B P F"],
    scores: Float[Array, "B P F"],
    *,
    size: int,
    budget: Int[Array, " B"],
) -> DraftTree:
    """`best_nodes` of levels [B, P, F], where a parent is a place in the level above."""
    batch, depth, frontier = scores.shape
    slot = jnp.arange(depth)[:, None]
    parents = jnp.where(slot == 0, ROOT, (slot - 1) * frontier + parents)
    depths = jnp.broadcast_to(slot + 1, scores.shape)
    found = (x.reshape(batch, -1) for x in (tokens, parents, depths, scores))
    return best_nodes(root, *found, size=size, budget=budget)


def best_nodes(
    root: Int[Array, " B"],
    tokens: Int[Array, "B M"],
    parents: Int[Array, "B M"],
    depths: Int[Array, "B M"],
    scores: Float[Array, "B M"],
    *,
    size: int,
    budget: Int[Array, " B"],
) -> DraftTree:
    """The tree of the best among M nodes, best first.

    Args:
      root: [B] int32.
      tokens, parents, depths: [B, M] int32; a parent is the index of another node before its
        child, or `ROOT`.
      scores: [B, M] float32, none above its parent's; -inf where there is no node.
      size: N.
      budget: [B] int32, at most this many nodes per row, the root included.
    """
    missing = [(0, 0), (0, max(0, size - 1 - tokens.shape[1]))]
    tokens, parents, depths = (jnp.pad(x, missing) for x in (tokens, parents, depths))
    scores = jnp.pad(scores, missing, constant_values=-jnp.inf)
    batch, count = tokens.shape
    scores, place = lax.top_k(scores, size - 1)  # of equal scores the first comes first
    rows, node = jnp.arange(batch)[:, None], jnp.arange(1, size)
    number = jnp.zeros((batch, count), jnp.int32).at[rows, place].set(node)
    above = parents[rows, place]
    above = jnp.where(above == ROOT, 0, number[rows, above])
    kept = (scores > -jnp.inf) & (node < budget[:, None])

    def column(root, nodes, padding):
        root = jnp.broadcast_to(root, (batch, 1))
        return jnp.concatenate([root, jnp.where(kept, nodes, padding)], axis=1)

    return DraftTree(
        tokens=column(root[:, None], tokens[rows, place], 0),
        parents=column(NO_PARENT, above, NO_PARENT),
        depths=column(0, depths[rows, place], 0),
        scores=column(0.0, scores, -jnp.inf),
        valid=column(True, True, False),
    )
