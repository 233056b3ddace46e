"""Builds a tree from scores, by kind.

Every builder takes a static `size` N and a `budget` of nodes per row, the root included; a
smaller budget's tree is a prefix of a larger one's.
"""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from jaxspec.config import TreeConfig
from jaxspec.trees.best_first import best_first
from jaxspec.trees.candidates import top_log_probs
from jaxspec.trees.top_budget import top_budget
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
    grow = best_first if tree.kind == "best_first" else top_budget
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
