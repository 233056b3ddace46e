"""DFlash2's selector: the likeliest tokens of every slot, scored given the token before it.

The scores of all pairs of candidates of adjacent slots form a small table, the lattice: a chain
is a walk through it, and a tree grows over it. Once the candidates are found, no array has the
size of the vocabulary.

Source: "DFlash 2: Keep Drafting Parallel" (Inco AI, August 2026).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxspec.config import TreeConfig
from jaxspec.drafters.head import DraftHead, Vocabulary
from jaxspec.trees.build import build_from_top
from jaxspec.trees.candidates import top_logits
from jaxspec.trees.transitions import from_transitions
from jaxspec.trees.tree import DraftTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lattice:
    """Scores of every candidate given each candidate of the slot before.

    Attributes:
      tokens: [B, P, k] int32, ids of the candidates, the likeliest by base logits first.
      scores: [B, P, k, k] float32 unnormalised logits: slot, candidate of the slot before,
        candidate of the slot. In slot 0 all rows are the anchor's.
    """

    tokens: jax.Array
    scores: jax.Array


def lattice(
    head: DraftHead,
    vocabulary: Vocabulary,
    stream: Float[Array, "B P M"],
    base: Float[Array, "B P V"],
    anchor: Int[Array, " B"],
    added: Float[Array, "_ P _"] | None = None,
) -> Lattice:
    """S(a, b) = U(b) + sum_i A[a, i] (H h)_i B[b, i] for all pairs of candidates.

    Args:
      stream: [B, P, M].
      base: [B, P, V'], base logits U.
      anchor: [B] int32.
      added: to the scores of each slot's tokens, see `noise.bias`. The candidates stay those of
        U: the selector was trained on no others.
    """
    index, logits, _ = top_logits(base, min(head.config.candidates, base.shape[-1]))
    tokens = vocabulary.ids(index)
    first = jnp.broadcast_to(anchor[:, None, None], tokens[:, :1].shape)
    previous = jnp.concatenate([first, tokens[:, :-1]], axis=1)  # [B, P, k]
    latent, _ = head.advance(vocabulary, stream[:, :, None], previous, ())
    # Candidate by candidate of the slot before: [B, P, k, R] -> [B, P, k, k].
    scores = jax.vmap(head.select, (None, None, 2), 2)(logits, index, latent)
    if added is not None:
        added = jnp.broadcast_to(added, base.shape)
        scores += jnp.take_along_axis(added, index, axis=-1)[:, :, None]
    return Lattice(tokens, scores)


def walk(
    scores: Float[Array, "B P k k"],
    choose: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
) -> tuple[Int[Array, "B P"], Float[Array, "B P k"]]:
    """Chooses slot by slot, each given the choice before it.

    Args:
      scores: [B, P, k, k], of a lattice.
      choose: (slot, scores [B, k]) -> (index [B] of a candidate, its distribution [B, k]).

    Returns:
      indices [B, P] int32 of the chosen candidates, and their distributions [B, P, k].
    """

    def step(above, inputs):
        slot, table = inputs
        row = jnp.take_along_axis(table, above[:, None, None], axis=1)[:, 0]
        chosen, law = choose(slot, row)
        return chosen, (chosen, law)

    start = jnp.zeros(scores.shape[0], jnp.int32)
    slots = jnp.arange(scores.shape[1]), scores.swapaxes(0, 1)
    _, (chosen, laws) = lax.scan(step, start, slots)
    return chosen.swapaxes(0, 1), laws.swapaxes(0, 1)


def pick(tokens: Int[Array, "B P k"], chosen: Int[Array, "B P"]) -> Int[Array, "B P"]:
    """The tokens [B, P] of chosen candidates [B, P] among [B, P, k]."""
    return jnp.take_along_axis(tokens, chosen[..., None], axis=-1)[..., 0]


def lattice_tree(
    tree: TreeConfig,
    table: Lattice,
    anchor: Int[Array, " B"],
    budget: Int[Array, " B"],
) -> DraftTree:
    """The configured tree over the candidates, scored by the selector's log-probabilities.

    `path_conditioned` scores every node given its own parent, from its row of the lattice.
    `transitions` is the same tree, limited to `tree.candidates` parents and `tree.width`
    children of each. The others score along the greedy walk.

    Args:
      anchor: [B] int32.
      budget: [B] int32, nodes per row, root included, 1 … tree.size.
    """
    k = table.tokens.shape[-1]
    if tree.kind in ("path_conditioned", "transitions"):
        parents, width = k, k
        if tree.kind == "transitions":
            parents, width = min(k, tree.candidates), min(k, tree.width)
        log_probs = jax.nn.log_softmax(table.scores[:, :, :parents], axis=-1)
        log_probs, index = lax.top_k(log_probs, width)  # [B, P, parents, width]
        tokens = jnp.take_along_axis(table.tokens[:, :, None], index, axis=-1)
        following = jnp.where(index < parents, index, -1)
        return from_transitions(
            tokens, log_probs, following, anchor, budget=budget, size=tree.size
        )
    _, rows = walk(table.scores, lambda slot, row: (jnp.argmax(row, -1).astype(jnp.int32), row))
    log_probs, index = lax.top_k(jax.nn.log_softmax(rows, axis=-1), k)
    tokens = jnp.take_along_axis(table.tokens, index, axis=-1)
    return build_from_top(tree, tokens, log_probs, anchor, budget)
