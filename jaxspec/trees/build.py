"""Builds a tree from scores, by kind.

Every builder takes a static `size` N and a `budget` of nodes per row, the root included; a
smaller budget's tree is a prefix of a larger one's.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxspec.config import TreeConfig
from jaxspec.trees.best_first import best_first_from_top
from jaxspec.trees.candidates import likeliest, top_log_probs
from jaxspec.trees.top_budget import top_budget_from_top
from jaxspec.trees.tree import DraftTree, chain


def build(
    tree: TreeConfig,
    logits: Float[Array, "B P V"],
    root: Int[Array, " B"],
    budget: Int[Array, " B"],
) -> DraftTree:
    """Grows the configured tree over scores that depend only on the depth.

    Args:
      logits: [B, P, V]; row d scores the token at depth d + 1, whatever its parent.
      root: [B] int32, the anchor.
      budget: [B] int32, nodes per row, root included, 1 … tree.size.
    """
    if tree.kind == "chain":
        return greedy_chain(logits, root, budget, size=tree.size)
    tokens, log_probs = top_log_probs(logits, _width(tree, logits.shape[-1]))
    return build_from_top(tree, tokens, log_probs, root, budget)


def build_from_top(
    tree: TreeConfig,
    tokens: Int[Array, "B P K"],
    log_probs: Float[Array, "B P K"],
    root: Int[Array, " B"],
    budget: Int[Array, " B"],
) -> DraftTree:
    """`build` over the likeliest tokens of each depth, both [B, P, K], likeliest first."""
    width = _width(tree, tokens.shape[-1])
    tokens, log_probs = tokens[..., :width], log_probs[..., :width]
    if tree.kind == "chain":
        return chain(root, tokens[..., 0], budget - 1, log_probs[..., 0], size=tree.size)
    grow = best_first_from_top if tree.kind == "best_first" else top_budget_from_top
    return grow(tokens, log_probs, root, budget=budget, size=tree.size)


def _width(tree: TreeConfig, most: int) -> int:
    """Tokens per depth that the tree can use, of at most so many."""
    widths = {
        "chain": 1,
        "best_first": tree.width,
        # Conditioned on nothing, the path-conditioned tree is the optimum under marginals.
        "top_budget": max(1, tree.size - 1),
        "path_conditioned": max(1, tree.size - 1),
    }
    if tree.kind not in widths:
        raise ValueError(
            f"tree kind {tree.kind!r} needs a drafter with a sequential head, but this one "
            "scores each depth independently; use chain, best_first or top_budget"
        )
    return min(widths[tree.kind], most)


def greedy_chain(
    logits: Float[Array, "B P V"],
    root: Int[Array, " B"],
    budget: Int[Array, " B"],
    *,
    size: int,
) -> DraftTree:
    """The most probable token at every depth: logits [B, P, V] -> a tree of N = size nodes."""
    tokens = likeliest(logits)
    log_probs = jnp.max(jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1), axis=-1)
    return chain(root, tokens, budget - 1, log_probs, size=size)
