"""Rounds of many requests under one budget; the device chooses the nodes to verify.

An adaptive round first chooses its size from survivals of earlier rounds, and so knows before
drafting whether drafting pays. It then ranks the new nodes of all rows and verifies the best
that the size holds. Both steps are lossless for sampled chains as well as for trees
(`decoding.budget`): the size does not depend on the draft it cuts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxspec.arguments import at_least, check_field
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
    before, shared = batch.state.done, Rounds(decoder, params, staircase, schedule)

    def unfinished(carry):
        i, batch, _ = carry
        done = batch.state.done
        return (i < rounds) & ~jnp.all(done) & ~jnp.any(done & ~before)

    def one(carry):
        i, batch, habit = carry
        return i + 1, *shared.step(batch, habit)

    return jax.lax.while_loop(unfinished, one, (jnp.int32(0), batch, habit))[1:]


@dataclasses.dataclass(frozen=True)
class Rounds:
    """A round and its parts, with what all rounds share; used inside jitted functions."""

    decoder: Decoder
    params: Params
    staircase: Staircase
    schedule: Schedule

    def step(self, batch: Batch, habit: Habit) -> tuple[Batch, Habit]:
        """A round: of every row's own budget, or, adaptive, of one budget for all rows."""
        if isinstance(self.schedule, Fixed):
            return self.whole(*self.draft(batch), habit)
        size, pays = self.size(batch, habit)
        return self.sized(batch, habit, self.draft, size, pays)

    def size(self, batch: Batch, habit: Habit) -> tuple[jax.Array, jax.Array]:
        """The size of an adaptive round, an index into `staircase`, before its draft is there;
        and whether this draft is expected to pay."""
        kind = kind_of(batch)
        young = batch.state.rounds <= self.schedule.probe
        size = choose_size(batch.survivals[:, -1], habit, kind, self.staircase)
        probed = probe(habit, self.schedule.probe, kind, young, self.staircase)
        return jnp.where(size == 0, probed, size), size > 0

    def size_of(self, tree: DraftTree, batch: Batch, habit: Habit) -> jax.Array:
        """The size of a round whose trees are there."""
        kind = kind_of(batch)
        running = kind < KINDS
        fresh = jnp.where(running[:, None], foresee(tree, habit, kind), 0.0)
        return best_size(fresh, running.sum(), self.staircase)

    def draft(self, batch: Batch) -> tuple[Batch, Draft]:
        """The drafter's proposal."""
        draft, state = propose(self.decoder, self.params, batch.state, batch.sampling)
        return dataclasses.replace(batch, state=state), draft

    def whole(self, batch: Batch, draft: Draft, habit: Habit) -> tuple[Batch, Habit]:
        """The rest of a round that verifies all of a draft."""
        sizes = self.staircase.sizes
        size = smallest(sizes, draft.tree, batch.state.done)
        return self._finish(batch, draft, sizes, size), counted(habit, size)

    def sized(
        self,
        batch: Batch,
        habit: Habit,
        draft: Callable[[Batch], tuple[Batch, Draft]],
        size: jax.Array,
        pays: jax.Array,
        allowed: jax.Array | None = None,
    ) -> tuple[Batch, Habit]:
        """A round of a chosen size: plain decoding for the first size, else with a draft.

        Args:
          draft: the batch after drafting, and its draft.
          size, pays: see `size`.
          allowed: tokens allowed after the roots in a plain round, as `Draft.allowed`.
        """
        carry = run_if(
            size == 0,
            lambda carry: self.plain(*carry, allowed),
            (batch, counted(habit, size)),
        )
        if len(self.staircase.sizes) == 1:
            return carry

        def drafted(carry):
            batch, habit = carry
            return self.cut_to_size(*draft(batch), habit, size, pays)

        return run_if(size > 0, drafted, carry)

    def plain(
        self, batch: Batch, habit: Habit, allowed: jax.Array | None = None
    ) -> tuple[Batch, Habit]:
        """A round of plain decoding, whose choices use separate noise (`round_keys`)."""
        kind = kind_of(batch)
        draft = Draft(root_only(batch.state.anchor), allowed=allowed)
        batch = self._finish(batch, draft, (VerifySize(draft.tree.tokens.size, 1),), 0)
        unknown = jnp.full_like(batch.survivals[:, 0], UNKNOWN)
        batch = dataclasses.replace(batch, survivals=push(batch.survivals, unknown))
        return batch, rested(habit, kind)

    def cut_to_size(
        self, batch: Batch, draft: Draft, habit: Habit, size: jax.Array, pays: jax.Array
    ) -> tuple[Batch, Habit]:
        """The rest of a round that verifies as many of the best nodes as a size holds.

        Args: size, pays: see `size`; here the size is at least 1.
        """
        kind, before = kind_of(batch), batch.state.length
        fresh = foresee(draft.tree, habit, kind)
        draft = cut(draft, keep(fresh, kind < KINDS, size, self.staircase))
        batch = self._finish(batch, draft, self.staircase.sizes[1:], size - 1)
        accepted = batch.state.length - before - 1
        old = batch.survivals[:, -1]
        habit = learn(habit, draft.tree, fresh, old, accepted, kind, pays)
        return dataclasses.replace(batch, survivals=push(batch.survivals, fresh)), habit

    def _finish(
        self,
        batch: Batch,
        draft: Draft,
        sizes: tuple[VerifySize, ...],
        size: jax.Array | int,
    ) -> Batch:
        """Verifies with `sizes[size]`, accepts and commits."""
        decoder, params, sampling = self.decoder, self.params, batch.sampling
        verdict = judge(decoder, params, batch.state, sampling, draft, sizes, size)
        return dataclasses.replace(
            batch, state=commit(decoder, params, batch.state, sampling, verdict)
        )


def kind_of(batch: Batch) -> jax.Array:
    """The kind of every row, [B] int32; `KINDS`, which is no kind, for finished rows."""
    hotter = batch.sampling.temperature[:, None] > jnp.array(TEMPERATURES)
    return jnp.where(batch.state.done, KINDS, hotter.sum(axis=1, dtype=jnp.int32))


def run_if(condition: jax.Array, step, carry):
    """step(carry) if the condition holds, in place; `lax.cond` would copy the carry."""
    once = lambda carry: (jnp.bool(False), step(carry[1]))  # noqa: E731
    return jax.lax.while_loop(lambda carry: carry[0], once, (condition, carry))[1]


def push(survivals: jax.Array, newest: jax.Array) -> jax.Array:
    """`Batch.survivals` with those of a new round, [B, N - 1], in front."""
    return jnp.concatenate([newest[:, None], survivals[:, :-1]], axis=1)


def keep(
    fresh: jax.Array, running: jax.Array, size: jax.Array, staircase: Staircase
) -> jax.Array:
    """Number of drafted nodes of each row [B] that a round of this size verifies."""
    return admit(
        jnp.where(running[:, None], fresh, 0.0),
        staircase.totals[size] - running.sum(),
        staircase.per_row[size] - 1,
    )


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
