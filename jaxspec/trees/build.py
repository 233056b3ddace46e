"""From scores to a tree, by name.

Every builder takes a static `size` N and a `budget` of nodes per row, the root included; a
smaller budget's tree is the beginning of a larger one's.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxspec.config import TreeConfig
from jaxspec.trees.best_first import best_first
from jaxspec.trees.top_budget import top_budget
from jaxspec.trees.tree import DraftTree, chain


def build(tree: TreeConfig, logits: jax.Array, root: jax.Array, budget: jax.Array) -> DraftTree:
    """Grows the configured tree over scores that depend on the depth alone.

    Args:
      logits: [B, P, V]; row d scores the token at depth d + 1, whatever its parent.
      root: [B] int32, the anchor.
      budget: [B] int32, nodes per row, root included, 1 … tree.size.
    """
    if tree.kind == "chain":
        return greedy_chain(logits, root, budget, size=tree.size)
    if tree.kind == "best_first":
        return best_first(logits, root, width=tree.width, budget=budget, size=tree.size)
    if tree.kind in ("top_budget", "path_conditioned"):
        # Conditioned on nothing, the path-conditioned tree is the optimum under marginals.
        return top_budget(logits, root, budget=budget, size=tree.size)
    raise ValueError(
        f"tree kind {tree.kind!r} needs a drafter with a sequential head; "
        "this one scores each depth alone: use chain, best_first or top_budget"
    )


def greedy_chain(
    logits: jax.Array, root: jax.Array, budget: jax.Array, *, size: int
) -> DraftTree:
    """The most probable token at every depth: logits [B, P, V] -> a tree of N = size nodes."""
    tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    log_probs = jnp.max(jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1), axis=-1)
    return chain(root, tokens, budget - 1, log_probs, size=size)
