"""Several continuations of one anchor as one tree: shared beginnings are shared nodes."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxspec.trees.tree import NO_PARENT, DraftTree


def merge(
    anchor: jax.Array,
    continuations: jax.Array,
    lengths: jax.Array,
    *,
    size: int,
    budget: jax.Array,
) -> DraftTree:
    """The trie of C continuations, earlier ones first.

    Nodes are numbered continuation by continuation and, inside one, from the anchor down, so
    that a tree of a larger budget contains a smaller one's. `a b c` and `a b d` give::

        anchor(0) - a(1) - b(2) - c(3)
                               \\- d(4)

    Args:
      anchor: [B] int32.
      continuations: [B, C, P] int32, in order of priority.
      lengths: [B, C] int32: tokens of each that count; 0 leaves a continuation out.
      size: N; nodes beyond it are dropped.
      budget: [B] int32, at most this many nodes per row, the root included.

    Returns:
      A DraftTree whose valid nodes have score 0: continuations carry no probability.
    """
    return jax.vmap(_merge_row, in_axes=(0, 0, 0, None, 0))(
        anchor, continuations, lengths, size, budget
    )


def _merge_row(anchor, continuations, lengths, size, budget) -> DraftTree:
    count, depth = continuations.shape
    real = jnp.arange(depth) < lengths[:, None]  # [C, P]
    equal = (continuations[:, None] == continuations) & real[:, None] & real  # [C, C, P]
    shared = jnp.cumprod(equal, axis=-1) == 1  # the first p + 1 tokens are the same
    # The earliest continuation that begins the same way owns the node; a real one has at
    # least itself.
    owner = jnp.argmax(shared, axis=1)  # [C, P]
    new = real & (owner == jnp.arange(count)[:, None])
    number = jnp.cumsum(new.reshape(-1)).reshape(count, depth)  # of the node, where new
    above = number[owner[:, :-1], jnp.arange(depth - 1)]
    parent = jnp.pad(above, ((0, 0), (1, 0)))  # depth 1 hangs from the root

    place = jnp.where(new & (number < budget), number, size)

    def scatter(values, fill):
        return jnp.full(size, fill).at[place].set(values, mode="drop")

    valid = scatter(True, False).at[0].set(True)
    return DraftTree(
        tokens=scatter(continuations, 0).at[0].set(anchor).astype(jnp.int32),
        parents=scatter(parent, NO_PARENT).astype(jnp.int32),
        depths=scatter(jnp.arange(1, depth + 1), 0).astype(jnp.int32),
        scores=jnp.where(valid, 0.0, -jnp.inf),
        valid=valid,
    )
