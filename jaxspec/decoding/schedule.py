"""Rounds of many requests under one budget; the device chooses the nodes to verify.

An adaptive round first chooses its size from survivals of earlier rounds, and so knows before
drafting whether drafting pays. It then ranks the new nodes of all rows and verifies the best
that the size holds. Both steps are lossless for sampled chains as well as for trees
(`decoding.budget`): the size does not depend on the draft it cuts.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxspec.config import at_least, check_field
from jaxspec.decoding.budget import admit, best_size
from jaxspec.decoding.fitting import smallest
from jaxspec.decoding.habit import (
    KINDS,
    TEMPERATURES,
    UNKNOWN,
    Habit,
    choose_size,
    counted,
    foresee,
    learn,
    probe,
    rested,
)
from jaxspec.decoding.prefill import begin_prefill
from jaxspec.decoding.round import commit, judge, propose
from jaxspec.decoding.sampling import SamplingRows, greedy_rows
from jaxspec.decoding.staircase import Staircase, VerifySize
from jaxspec.decoding.state import Decoder, DecodeState, Draft, Params
from jaxspec.trees.tree import NO_PARENT, DraftTree, root_only


@dataclasses.dataclass(frozen=True)
class Fixed:
    """Every row verifies its own budget of nodes (`DecodeState.budget`), whatever the load."""

    age: int = 1


@dataclasses.dataclass(frozen=True)
class Adaptive:
    """The nodes of all rows compete for the size with the most expected tokens per second.

    Attributes:
      age: rounds between a draft and the choice of size that it informs, at least 1.
      probe: plain rounds after which one draft is made to see whether drafting pays again. The
        number doubles after each probe that does not pay, at most `habit.PATIENCE` times,
        except for requests younger than `probe` rounds. It is larger where drafts are slow
        (`habit.PROBES`).
    """

    age: int = 2
    probe: int = 16

    def __post_init__(self):
        at_least(1, self, "probe")
        rule = "at least 1: the current draft must not choose its own size"
        check_field(self, "age", self.age >= 1, rule)


Schedule = Fixed | Adaptive


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows between two rounds; rows are the first axis of every leaf.

    Attributes:
      survivals: [B, age, N - 1] float32, survival probabilities of the row's last drafts,
        newest first; `UNKNOWN` where there was none.
    """

    state: DecodeState
    sampling: SamplingRows
    survivals: jax.Array


@functools.partial(jax.jit, static_argnames=("decoder", "rows", "capacity", "age"))
def empty_rows(
    decoder: Decoder, params: Params, *, rows: int, capacity: int, age: int
) -> Batch:
    """A batch whose rows are all done."""
    prefilling = begin_prefill(decoder, params, rows, capacity)
    zeros = lambda dtype: jnp.zeros(rows, dtype)  # noqa: E731
    state = DecodeState(
        tokens=jnp.zeros((rows, capacity), jnp.int32),
        start=zeros(jnp.int32) + 1,
        length=zeros(jnp.int32) + 1,
        limit=zeros(jnp.int32) + 1,
        done=zeros(bool) | True,
        budget=zeros(jnp.int32) + decoder.drafter.size,
        cache=prefilling.cache,
        drafter=prefilling.drafter,
        rounds=zeros(jnp.int32),
        committed=jnp.zeros((rows, capacity), jnp.int32),
        nodes=zeros(jnp.int32),
        logprobs=prefilling.logprobs,
    )
    sampling = greedy_rows(jax.random.split(jax.random.key(0), rows))
    return Batch(state, sampling, unknown_survivals(decoder, rows, age))


def unknown_survivals(decoder: Decoder, rows: int, age: int) -> jax.Array:
    """`Batch.survivals` of rows without a past draft."""
    return jnp.full((rows, age, decoder.drafter.size - 1), UNKNOWN, jnp.float32)


@functools.partial(
    jax.jit,
    static_argnames=("decoder", "schedule"),
    donate_argnames=("batch", "habit"),
)
def decode_rows(
    decoder: Decoder,
    params: Params,
    batch: Batch,
    habit: Habit,
    staircase: Staircase,
    rounds: jax.Array,
    *,
    schedule: Schedule,
) -> tuple[Batch, Habit]:
    """Runs up to `rounds` (a scalar) rounds; stops early when a row finishes and can leave."""
    before = batch.state.done
    step = adaptive_round if isinstance(schedule, Adaptive) else fixed_round

    def unfinished(carry):
        i, batch, _ = carry
        done = batch.state.done
        return (i < rounds) & ~jnp.all(done) & ~jnp.any(done & ~before)

    def one(carry):
        i, batch, habit = carry
        return i + 1, *step(decoder, params, batch, habit, staircase, schedule)

    return jax.lax.while_loop(unfinished, one, (jnp.int32(0), batch, habit))[1:]


def fixed_round(decoder, params, batch, habit, staircase, schedule):
    """A round in which every row verifies its own budget."""
    batch, draft = draft_of(decoder, params, batch)
    return whole_round(decoder, params, batch, habit, draft, staircase.sizes)


def adaptive_round(decoder, params, batch, habit, staircase, schedule):
    """A round with one budget for all rows."""
    drafts = functools.partial(draft_of, decoder, params)
    size, pays = size_of_round(batch, habit, staircase, schedule)
    return sized_round(decoder, params, batch, habit, drafts, staircase, size, pays)


def draft_of(decoder: Decoder, params: Params, batch: Batch) -> tuple[Batch, Draft]:
    """The drafter's proposal."""
    draft, state = propose(decoder, params, batch.state, batch.sampling)
    return dataclasses.replace(batch, state=state), draft


def whole_round(decoder, params, batch, habit, draft, sizes) -> tuple[Batch, Habit]:
    """A round that verifies all of a draft."""
    size = smallest(sizes, draft.tree, batch.state.done)
    return finish_round(decoder, params, batch, draft, sizes, size), counted(habit, size)


def sized_round(
    decoder, params, batch, habit, drafts, staircase, size, pays, allowed=None
) -> tuple[Batch, Habit]:
    """A round of a chosen size: plain decoding for the first size, else with a draft.

    Args:
      drafts: a function that returns the batch after drafting, and its draft.
      size, pays: from `size_of_round`.
      allowed: tokens allowed after the roots in a plain round, as `Draft.allowed`.
    """

    def plain(carry):
        return plain_round(decoder, params, *carry, allowed)

    def judged(carry):
        batch, habit = carry
        batch, draft = drafts(batch)
        return judged_round(decoder, params, batch, habit, draft, staircase, size, pays)

    carry = run_if(size == 0, plain, (batch, counted(habit, size)))
    return run_if(size > 0, judged, carry) if len(staircase.sizes) > 1 else carry


def size_of_round(batch, habit, staircase, schedule) -> tuple[jax.Array, jax.Array]:
    """The size of a round, and whether its draft is expected to pay."""
    kind = kind_of(batch)
    young = batch.state.rounds <= schedule.probe
    pays = choose_size(batch.survivals[:, -1], habit, kind, staircase)
    probed = probe(habit, schedule.probe, kind, young, staircase)
    return jnp.where(pays == 0, probed, pays), pays > 0


def kind_of(batch: Batch) -> jax.Array:
    """The kind of every row, [B] int32; `KINDS`, which is no kind, for finished rows."""
    hotter = batch.sampling.temperature[:, None] > jnp.array(TEMPERATURES)
    return jnp.where(batch.state.done, KINDS, hotter.sum(axis=1, dtype=jnp.int32))


def run_if(condition: jax.Array, step, carry):
    """step(carry) if the condition holds, in place; `lax.cond` would copy the carry."""
    once = lambda carry: (jnp.bool(False), step(carry[1]))  # noqa: E731
    return jax.lax.while_loop(lambda carry: carry[0], once, (condition, carry))[1]


def plain_round(decoder, params, batch, habit, allowed=None):
    """A round of plain decoding, whose choices use separate noise (`round_keys`).

    Args: allowed: tokens allowed after the roots, as `Draft.allowed`.
    """
    kind = kind_of(batch)
    draft = Draft(root_only(batch.state.anchor), allowed=allowed)
    sizes = (VerifySize(draft.tree.tokens.size, 1),)
    batch = finish_round(decoder, params, batch, draft, sizes, 0)
    unknown = jnp.full_like(batch.survivals[:, 0], UNKNOWN)
    batch = dataclasses.replace(batch, survivals=push(batch.survivals, unknown))
    return batch, rested(habit, kind)


def judged_round(decoder, params, batch, habit, draft, staircase, size, chosen):
    """A round with drafted trees.

    Args: size, chosen: index into `staircase`, at least 1; and whether the draft was expected
      to pay.
    """
    kind, before = kind_of(batch), batch.state.length
    fresh = foresee(draft.tree, habit, kind)
    draft = cut(draft, keep(fresh, kind < KINDS, size, staircase))
    batch = finish_round(decoder, params, batch, draft, staircase.sizes[1:], size - 1)
    accepted = batch.state.length - before - 1
    old = batch.survivals[:, -1]
    habit = learn(habit, draft.tree, fresh, old, accepted, kind, chosen)
    return dataclasses.replace(batch, survivals=push(batch.survivals, fresh)), habit


def push(survivals: jax.Array, newest: jax.Array) -> jax.Array:
    """`Batch.survivals` with those of a new round, [B, N - 1], in front."""
    return jnp.concatenate([newest[:, None], survivals[:, :-1]], axis=1)


def size_of_trees(
    tree: DraftTree, habit: Habit, batch: Batch, staircase: Staircase
) -> jax.Array:
    """The size of a round whose trees are there, an index into `staircase`."""
    kind = kind_of(batch)
    running = kind < KINDS
    fresh = jnp.where(running[:, None], foresee(tree, habit, kind), 0.0)
    return best_size(fresh, running.sum(), staircase)


def keep(
    fresh: jax.Array, running: jax.Array, size: jax.Array, staircase: Staircase
) -> jax.Array:
    """Number of drafted nodes of each row [B] that a round of this size verifies."""
    return admit(
        jnp.where(running[:, None], fresh, 0.0),
        staircase.totals[size] - running.sum(),
        staircase.per_row[size] - 1,
    )


def finish_round(decoder, params, batch, draft, sizes, size):
    verdict = judge(decoder, params, batch.state, batch.sampling, draft, sizes, size)
    state = commit(decoder, params, batch.state, batch.sampling, verdict)
    return dataclasses.replace(batch, state=state)


def cut(draft: Draft, kept: jax.Array) -> Draft:
    """The first `kept` [B] drafted nodes of every row."""
    tree, drawn = draft.tree, draft.drawn
    valid = tree.valid & (jnp.arange(tree.size) <= kept[:, None])
    tree = dataclasses.replace(
        tree, valid=valid, parents=jnp.where(valid, tree.parents, NO_PARENT)
    )
    if drawn is not None:
        drawn = dataclasses.replace(drawn, lengths=jnp.minimum(drawn.lengths, kept))
    return dataclasses.replace(draft, tree=tree, drawn=drawn)
