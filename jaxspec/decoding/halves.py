"""A round in two programs, for batches in which the host restricts tokens.

Between the programs the host restricts the drafted trees (`serving.matcher`). Other batches run
`decode_rows`, which does not wait for the host.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxspec.decoding.habit import Habit
from jaxspec.decoding.schedule import Batch, Fixed, Rounds, Schedule, run_if
from jaxspec.decoding.staircase import Staircase
from jaxspec.decoding.state import Decoder, Draft, Params
from jaxspec.trees.tree import DraftTree, root_only


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drafted:
    """The first half of a round, `draft_rows`, for `judge_rows`.

    Attributes:
      took_place: scalar bool; if not, trees are their roots.
      pays: scalar bool, whether the draft was expected to pay.
    """

    tree: DraftTree
    took_place: jax.Array
    pays: jax.Array


@functools.partial(jax.jit, static_argnames=("decoder", "schedule"), donate_argnames="batch")
def draft_rows(
    decoder: Decoder,
    params: Params,
    batch: Batch,
    habit: Habit,
    staircase: Staircase,
    forced: jax.Array,
    *,
    schedule: Schedule,
) -> tuple[Batch, Drafted]:
    """The first half of a round: drafts trees, not yet restricted.

    Args: forced: scalar bool, draft even if it is not expected to pay.
    """
    rounds = Rounds(decoder, params, staircase, schedule)

    def drafted(carry):
        batch, draft = rounds.draft(carry[0])
        return batch, draft.tree

    took_place = pays = jnp.bool(True)
    if not isinstance(schedule, Fixed):
        size, pays = rounds.size(batch, habit)
        took_place = (size > 0) | forced
    nothing = root_only(batch.state.anchor, size=decoder.drafter.size)
    batch, tree = run_if(took_place, drafted, (batch, nothing))
    return batch, Drafted(tree, took_place, pays)


@functools.partial(
    jax.jit,
    static_argnames=("decoder", "schedule"),
    donate_argnames=("batch", "habit"),
)
def judge_rows(
    decoder: Decoder,
    params: Params,
    batch: Batch,
    habit: Habit,
    drafted: Drafted,
    draft: Draft,
    staircase: Staircase,
    *,
    schedule: Schedule,
) -> tuple[Batch, Habit]:
    """The second half of a round: verifies, accepts and commits the restricted trees."""
    rounds = Rounds(decoder, params, staircase, schedule)
    if isinstance(schedule, Fixed):
        return rounds.whole(batch, draft, habit)
    # What was drafted is known, and nothing of it was drawn: the size may depend on it.
    size = jnp.maximum(rounds.size_of(draft.tree, batch, habit), 1)
    return rounds.sized(
        batch,
        habit,
        lambda batch: (batch, draft),
        size=jnp.where(drafted.took_place, size, 0),
        pays=drafted.pays,
        allowed=draft.allowed[:, :1],
    )
