"""Trees without some of their nodes."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxspec.trees.tree import NO_PARENT, DraftTree


def pruned(tree: DraftTree, kept: Bool[Array, "B N"]) -> tuple[DraftTree, Int[Array, "B N"]]:
    """The kept nodes of a tree in their order, closed up; padding follows.

    Args:
      kept: the root and, of every other kept node, its parent.

    Returns:
      The tree, and which node of the old one is at each place of it::

          a(0) - b(1) - c(2)     without b, c      a(0) - d(1)
              \\- d(3)                              order: 0 3 1 2
    """
    kept = kept & tree.valid
    order = jnp.argsort(~kept, axis=1, stable=True).astype(jnp.int32)
    place = jnp.argsort(order, axis=1).astype(jnp.int32)  # the inverse
    take = lambda x: jnp.take_along_axis(x, order, axis=1)  # noqa: E731
    valid = take(kept)
    parents = take(tree.parents)
    parents = jnp.take_along_axis(place, jnp.maximum(parents, 0), axis=1)
    is_child = valid & (jnp.arange(tree.size) > 0)
    shorter = DraftTree(
        tokens=jnp.where(valid, take(tree.tokens), 0),
        parents=jnp.where(is_child, parents, NO_PARENT),
        depths=jnp.where(valid, take(tree.depths), 0),
        scores=jnp.where(valid, take(tree.scores), -jnp.inf),
        valid=valid,
    )
    return shorter, order
