"""Rounds of many requests under one budget: which nodes are verified is decided on the device.

An adaptive round first chooses its size from survivals of earlier rounds, so it knows before
drafting whether drafting pays at all. It then ranks the fresh nodes of all rows and verifies
the best that the size has room for. Both steps are lossless for drawn chains as well as for
trees (`decoding.budget`): the size does not depend on the draft it cuts.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxspec.decoding.budget import StepTimes, admit, best_size, survival
from jaxspec.decoding.fitting import VerifySize, smallest
from jaxspec.decoding.round import commit, judge, propose
from jaxspec.decoding.sampling import SamplingRows
from jaxspec.decoding.state import Decoder, DecodeState, Draft, Params
from jaxspec.trees.tree import NO_PARENT, DraftTree, root_only

UNKNOWN = -1.0
MAX_SIZES = 16
MEMORY = 0.98  # per drafting round, of how well survivals foretold acceptance
PATIENCE = 4  # times that the wait for the next probe doubles
PRIOR = 8.0  # accepted nodes, as many as foretold


@dataclasses.dataclass(frozen=True)
class Fixed:
    """Every row verifies its own budget of nodes (`DecodeState.budget`), whatever the load."""

    age: int = 1


@dataclasses.dataclass(frozen=True)
class Adaptive:
    """The nodes of all rows compete for the size with the most expected tokens per second.

    Attributes:
      age: rounds that lie between a draft and the choice of size it informs, at least 1.
      probe: rounds without a draft after which one is drafted to see whether it pays again;
        after each that says no, twice as many, `PATIENCE` times at most.
    """

    age: int = 2
    probe: int = 16

    def __post_init__(self):
        for name in ("age", "probe"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"Adaptive.{name} is {getattr(self, name)}; expected at least 1"
                    + (": the current draft must not choose its own size" * (name == "age"))
                )


Schedule = Fixed | Adaptive


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows between two rounds; every leaf has the rows in front.

    Attributes:
      survivals: [B, age, N - 1] float32, of the row's last drafts, newest first; `UNKNOWN`
        where there was none.
    """

    state: DecodeState
    sampling: SamplingRows
    survivals: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Habit:
    """What past rounds of all requests taught the schedule.

    Attributes:
      usual: [N - 1] float32, mean survivals: what a row without a past is expected to have.
      foretold, happened: [P] float32, verified nodes of each depth: the sum of their survival
        probabilities, and how many were accepted. Their ratio corrects what drafters that are
        not calibrated believe.
      varied, lasted: float32, by how much drafts' survivals differed from the usual ones,
        squared, and how much of that the same row's drafts still shared when they informed a
        choice: their ratio says what an old survival tells.
      idle: int32, rounds since the last draft.
      probes: int32, drafts in a row that no size was chosen for.
      rounds: [MAX_SIZES] int32, rounds of every size so far.
    """

    usual: jax.Array
    foretold: jax.Array
    happened: jax.Array
    varied: jax.Array
    lasted: jax.Array
    idle: jax.Array
    probes: jax.Array
    rounds: jax.Array


def init_habit(size: int, depth: int) -> Habit:
    """Before the first round: every draft is expected to be accepted."""
    return Habit(
        usual=jnp.ones(size - 1, jnp.float32),
        foretold=jnp.zeros(depth, jnp.float32),
        happened=jnp.zeros(depth, jnp.float32),
        varied=jnp.float32(1),
        lasted=jnp.float32(1),
        idle=jnp.int32(0),
        probes=jnp.int32(0),
        rounds=jnp.zeros(MAX_SIZES, jnp.int32),
    )


@functools.partial(
    jax.jit,
    static_argnames=("decoder", "schedule", "sizes"),
    donate_argnames=("batch", "habit"),
)
def decode_rows(
    decoder: Decoder,
    params: Params,
    batch: Batch,
    habit: Habit,
    times: StepTimes,
    rounds: jax.Array,
    *,
    schedule: Schedule,
    sizes: tuple[VerifySize, ...],
) -> tuple[Batch, Habit]:
    """Up to `rounds` (a scalar) rounds; fewer when a row becomes done, so that it can leave.

    Args:
      times: of `sizes`.
    """
    before = batch.state.done
    step = adaptive_round if isinstance(schedule, Adaptive) else fixed_round

    def unfinished(carry):
        i, batch, _ = carry
        done = batch.state.done
        return (i < rounds) & ~jnp.all(done) & ~jnp.any(done & ~before)

    def one(carry):
        i, batch, habit = carry
        return i + 1, *step(decoder, params, batch, habit, times, schedule, sizes)

    return jax.lax.while_loop(unfinished, one, (jnp.int32(0), batch, habit))[1:]


def fixed_round(decoder, params, batch, habit, times, schedule, sizes):
    """Every row's own budget."""
    draft, state = propose(decoder, params, batch.state, batch.sampling)
    size = smallest(sizes, draft.tree, state.done)
    batch = dataclasses.replace(batch, state=state)
    return _finish(decoder, params, batch, habit, draft, sizes, size)


def adaptive_round(decoder, params, batch, habit, times, schedule, sizes):
    """One budget for all rows."""
    running = ~batch.state.done
    pays = choose_size(batch.survivals[:, -1], habit, running, times)
    size = jnp.where(pays == 0, probe(habit, schedule), pays)

    def plain(carry):
        return _plain_round(decoder, params, *carry)

    def drafted(carry):
        return _drafted_round(decoder, params, *carry, times, sizes, size, pays > 0)

    carry = _if(size == 0, plain, (batch, habit))
    return _if(size > 0, drafted, carry)


def _if(condition: jax.Array, step, carry):
    """step(carry) if the condition holds, in place; a `cond` would copy what is carried."""
    once = lambda carry: (jnp.bool(False), step(carry[1]))  # noqa: E731
    return jax.lax.while_loop(lambda carry: carry[0], once, (condition, carry))[1]


def _plain_round(decoder, params, batch, habit):
    """Without a draft: plain decoding, whose choices have noise of their own (`round_keys`).

    What is committed has room for one token.
    """
    draft = Draft(root_only(batch.state.anchor))
    sizes = (VerifySize(draft.tree.tokens.size, 1),)
    batch, habit = _finish(decoder, params, batch, habit, draft, sizes, 0)
    unknown = jnp.full_like(batch.survivals[:, 0], UNKNOWN)
    batch = dataclasses.replace(batch, survivals=push(batch.survivals, unknown))
    return batch, dataclasses.replace(habit, idle=habit.idle + 1)


def _drafted_round(decoder, params, batch, habit, times, sizes, size, chosen):
    """Args: size, chosen: index into `sizes`, and whether the draft was expected to pay."""
    running, before = ~batch.state.done, batch.state.length
    draft, state = propose(decoder, params, batch.state, batch.sampling)
    fresh = foresee(draft.tree, habit)
    draft = cut(draft, keep(fresh, running, size, times))
    batch = dataclasses.replace(batch, state=state)
    batch, habit = _finish(decoder, params, batch, habit, draft, sizes, size)
    accepted = batch.state.length - before - 1
    old = batch.survivals[:, -1]
    habit = learn(habit, draft.tree, fresh, old, accepted, running, chosen)
    return dataclasses.replace(batch, survivals=push(batch.survivals, fresh)), habit


def push(survivals: jax.Array, newest: jax.Array) -> jax.Array:
    """`Batch.survivals` after a round, whose own are [B, N - 1]."""
    return jnp.concatenate([newest[:, None], survivals[:, :-1]], axis=1)


def choose_size(
    old: jax.Array, habit: Habit, running: jax.Array, times: StepTimes
) -> jax.Array:
    """The size of a round that is not drafted yet, an index into `times`.

    Args:
      old: [B, N - 1], survivals of the rows' drafts as many rounds ago as their age.
      running: [B] bool.
    """
    expected = habit.usual + habit.lasted / habit.varied * (old - habit.usual)
    expected = jnp.where(old == UNKNOWN, habit.usual, jnp.clip(expected, 0.0, 1.0))
    return best_size(jnp.where(running[:, None], expected, 0.0), running.sum(), times)


def probe(habit: Habit, schedule: Adaptive) -> jax.Array:
    """The size of a round whose draft is not expected to pay: 0, or now and then 1."""
    patience = schedule.probe << jnp.minimum(habit.probes, PATIENCE)
    return (habit.idle >= patience).astype(jnp.int32)


def foresee(tree: DraftTree, habit: Habit) -> jax.Array:
    """Survivals of a fresh draft [B, N - 1], corrected by what became of such nodes before."""
    trust = (habit.happened + PRIOR) / (habit.foretold + PRIOR)
    found = survival(tree) * trust[jnp.maximum(tree.depths[:, 1:] - 1, 0)]
    return jax.lax.cummin(jnp.minimum(found, 1.0), axis=1)


def keep(fresh: jax.Array, running: jax.Array, size: jax.Array, times: StepTimes) -> jax.Array:
    """Drafted nodes of each row [B] that a round of this size verifies."""
    return admit(
        jnp.where(running[:, None], fresh, 0.0),
        times.totals[size] - running.sum(),
        times.per_row[size] - 1,
    )


def learn(
    habit: Habit,
    tree: DraftTree,
    fresh: jax.Array,
    old: jax.Array,
    accepted: jax.Array,
    running: jax.Array,
    chosen: jax.Array,
) -> Habit:
    """After a round that drafted.

    Args:
      tree: what of the draft was verified.
      fresh: [B, N - 1], `foresee` of the whole draft.
      old: [B, N - 1], what `choose_size` saw instead.
      accepted: [B] int32, drafted tokens that were decided.
      chosen: bool, whether the draft was expected to pay.
    """
    depth = jnp.arange(1, habit.foretold.shape[0] + 1)
    at_depth = tree.depths[:, 1:, None] == depth  # [B, N - 1, P]
    verified = tree.valid[:, 1:] & running[:, None]
    believed = jnp.where(verified, survival(tree), 0.0)[..., None] * at_depth
    happened = (accepted[:, None] >= depth) & running[:, None]
    mean = jnp.where(running[:, None], fresh, 0.0).sum(0) / jnp.maximum(running.sum(), 1)
    known = running[:, None] & (old != UNKNOWN)
    unlike = jnp.where(known, old - habit.usual, 0.0)
    return dataclasses.replace(
        habit,
        varied=MEMORY * habit.varied + jnp.sum(unlike**2),
        lasted=MEMORY * habit.lasted + jnp.sum(unlike * (fresh - habit.usual)),
        usual=0.9 * habit.usual + 0.1 * mean,
        foretold=MEMORY * habit.foretold + believed.sum((0, 1)),
        happened=MEMORY * habit.happened + happened.sum(0),
        idle=jnp.int32(0),
        probes=jnp.where(chosen, 0, habit.probes + 1),
    )


def _finish(decoder, params, batch, habit, draft, sizes, size):
    verdict = judge(decoder, params, batch.state, batch.sampling, draft, sizes, size)
    state = commit(decoder, params, batch.state, batch.sampling, verdict)
    rounds = habit.rounds.at[size].add(1)
    return dataclasses.replace(batch, state=state), dataclasses.replace(habit, rounds=rounds)


def cut(draft: Draft, kept: jax.Array) -> Draft:
    """The first `kept` [B] drafted nodes of every row."""
    tree, drawn = draft.tree, draft.drawn
    valid = tree.valid & (jnp.arange(tree.size) <= kept[:, None])
    tree = dataclasses.replace(
        tree, valid=valid, parents=jnp.where(valid, tree.parents, NO_PARENT)
    )
    if drawn is not None:
        drawn = dataclasses.replace(drawn, lengths=jnp.minimum(drawn.lengths, kept))
    return Draft(tree, drawn)
