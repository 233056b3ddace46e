"""JetSpec's tree: the best node gets its children, again and again."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxspec.trees.candidates import top_log_probs
from jaxspec.trees.tree import NO_PARENT, DraftTree, known


def best_first(
    logits: jax.Array,
    root: jax.Array,
    *,
    width: int,
    budget: jax.Array,
    size: int,
) -> DraftTree:
    """JetSpec's `accum_logp`: expand the best node by its `width` likeliest children, repeat.

    Nodes stand in the order in which they were added. Of equally good nodes the oldest is
    expanded first. A round adds up to `width` children and deepens the tree by at most one,
    so the tree is never deeper than ceil((budget - 1) / width): full fan-out at a small
    budget drafts less far than a chain.

    Args:
      logits: [B, P, V]; row p is the distribution of the token at depth p + 1.
      root: [B] int32, the anchor.
      width: W, children per expanded node; at most V.
      budget: [B] int32, nodes of each row, the root included.
      size: N, the budget's upper bound.

    Source: JetSpec (arXiv 2606.18394), Algorithm 1.
    """
    tokens, log_probs = top_log_probs(logits, width)
    return best_first_from_top(tokens, log_probs, root, budget=budget, size=size)


def best_first_from_top(
    tokens: jax.Array,
    log_probs: jax.Array,
    root: jax.Array,
    *,
    budget: jax.Array,
    size: int,
) -> DraftTree:
    """`best_first` over the top W tokens of each depth, both [B, P, W], likeliest first."""
    grow = jax.vmap(_best_first_row, in_axes=(0, 0, 0, 0, None))
    return grow(tokens, known(log_probs), root, budget, size)


def _best_first_row(tokens, log_probs, root, budget, size) -> DraftTree:
    depth, width = tokens.shape
    steps = -(-(size - 1) // width)
    room = size + width  # children are written W at a time

    def expand(carry, _):
        nodes, used = carry
        best = jnp.argmax(nodes["open"])
        level = nodes["depth"][best]
        scores = nodes["open"][best] + log_probs[level]
        children = {
            "open": jnp.where(level + 1 < depth, scores, -jnp.inf),
            "score": scores,
            "depth": jnp.broadcast_to(level + 1, width),
            "parent": jnp.broadcast_to(best, width),
            "token": tokens[level],
        }
        nodes = nodes | {"open": nodes["open"].at[best].set(-jnp.inf)}
        nodes = {
            name: lax.dynamic_update_slice(nodes[name], children[name], (used,))
            for name in nodes
        }
        return (nodes, jnp.minimum(used + width, size)), None

    first = jnp.arange(room) == 0
    empty = jnp.where(first, 0.0, -jnp.inf)
    nodes = {
        "open": empty,  # score of a node not yet expanded
        "score": empty,
        "depth": jnp.zeros(room, jnp.int32),
        "parent": jnp.full(room, NO_PARENT, jnp.int32),
        "token": jnp.where(first, root, 0).astype(jnp.int32),
    }
    (nodes, _), _ = lax.scan(expand, (nodes, jnp.int32(1)), None, length=steps)
    nodes = {name: x[:size] for name, x in nodes.items()}
    valid = (nodes["score"] > -jnp.inf) & (jnp.arange(size) < budget)
    return DraftTree(
        tokens=jnp.where(valid, nodes["token"], 0),
        parents=jnp.where(valid, nodes["parent"], NO_PARENT),
        depths=jnp.where(valid, nodes["depth"], 0),
        scores=jnp.where(valid, nodes["score"], -jnp.inf),
        valid=valid,
    )
