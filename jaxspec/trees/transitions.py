"""Trees whose nodes know the token before them, from a table scored in one step."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxspec.trees.levels import grow_by_level
from jaxspec.trees.tree import DraftTree


def from_transitions(
    tokens: Int[Array, "B P M K"],
    log_probs: Float[Array, "B P M K"],
    next_parent: Int[Array, "B P M K"],
    root: Int[Array, " B"],
    *,
    budget: Int[Array, " B"],
    size: int,
) -> DraftTree:
    """TreeFlash's tree: the best paths through tables of likely parents and their children.

    Row (p, m) lists the K likeliest children, at depth p + 1, of the m-th likely token of
    depth p. A child that is itself a likely parent of the next depth names its row there; any
    other is a leaf. All of depth 1 hangs from row 0, the anchor.

    Node i is the i-th best path. TreeFlash's heap settles equal scores by the smaller tuple of
    ranks, this by the lower depth, then the lower rank: where nodes of exactly one score
    straddle the budget, another of them may be kept. Neither tree is worth more.

    Args:
      tokens: [B, P, M, K] int32.
      log_probs: [B, P, M, K], of each child given its parent; none positive.
      next_parent: [B, P, M, K] int32, the child's row of the next table, -1 for a leaf.
      root: [B] int32, the anchor.
      budget: [B] int32, nodes of each row, the root included.
      size: N, the budget's upper bound.

    Source: TreeFlash (arXiv 2606.03819).
    """
    batch, depth, frontier = *tokens.shape[:2], size - 1
    rows = jnp.arange(batch)[:, None]

    def expand(slot, scores, parent):
        # A leaf has no row: what row 0 says is cancelled.
        scores = jnp.where(parent >= 0, scores, -jnp.inf)
        table = jnp.maximum(parent, 0)
        gain = log_probs[rows, slot, table].swapaxes(1, 2)  # [B, K, F]
        candidates = scores[:, None] + gain

        def children(index):
            rank, above = index // frontier, index % frontier
            place = rows, slot, jnp.take_along_axis(table, above, axis=1), rank
            return above, tokens[place], next_parent[place]

        return candidates.reshape(batch, -1), children

    start = jnp.zeros((batch, frontier), jnp.int32)
    return grow_by_level(expand, start, root, depth=depth, size=size, budget=budget)
