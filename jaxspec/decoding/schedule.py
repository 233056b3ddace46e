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
from jaxspec.decoding.budget import StepTimes, admit, best_size, survival
from jaxspec.decoding.fitting import VerifySize, smallest
from jaxspec.decoding.round import commit, judge, propose
from jaxspec.decoding.sampling import SamplingRows
from jaxspec.decoding.state import Decoder, DecodeState, Draft, Params
from jaxspec.trees.tree import NO_PARENT, DraftTree, root_only

UNKNOWN = -1.0
MAX_SIZES = 16
MEMORY = 0.98  # decay per drafting round of the statistics of past rounds
PATIENCE = 4  # most doublings of the wait for the next probe
PROBES = 0.01  # most extra time that probes may cost, as a share of plain rounds' time
PRIOR = 8.0  # pseudo-count of accepted nodes, and of foretold ones
# A request's kind is the number of these below its temperature: acceptance of sampled requests
# does not predict that of greedy ones.
TEMPERATURES = (0.0, 0.4, 0.8)
KINDS = len(TEMPERATURES) + 1


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
        number doubles after each probe that does not pay, at most `PATIENCE` times, except for
        requests younger than `probe` rounds. It is larger where drafts are slow (`PROBES`).
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Habit:
    """Statistics of past rounds, by kind of request (K kinds).

    Attributes:
      usual: [K, N - 1] float32, mean survivals, the estimate for rows without a past draft.
      foretold, happened: [K, P] float32, over verified nodes of each depth: the sum of their
        survival probabilities, and the number accepted. Their ratio corrects drafters that are
        not calibrated.
      varied, lasted: [K] float32, variance of drafts' survivals around the usual ones, and
        their covariance with the survivals of the draft `age` rounds later: the ratio weighs an
        old draft's survivals against the usual ones.
      idle: [K] int32, rounds since the last draft.
      probes: [K] int32, consecutive probes that did not pay.
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
    """Statistics before the first round: every draft is expected to be accepted."""
    return Habit(
        usual=jnp.ones((KINDS, size - 1), jnp.float32),
        foretold=jnp.zeros((KINDS, depth), jnp.float32),
        happened=jnp.zeros((KINDS, depth), jnp.float32),
        varied=jnp.ones(KINDS, jnp.float32),
        lasted=jnp.ones(KINDS, jnp.float32),
        idle=jnp.zeros(KINDS, jnp.int32),
        probes=jnp.zeros(KINDS, jnp.int32),
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
    """Runs up to `rounds` (a scalar) rounds; stops early when a row finishes, so it can leave.

    Args:
      times: step times of `sizes`.
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
    """A round in which every row verifies its own budget."""
    batch, draft = draft_of(decoder, params, batch)
    return whole_round(decoder, params, batch, habit, draft, sizes)


def adaptive_round(decoder, params, batch, habit, times, schedule, sizes):
    """A round with one budget for all rows."""
    drafts = functools.partial(draft_of, decoder, params)
    size, pays = size_of_round(batch, habit, times, schedule)
    return sized_round(decoder, params, batch, habit, drafts, times, sizes, size, pays)


def draft_of(decoder: Decoder, params: Params, batch: Batch) -> tuple[Batch, Draft]:
    """The drafter's proposal."""
    draft, state = propose(decoder, params, batch.state, batch.sampling)
    return dataclasses.replace(batch, state=state), draft


def whole_round(decoder, params, batch, habit, draft, sizes) -> tuple[Batch, Habit]:
    """A round that verifies all of a draft."""
    size = smallest(sizes, draft.tree, batch.state.done)
    return finish_round(decoder, params, batch, draft, sizes, size), counted(habit, size)


def sized_round(
    decoder, params, batch, habit, drafts, times, sizes, size, pays, allowed=None
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
        return judged_round(decoder, params, batch, habit, draft, times, sizes, size, pays)

    carry = run_if(size == 0, plain, (batch, counted(habit, size)))
    return run_if(size > 0, judged, carry) if len(sizes) > 1 else carry


def size_of_round(batch, habit, times, schedule) -> tuple[jax.Array, jax.Array]:
    """The size of a round, and whether its draft is expected to pay."""
    kind = kind_of(batch)
    young = batch.state.rounds <= schedule.probe
    pays = choose_size(batch.survivals[:, -1], habit, kind, times)
    found = jnp.where(pays == 0, probe(habit, schedule, kind, young, times), pays)
    return found, pays > 0


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


def judged_round(decoder, params, batch, habit, draft, times, sizes, size, chosen):
    """A round with drafted trees.

    Args: size, chosen: index into `sizes`, at least 1; and whether the draft was expected to
      pay.
    """
    kind, before = kind_of(batch), batch.state.length
    fresh = foresee(draft.tree, habit, kind)
    draft = cut(draft, keep(fresh, kind < KINDS, size, times))
    batch = finish_round(decoder, params, batch, draft, sizes[1:], size - 1)
    accepted = batch.state.length - before - 1
    old = batch.survivals[:, -1]
    habit = learn(habit, draft.tree, fresh, old, accepted, kind, chosen)
    return dataclasses.replace(batch, survivals=push(batch.survivals, fresh)), habit


def push(survivals: jax.Array, newest: jax.Array) -> jax.Array:
    """`Batch.survivals` with those of a new round, [B, N - 1], in front."""
    return jnp.concatenate([newest[:, None], survivals[:, :-1]], axis=1)


def choose_size(old: jax.Array, habit: Habit, kind: jax.Array, times: StepTimes) -> jax.Array:
    """The size of a round before it drafts, an index into `times`.

    Args:
      old: [B, N - 1], survivals of the rows' drafts `age` rounds ago.
      kind: [B] int32, see `kind_of`.
    """
    running, usual = kind < KINDS, habit.usual[kind]
    tells = (habit.lasted / habit.varied)[kind, None]
    expected = jnp.clip(usual + tells * (old - usual), 0.0, 1.0)
    expected = jnp.where(old == UNKNOWN, usual, expected)
    return best_size(jnp.where(running[:, None], expected, 0.0), running.sum(), times)


def size_of_trees(tree: DraftTree, habit: Habit, batch: Batch, times: StepTimes) -> jax.Array:
    """The size of a round whose trees are there, an index into `times`."""
    kind = kind_of(batch)
    running = kind < KINDS
    fresh = jnp.where(running[:, None], foresee(tree, habit, kind), 0.0)
    return best_size(fresh, running.sum(), times)


def probe(
    habit: Habit, schedule: Adaptive, kind: jax.Array, young: jax.Array, times: StepTimes
) -> jax.Array:
    """The size of a round whose draft is not expected to pay: 0, or now and then 1.

    Probes are so rare that their extra time is at most `PROBES` of all time, even if among many
    requests some are always young.

    Args:
      kind: [B] int32, see `kind_of`.
      young: [B] bool, new rows, for which drafting may pay though it did not for others.
    """
    doublings = jnp.where(young, 0, jnp.minimum(habit.probes[kind], PATIENCE))
    plain, drafted = times.seconds[0], times.seconds[min(1, times.seconds.shape[0] - 1)]
    afforded = (drafted / plain - 1) / PROBES
    waited = habit.idle[kind] >= jnp.maximum(schedule.probe << doublings, afforded)
    return jnp.any(waited & (kind < KINDS)).astype(jnp.int32)


def foresee(tree: DraftTree, habit: Habit, kind: jax.Array) -> jax.Array:
    """Survivals of a fresh draft [B, N - 1], corrected by past acceptance at each depth."""
    trust = ((habit.happened + PRIOR) / (habit.foretold + PRIOR))[kind]  # [B, P]
    depth = jnp.maximum(tree.depths[:, 1:] - 1, 0)
    found = survival(tree) * jnp.take_along_axis(trust, depth, axis=1)
    return jax.lax.cummin(jnp.minimum(found, 1.0), axis=1)


def keep(fresh: jax.Array, running: jax.Array, size: jax.Array, times: StepTimes) -> jax.Array:
    """Number of drafted nodes of each row [B] that a round of this size verifies."""
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
    kind: jax.Array,
    chosen: jax.Array,
) -> Habit:
    """The habit after a round that drafted.

    Args:
      tree: the verified part of the draft.
      fresh: [B, N - 1], `foresee` of the whole draft.
      old: [B, N - 1], the older survivals that `choose_size` used.
      accepted: [B] int32, number of drafted tokens accepted.
      kind: [B] int32, see `kind_of`.
      chosen: bool, whether the draft was expected to pay.
    """
    depth = jnp.arange(1, habit.foretold.shape[1] + 1)
    at_depth = tree.depths[:, 1:, None] == depth  # [B, N - 1, P]
    believed = jnp.where(tree.valid[:, 1:], survival(tree), 0.0)[..., None] * at_depth
    usual = habit.usual[kind]
    unlike = jnp.where(old == UNKNOWN, 0.0, old - usual)

    own = kind[:, None] == jnp.arange(KINDS)  # [B, K]
    count = own.sum(axis=0)

    def by_kind(x):  # [B, ...] -> [K, ...]
        rows = own.reshape(*own.shape, *[1] * (x.ndim - 1))
        return jnp.sum(jnp.where(rows, x[:, None], 0), axis=0)

    def after(old, new):  # for kinds that took part
        return jnp.where((count > 0).reshape(-1, *[1] * (old.ndim - 1)), new, old)

    mean = by_kind(fresh) / jnp.maximum(count, 1)[:, None]
    sums = dict(
        varied=by_kind(jnp.sum(unlike**2, axis=1)),
        lasted=by_kind(jnp.sum(unlike * (fresh - usual), axis=1)),
        foretold=by_kind(believed.sum(axis=1)),
        happened=by_kind((accepted[:, None] >= depth).astype(jnp.float32)),
    )
    sums = {name: MEMORY * getattr(habit, name) + more for name, more in sums.items()}
    return dataclasses.replace(
        habit,
        usual=after(habit.usual, 0.9 * habit.usual + 0.1 * mean),
        **{name: after(getattr(habit, name), new) for name, new in sums.items()},
        idle=after(habit.idle, 0),
        probes=after(habit.probes, jnp.where(chosen, 0, habit.probes + 1)),
    )


def rested(habit: Habit, kind: jax.Array) -> Habit:
    """The habit after a round without a draft, whose rows [B] have these kinds."""
    took_part = jnp.any(kind[:, None] == jnp.arange(KINDS), axis=0)
    return dataclasses.replace(habit, idle=habit.idle + took_part)


def counted(habit: Habit, size: jax.Array) -> Habit:
    """The habit after one more round of this size."""
    return dataclasses.replace(habit, rounds=habit.rounds.at[size].add(1))


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
