"""DDTree's tree: the most probable prefixes when every depth has one distribution."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxspec.trees.levels import grow_by_level
from jaxspec.trees.tree import DraftTree


def top_budget(
    tokens: Int[Array, "B P K"],
    log_probs: Float[Array, "B P K"],
    root: Int[Array, " B"],
    *,
    budget: Int[Array, " B"],
    size: int,
) -> DraftTree:
    """The most probable prefixes under independent depths: DDTree's optimum.

    No tree of `budget` nodes has a larger expected accepted length if each depth's token were
    drawn from its log-probabilities. Node i is the i-th most probable prefix.

    Args:
      tokens, log_probs: [B, P, K]; row p has the likeliest tokens of depth p + 1, likeliest
        first. N - 1 of them never miss a prefix; fewer are found sooner.
      root: [B] int32, the anchor.
      budget: [B] int32, nodes of each row, the root included (DDTree does not count it).
      size: N, the budget's upper bound.

    Source: DDTree (Ringel and Romano, Accelerating Speculative Decoding with Block Diffusion
    Draft Trees), propositions 1 and 2.
    """
    frontier, width = size - 1, tokens.shape[-1]
    # The child of rank k of the i-th best node of a level has (i + 1)(k + 1) - 1 nodes of its
    # own level that are no worse: beyond N - 1 it cannot be kept. About N ln N pairs remain.
    pairs = [(i, k) for k in range(width) for i in range(frontier // (k + 1))]
    above, ranks = np.array(pairs, np.int32).reshape(-1, 2).T

    def expand(slot, scores, _):
        candidates = scores[:, above] + log_probs[:, slot][:, ranks]

        def children(index):
            rank = jnp.asarray(ranks)[index]
            chosen = jnp.take_along_axis(tokens[:, slot], rank, axis=-1)
            return jnp.asarray(above)[index], chosen, None

        return candidates, children

    return grow_by_level(expand, None, root, depth=tokens.shape[1], size=size, budget=budget)
