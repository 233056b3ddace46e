"""JetSpec's tree: repeatedly expand the best node."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxspec.trees.tree import NO_PARENT, DraftTree, known

UNROLLED = 16  # steps of a GPU's loop at a time: a step alone is a dozen kernels, here three


def best_first(
    tokens: Int[Array, "B P W"],
    log_probs: Float[Array, "B P W"],
    root: Int[Array, " B"],
    *,
    budget: Int[Array, " B"],
    size: int,
) -> DraftTree:
    """JetSpec's `accum_logp`: expand the best node by its depth's W likeliest tokens, repeat.

    Nodes stand in the order in which they were added. Of equally good nodes the oldest is
    expanded first. A round adds up to W children and deepens the tree by at most one, so the
    tree is never deeper than ceil((budget - 1) / W): full fan-out at a small budget drafts less
    far than a chain.

    Args:
      tokens, log_probs: [B, P, W]; row p has the likeliest tokens of depth p + 1, likeliest
        first.
      root: [B] int32, the anchor.
      budget: [B] int32, nodes of each row, the root included.
      size: N, the budget's upper bound.

    Source: JetSpec (arXiv 2606.18394), Algorithm 1.
    """

    def rows(unroll):
        return jax.vmap(functools.partial(_best_first_row, size=size, unroll=unroll))

    arrays = (tokens, known(log_probs), root, budget)
    return lax.platform_dependent(*arrays, cuda=rows(UNROLLED), default=rows(1))


def _best_first_row(tokens, log_probs, root, budget, *, size, unroll) -> DraftTree:
    depth, width = tokens.shape
    steps = -(-(size - 1) // width)
    node = jnp.arange(1 + steps * width)  # children of a step stand W in a row

    def expand(carry, step):
        scores, depths = carry  # of nodes not yet expanded; of all nodes
        best = jnp.argmax(scores)
        score, level = scores[best], depths[best]
        rank = node - (1 + step * width)
        new = (rank >= 0) & (rank < width)
        children = score + log_probs[level, jnp.clip(rank, 0, width - 1)]
        children = jnp.where(level + 1 < depth, children, -jnp.inf)
        scores = jnp.where(new, children, jnp.where(node == best, -jnp.inf, scores))
        return (scores, jnp.where(new, level + 1, depths)), (best, score, level)

    start = jnp.where(node == 0, 0.0, -jnp.inf), jnp.zeros(node.shape, jnp.int32)
    _, (best, score, level) = lax.scan(expand, start, jnp.arange(steps), unroll=unroll)

    def column(root, children):
        children = jnp.broadcast_to(children, (steps, width)).reshape(-1)
        return jnp.concatenate([jnp.reshape(root, 1).astype(children.dtype), children])[:size]

    nodes = {
        "score": column(0.0, score[:, None] + log_probs[level]),
        "depth": column(0, level[:, None] + 1),
        "parent": column(NO_PARENT, best[:, None]),
        "token": column(root, tokens[level]),
    }
    valid = (nodes["score"] > -jnp.inf) & (jnp.arange(size) < budget)
    return DraftTree(
        tokens=jnp.where(valid, nodes["token"], 0),
        parents=jnp.where(valid, nodes["parent"], NO_PARENT),
        depths=jnp.where(valid, nodes["depth"], 0),
        scores=jnp.where(valid, nodes["score"], -jnp.inf),
        valid=valid,
    )
