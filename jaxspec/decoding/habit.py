"""What past rounds tell about the next one: how many nodes are worth verifying.

Survivals are probabilities that the target accepts a whole path. Those of a fresh draft are
corrected by past acceptance (`foresee`); a round's size is chosen before it drafts, from older
ones (`choose_size`), and `learn` keeps the statistics.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxspec.decoding.budget import best_size, survival
from jaxspec.decoding.staircase import Staircase
from jaxspec.trees.tree import DraftTree

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


def choose_size(
    old: jax.Array, habit: Habit, kind: jax.Array, staircase: Staircase
) -> jax.Array:
    """The size of a round before it drafts, an index into `staircase`.

    Args:
      old: [B, N - 1], survivals of the rows' drafts `age` rounds ago.
      kind: [B] int32, see `schedule.kind_of`.
    """
    running, usual = kind < KINDS, habit.usual[kind]
    tells = (habit.lasted / habit.varied)[kind, None]
    expected = jnp.clip(usual + tells * (old - usual), 0.0, 1.0)
    expected = jnp.where(old == UNKNOWN, usual, expected)
    return best_size(jnp.where(running[:, None], expected, 0.0), running.sum(), staircase)


def probe(
    habit: Habit, after: int, kind: jax.Array, young: jax.Array, staircase: Staircase
) -> jax.Array:
    """The size of a round whose draft is not expected to pay: 0, or now and then 1.

    Probes are so rare that their extra time is at most `PROBES` of all time, even if among many
    requests some are always young.

    Args:
      after: `Adaptive.probe`.
      kind: [B] int32, see `schedule.kind_of`.
      young: [B] bool, new rows, for which drafting may pay though it did not for others.
    """
    doublings = jnp.where(young, 0, jnp.minimum(habit.probes[kind], PATIENCE))
    plain = staircase.seconds[0]
    drafted = staircase.seconds[min(1, len(staircase.sizes) - 1)]
    afforded = (drafted / plain - 1) / PROBES
    waited = habit.idle[kind] >= jnp.maximum(after << doublings, afforded)
    return jnp.any(waited & (kind < KINDS)).astype(jnp.int32)


def foresee(tree: DraftTree, habit: Habit, kind: jax.Array) -> jax.Array:
    """Survivals of a fresh draft [B, N - 1], corrected by past acceptance at each depth."""
    trust = ((habit.happened + PRIOR) / (habit.foretold + PRIOR))[kind]  # [B, P]
    depth = jnp.maximum(tree.depths[:, 1:] - 1, 0)
    corrected = survival(tree) * jnp.take_along_axis(trust, depth, axis=1)
    return jax.lax.cummin(jnp.minimum(corrected, 1.0), axis=1)


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
      kind: [B] int32, see `schedule.kind_of`.
      chosen: bool, whether the draft was expected to pay.
    """
    depth = jnp.arange(1, habit.foretold.shape[1] + 1)
    at_depth = tree.depths[:, 1:, None] == depth  # [B, N - 1, P]
    believed = jnp.where(tree.valid[:, 1:], survival(tree), 0.0)[..., None] * at_depth
    usual = habit.usual[kind]
    unlike = jnp.where(old == UNKNOWN, 0.0, old - usual)

    of_kind = kind[:, None] == jnp.arange(KINDS)  # [B, K]
    count = of_kind.sum(axis=0)

    def by_kind(x):  # [B, ...] -> [K, ...]
        rows = of_kind.reshape(*of_kind.shape, *[1] * (x.ndim - 1))
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
