"""Upper bound on tau: a perfect choice among a drafter's k likeliest candidates.

Given the true path before it, a token's rank is the number of tokens that the drafter finds
likelier, knowing the noise of the choice (`jaxspec.noise`). A tree that contains every token of
rank below k accepts all tokens up to the first one of rank k or more. No tree with k children
per node accepts more, at any budget.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxspec.drafters.base import LoadedDrafter
from jaxspec.evaluation.walk import Observed, RecordedAnswer, Table, at_every_anchor
from jaxspec.noise import bias


def ranks(
    observed: Observed, answers: Sequence[RecordedAnswer], drafter: LoadedDrafter, state: Any
) -> list[Table]:
    """The highest rank up to every depth, as tables for `walk.walk`, whose budget is then k.

    A budget of the vocabulary's size is limited only by the drafter's depth and draft
    vocabulary. The tables count no nodes and have no scores.

    Args:
      drafter: a trained drafter, not joined, which scores its vocabulary token by token
        (`Drafter.rollout`).
      state: the drafter's, one of `observed.states`.

    Raises:
      ValueError: the drafter has no such scores.
    """
    highest = at_every_anchor(highest_ranks, observed, answers, drafter, state)
    none = np.zeros(highest.shape[1], np.int32)
    return [Table(own, none, none[:, None].astype(np.float32)) for own in highest]


def highest_ranks(drafter, params, state, anchor, position, path, noise):
    """Highest ranks of the true path [B, P] up to each depth, [B, P] int32; the largest int32
    from the first token outside the draft vocabulary on."""

    def follow(slot, logits):
        vocabulary = params.vocabulary
        vocab, kept = vocabulary.embed.shape[0], vocabulary.kept
        logits = logits + bias(noise, position + slot, 1, vocab, kept)[:, 0]
        index, drafted = vocabulary.index(path[:, slot])
        # Past the text there is no token (-1).
        own = jnp.take_along_axis(logits, jnp.maximum(index, 0)[:, None], axis=1)
        earlier = jnp.arange(logits.shape[1]) < index[:, None]  # of equal scores
        above = ((logits > own) | ((logits == own) & earlier)).sum(axis=1)
        known = drafted & (path[:, slot] >= 0) & (own[:, 0] > -jnp.inf)
        rank = jnp.where(known, above, jnp.iinfo(jnp.int32).max).astype(jnp.int32)
        return jnp.maximum(index, 0), rank[:, None]

    _, found = drafter.rollout(params, state, anchor, position, follow)
    return jnp.maximum.accumulate(found[..., 0], axis=1)


def with_other(table: Table, other: Table, budget: int) -> Table:
    """A table that accepts as much as the better of two tables.

    Args:
      table: used with any budget.
      other: always used with `budget`.
    """
    width = max(table.nodes.shape[1], other.nodes.shape[1])
    missing = ((0, 0), (0, width - table.nodes.shape[1]))
    nodes = np.pad(table.nodes, missing, constant_values=np.iinfo(np.int32).max)
    accepted = (other.nodes < budget).sum(axis=1, keepdims=True)
    return dataclasses.replace(table, nodes=np.where(np.arange(width) < accepted, 0, nodes))
