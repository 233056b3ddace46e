"""A round in two programs, for batches whose tokens something on the host restricts.

Between them the host walks the drafted trees and says what is allowed (`decoding.allowed`).
Batches without such rows run `decode_rows`, which the host does not interrupt.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxspec.decoding.allowed import AllowedTokens, restricted
from jaxspec.decoding.budget import StepTimes
from jaxspec.decoding.fitting import VerifySize
from jaxspec.decoding.schedule import (
    Batch,
    Fixed,
    Habit,
    Schedule,
    draft_of,
    run_if,
    size_of_round,
    sized_round,
    whole_round,
)
from jaxspec.decoding.state import Decoder, Draft, Params
from jaxspec.trees.tree import root_only


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drafted:
    """The first half of a round, `draft_rows`, for `judge_rows`.

    Attributes:
      size: scalar int32, index of the size chosen; 0 if nothing was drafted.
      pays: scalar bool, whether the draft is expected to pay.
    """

    draft: Draft
    size: jax.Array
    pays: jax.Array


@functools.partial(jax.jit, static_argnames=("decoder", "schedule"), donate_argnames="batch")
def draft_rows(
    decoder: Decoder,
    params: Params,
    batch: Batch,
    habit: Habit,
    times: StepTimes,
    *,
    schedule: Schedule,
) -> tuple[Batch, Drafted]:
    """The first half of a round whose tokens the host restricts: trees, not yet cut."""

    def drafted(carry):
        return draft_of(decoder, params, carry[0])

    if isinstance(schedule, Fixed):
        size, pays = jnp.int32(1), jnp.bool(True)
    else:
        size, pays = size_of_round(batch, habit, times, schedule)
    nothing = Draft(root_only(batch.state.anchor, size=decoder.drafter.size))
    batch, draft = run_if(size > 0, drafted, (batch, nothing))
    return batch, Drafted(draft, size, pays)


@functools.partial(
    jax.jit,
    static_argnames=("decoder", "schedule", "sizes"),
    donate_argnames=("batch", "habit"),
)
def judge_rows(
    decoder: Decoder,
    params: Params,
    batch: Batch,
    habit: Habit,
    drafted: Drafted,
    allowed: AllowedTokens,
    times: StepTimes,
    *,
    schedule: Schedule,
    sizes: tuple[VerifySize, ...],
) -> tuple[Batch, Habit]:
    """The second half: verifies, accepts and commits what is allowed of the trees."""
    draft = restricted(drafted.draft, allowed)
    if isinstance(schedule, Fixed):
        return whole_round(decoder, params, batch, habit, draft, sizes)

    def drafts(batch):
        return batch, draft

    chosen = drafted.size, drafted.pays, draft.allowed[:, :1]
    return sized_round(decoder, params, batch, habit, drafts, times, sizes, *chosen)
