"""One level of a tree scored by a low-rank head, in plain XLA: the kernels' contract."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Levels:
    """The best nodes of every depth: row 0 is the root, row d has those of depth d.

    Attributes:
      scores: [B, P + 1, F] float32, best first; -inf where there is no node.
      parents: [B, P + 1, F] int32, indices in the row above.
      tokens: [B, P + 1, F] int32.
      floor: [B] float32, the F-th best score of all rows but the root's: a node must exceed it
        to be among the F best.
    """

    scores: jax.Array
    parents: jax.Array
    tokens: jax.Array
    floor: jax.Array


def empty_levels(root: jax.Array, *, depth: int, width: int) -> Levels:
    """Levels with only the root [B] int32; P = depth, F = width."""
    shape = (root.shape[0], depth + 1, width)
    zeros = jnp.zeros(shape, jnp.int32)
    return Levels(
        scores=jnp.full(shape, -jnp.inf).at[:, 0, 0].set(0.0),
        parents=zeros,
        tokens=zeros.at[:, 0, 0].set(root),
        floor=jnp.full(root.shape, -jnp.inf),
    )


def grow_level_reference(
    levels: Levels,
    slot: Int[Array, ""] | int,
    base: Float[Array, "B P V"],
    latent: Float[Array, "B M R"],
    output: Float[Array, "V R"],
) -> Levels:
    """Fills row slot + 1 with the F best children of the first M nodes of row slot.

    The children of node m are all tokens v, with logits base[slot, v] + latent[m] · output[v].
    A child's score is its parent's plus the log-probability, capped at zero against rounding.
    Nodes that do not exceed the floor get no children, as none could be among the F best. NaN
    counts as -inf. Of equal children the one of the lower parent comes first, then the lower
    token.

    Args:
      levels: rows after slot are empty.
      slot: int32, 0 … P - 1.
      base: [B, P, V] float32.
      latent: [B, M, R], M <= F, in the dtype of `output`.
      output: [V, R].
    """
    batch, parents, _ = latent.shape
    width, vocab = levels.scores.shape[-1], output.shape[0]
    above = live_scores(levels, slot, parents)
    bias = jnp.einsum("bmr,vr->bmv", latent, output, preferred_element_type=jnp.float32)
    gain = jnp.minimum(jax.nn.log_softmax(base[:, slot, None] + bias, axis=-1), 0.0)
    scores = (above[..., None] + gain).reshape(batch, -1)
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    scores = jnp.pad(
        scores, [(0, 0), (0, max(0, width - scores.shape[1]))], constant_values=-jnp.inf
    )
    scores, index = lax.top_k(scores, width)
    return with_row(levels, slot, scores, index // vocab, index % vocab)


def live_scores(levels: Levels, slot: jax.Array, parents: int) -> jax.Array:
    """Scores [B, M] of the nodes to expand, -inf for those that do not exceed the floor."""
    above = levels.scores[:, slot, :parents]
    return jnp.where(above > levels.floor[:, None], above, -jnp.inf)


def with_row(levels: Levels, slot, scores, parents, tokens) -> Levels:
    """The levels with row slot + 1 [B, F] and the floor that follows."""
    width = scores.shape[-1]
    row = slot + 1
    found = levels.scores.at[:, row].set(scores)
    below_root = found[:, 1:].reshape(scores.shape[0], -1)
    return Levels(
        scores=found,
        parents=levels.parents.at[:, row].set(parents),
        tokens=levels.tokens.at[:, row].set(tokens),
        floor=lax.top_k(below_root, width)[0][:, -1],
    )
