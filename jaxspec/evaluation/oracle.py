"""What a perfect choice among a drafter's candidates would accept: does budget limit, or they?

Given the true path before it, a token has a rank: how many tokens the drafter finds likelier.
A tree that held every token where it is among the k likeliest would accept all up to the first
one of rank k or more. No tree with k children a node accepts more, whatever its budget.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxspec.drafters.base import LoadedDrafter
from jaxspec.evaluation.walk import Observed, RecordedAnswer, Table, at_every_anchor


def ranks(
    observed: Observed, answers: Sequence[RecordedAnswer], drafter: LoadedDrafter, state: Any
) -> list[Table]:
    """The highest rank up to every depth, as tables to be walked (`walk.walk`) with a budget of
    k: that is the oracle over the k likeliest. A budget of the target's vocabulary's size
    leaves the drafter's depth and draft vocabulary as the only limits.

    No nodes are counted, and there are no scores.

    Args:
      drafter: one that scores its vocabulary token by token (`Drafter.rollout`): trained, not
        joined.
      state: its own, one of `observed.states`.

    Raises:
      ValueError: the drafter has no such scores.
    """
    highest = at_every_anchor(highest_ranks, observed, answers, drafter, state)
    none = np.zeros(highest.shape[1], np.int32)
    return [Table(own, none, none[:, None].astype(np.float32)) for own in highest]


def highest_ranks(drafter, params, state, anchor, position, path):
    """[B, P] int32: of the true path [B, P] up to each depth; the largest int32 from a token
    on that is not drafted at all."""

    def follow(slot, logits):
        index, drafted = params.vocabulary.index(path[:, slot])
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
    """A table whose walks accept what the better of the two accepts.

    Args:
      table: to be walked with any budget.
      other: always with `budget`.
    """
    width = max(table.nodes.shape[1], other.nodes.shape[1])
    missing = ((0, 0), (0, width - table.nodes.shape[1]))
    nodes = np.pad(table.nodes, missing, constant_values=np.iinfo(np.int32).max)
    accepted = (other.nodes < budget).sum(axis=1, keepdims=True)
    return dataclasses.replace(table, nodes=np.where(np.arange(width) < accepted, 0, nodes))
