"""Schedulers of verification: literal cases, and their exact laws by enumeration.

Two requests, two tokens, depth 3: every pair of drafts, every acceptance, in float64. A rule
is lossless iff the joint law of what both requests emit is the product of the target's laws.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.decoding import budget, schedule
from jaxspec.decoding.budget import survival
from jaxspec.decoding.habit import KINDS, UNKNOWN, choose_size, foresee, init_habit
from jaxspec.decoding.round import accept_matches
from jaxspec.decoding.staircase import Staircase, VerifySize
from jaxspec.decoding.state import Draft
from jaxspec.drafters.confidence import confident_prefix, surviving_prefix
from jaxspec.trees.tree import DraftTree, ancestors, chain

admit = jax.jit(budget.admit)
best_size = jax.jit(budget.best_size)

DEPTH = 3
EXACT = 1e-12
SEEDS = (0, 3, 5, 7, 26, 34, 36, 37, 38, 40, 51, 55)  # of systems; some bias a bad rule
DRAFTS = list(itertools.product((0, 1), repeat=DEPTH))
PAIRS = list(itertools.product(DRAFTS, repeat=2))
PREFIXES = [p for n in range(DEPTH + 1) for p in itertools.product((0, 1), repeat=n)]


def staircase(totals, seconds, per_row=None):
    per_row = [1] + [9] * (len(totals) - 1) if per_row is None else per_row
    return Staircase.of(map(VerifySize, totals, per_row), seconds)


class System:
    """Two requests with random laws; confidences that know the tokens before their slot."""

    def __init__(self, seed: int, token_aware: bool = True):
        random = np.random.default_rng(seed)
        self.p, self.q = ([self._laws(random) for _ in range(2)] for _ in range(2))
        # Sure or doubtful, as the tokens before a slot would have it; never equal.
        self.confidence = [
            {x: random.choice([0.2, 0.9]) + random.uniform(0, 0.1) for x in PREFIXES}
            for _ in range(2)
        ]
        if not token_aware:  # a confidence that knows its depth alone
            for table in self.confidence:
                for prefix in table:
                    table[prefix] = table[(0,) * len(prefix)]
        # Tokens per second are jagged: a node may pay after one that does not.
        steps = np.cumsum(random.choice([0.02, 0.2, 0.4], size=2 * DEPTH + 1)) + 1
        self.staircase = staircase(range(2, 3 + 2 * DEPTH), steps, [9] * (2 * DEPTH + 1))

    @staticmethod
    def _laws(random):
        chance = random.uniform(0.05, 0.95, len(PREFIXES))
        return {x: np.array([c, 1 - c]) for x, c in zip(PREFIXES, chance, strict=True)}

    def survivals(self) -> jax.Array:
        """[64, 2, P]: of both requests, for every pair of drafts."""

        def row(table, draft):
            return np.cumprod([table[draft[:i]] for i in range(DEPTH)])

        return jnp.array(
            [[row(self.confidence[r], pair[r]) for r in range(2)] for pair in PAIRS]
        )

    def bias(self, lengths) -> float:
        """Largest difference of the emitted joint law from the target's; lengths [64, 2]."""
        joint = np.zeros((2 ** (DEPTH + 1),) * 2)
        for pair, (first, second) in zip(PAIRS, np.asarray(lengths), strict=True):
            joint += np.outer(
                self._emitted(0, pair[0], first), self._emitted(1, pair[1], second)
            )
        truth = np.outer(self._plain(0), self._plain(1))
        return float(np.abs(joint - truth).max())

    def _plain(self, r, prefix=()):
        """The target's law of the DEPTH + 1 tokens from a prefix on, given it."""
        if len(prefix) == DEPTH + 1:
            return np.ones(1)
        law = self.p[r][prefix]
        return np.concatenate([law[t] * self._plain(r, (*prefix, t)) for t in (0, 1)])

    def _emitted(self, r, draft, length):
        """Law of the first DEPTH + 1 tokens, times the chance of this draft: [16]."""
        p, q = self.p[r], self.q[r]
        result = np.zeros(2 ** (DEPTH + 1))
        mass = np.prod([q[draft[:i]][draft[i]] for i in range(DEPTH)])
        for i in range(length + 1):
            prefix = draft[:i]
            accept, rest = 0.0, p[prefix]
            if i < length:
                accept = min(1.0, p[prefix][draft[i]] / q[prefix][draft[i]])
                rest = np.maximum(p[prefix] - q[prefix], 0.0)
                rest = rest / rest.sum() if rest.sum() > 0 else p[prefix]
            for token in (0, 1):
                decided = (*prefix, token)
                size = 2 ** (DEPTH + 1 - len(decided))
                start = size * int("".join(map(str, decided)), 2)
                law = self._plain(r, decided)
                result[start : start + size] += mass * (1 - accept) * rest[token] * law
            mass *= accept
        return result


@jax.jit
def by_budget(survivals, nodes, per_row):
    return jax.vmap(lambda s: admit(s, nodes, per_row))(survivals)


@jax.jit
def by_current_best(survivals, staircase):
    """The biased rule: the budget that is best for the very draft it admits."""

    def one(s):
        size = best_size(s, 2, staircase)
        return admit(s, staircase.totals[size] - 2, staircase.per_row[size] - 1)

    return jax.vmap(one)(survivals)


@jax.jit
def by_older_best(survivals, older, staircase):
    size = best_size(older, 2, staircase)
    nodes, per_row = staircase.totals[size] - 2, staircase.per_row[size] - 1
    return jax.vmap(lambda s: admit(s, nodes, per_row))(survivals)


@jax.jit
def by_engine(survivals, older, staircase):
    """What an adaptive round does with drawn chains: its own steps, in its own order."""
    habit = dataclasses.replace(
        init_habit(DEPTH + 1, DEPTH),
        usual=jnp.tile(jnp.array([0.7, 0.5, 0.2]), (KINDS, 1)),
        foretold=jnp.tile(jnp.array([20.0, 12.0, 3.0]), (KINDS, 1)),
        happened=jnp.tile(jnp.array([14.0, 12.0, 6.0]), (KINDS, 1)),
        lasted=jnp.full(KINDS, 0.95),
    )
    kind, running = jnp.array([3, 3]), jnp.ones(2, bool)

    def one(s, drafts):
        tree = chain(drafts[:, 0], drafts, jnp.full(2, DEPTH), jnp.log(conditional(s)))
        fresh = foresee(tree, habit, kind)
        past = fresh if older is None else older[:, -1]
        size = choose_size(past, habit, kind, staircase)
        return schedule.keep(fresh, running, size, staircase)

    return jax.vmap(one)(survivals, jnp.array(PAIRS))


def per_row(rule):
    return lambda system: jax.vmap(rule)(system.survivals())


def conditional(s):
    return s / jnp.pad(s[:, :-1], ((0, 0), (1, 0)), constant_values=1.0)


RULES = {
    "fixed": lambda system: np.full((64, 2), 2),
    "threshold per slot": per_row(
        lambda s: confident_prefix(conditional(s), jnp.float32(0.45))
    ),
    "threshold of survival": per_row(
        lambda s: surviving_prefix(conditional(s), jnp.float32(0.2))
    ),
    "ranked under a budget": lambda system: by_budget(system.survivals(), 3, 3),
    "budget of older survivals": lambda system: by_older_best(
        system.survivals(), jnp.array([[0.9, 0.6, 0.5], [0.8, 0.3, 0.1]]), system.staircase
    ),
    # The first request has two drafts behind it, the second one has one.
    "the engine's": lambda system: by_engine(
        system.survivals(),
        jnp.array([[[0.1, 0.1, 0.1], [0.9, 0.8, 0.6]], [[0.2] * 3, [UNKNOWN] * 3]]),
        system.staircase,
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_lossless_by_enumeration(name):
    varied = 0
    for seed in SEEDS:
        system = System(seed)
        lengths = np.asarray(RULES[name](system))
        assert system.bias(lengths) < EXACT
        varied += len({tuple(row) for row in lengths.tolist()}) > 1
    # Only a rule that gives different drafts different lengths is tested by this at all.
    assert varied >= 4 or name == "fixed"


@pytest.mark.parametrize(
    "rule",
    [by_current_best, lambda survivals, stairs: by_engine(survivals, None, stairs)],
)
def test_the_best_budget_of_the_current_draft_is_biased(rule):
    found = [System(seed) for seed in SEEDS]
    bias = [s.bias(rule(s.survivals(), s.staircase)) for s in found]
    assert max(bias) > 0.01
    assert sum(b > 1e-6 for b in bias) >= 6


def test_it_is_exact_with_confidences_that_ignore_the_tokens():
    for seed in SEEDS:
        system = System(seed, token_aware=False)
        assert system.bias(by_current_best(system.survivals(), system.staircase)) < EXACT


def test_trees_may_be_cut_by_any_rule():
    """Sample-then-match: cut anywhere, a tree emits what the target chooses, whatever that is.

    A tree of depth 3 over two tokens, and everything the target may choose after 15 prefixes.
    """
    nodes = [(), (0,), (1,), (0, 1), (0, 0), (1, 1), (0, 1, 1), (1, 1, 0)]
    parents = [-1] + [nodes.index(path[:-1]) for path in nodes[1:]]
    choices = np.array(list(itertools.product((0, 1), repeat=len(PREFIXES))), np.int32)
    count = len(choices)
    after = choices[:, [PREFIXES.index(path) for path in nodes]]
    tree = DraftTree(
        tokens=jnp.array([[0, *(path[-1] for path in nodes[1:])]] * count),
        parents=jnp.array([parents] * count),
        depths=jnp.array([[len(path) for path in nodes]] * count),
        scores=jnp.zeros((count, len(nodes))),
        valid=jnp.ones((count, len(nodes)), bool),
    )
    plain, prefix = [], np.zeros((count, 0), int)
    place = {path: i for i, path in enumerate(PREFIXES)}
    for _ in range(DEPTH + 1):
        plain.append([row[place[tuple(p)]] for row, p in zip(choices, prefix, strict=True)])
        prefix = np.stack(plain, axis=1)
    longest = set()
    for kept in range(len(nodes)):
        drafted = schedule.cut(Draft(tree), jnp.full(count, kept)).tree
        found = jax.jit(accept_matches, static_argnums=3)(
            drafted, ancestors(drafted), after, DEPTH
        )
        inside = np.arange(DEPTH + 1) < np.asarray(found.count)[:, None]
        assert (np.asarray(found.tokens) == prefix)[inside].all()
        longest.add(int(found.count.max()))
    assert longest == {1, 2, 3, 4}


def test_the_papers_counterexample():
    """Appendix A: p = (.7, .3), q = (.5, .5), steps per second 1, .5, .45 -> (.85, .15)."""
    steps = staircase([1, 2, 3], [1, 1 / 0.5, 1 / 0.45], [9, 9, 9])
    # The second slot is sure to be accepted after token 0, and never after token 1.
    drafts = jnp.array([[[0.7, 0.7]], [[0.7, 0.0]]])

    def chosen(s):
        size = best_size(s, 1, steps)
        return admit(s, steps.totals[size] - 1, steps.per_row[size] - 1)[0]

    verified = [int(chosen(s)) for s in drafts]
    assert verified == [2, 0]
    p, q = np.array([0.7, 0.3]), np.array([0.5, 0.5])
    accepted = q[0] * min(1, p[0] / q[0])  # draft 0, verified and never rejected
    assert accepted + q[1] * p[0] == pytest.approx(0.85)  # draft 1 is left unverified


def test_admit_takes_the_likeliest_nodes_of_all_rows():
    s = jnp.array([[0.9, 0.5, 0.2], [0.6, 0.55, 0.1], [0.0, 0.0, 0.0]])
    expected = {0: [0, 0, 0], 1: [1, 0, 0], 3: [1, 2, 0], 4: [2, 2, 0], 99: [3, 3, 0]}
    for nodes, rows in expected.items():
        assert admit(s, nodes, 9).tolist() == rows
    assert admit(s, 4, 1).tolist() == [1, 1, 0]


def test_ties_go_to_earlier_nodes_then_rows():
    s = jnp.ones((2, 3))
    assert [admit(s, n, 3).tolist() for n in range(5)] == [
        [0, 0],
        [1, 0],
        [1, 1],
        [2, 1],
        [2, 2],
    ]


def test_best_size_weighs_tokens_against_seconds():
    s = jnp.array([[0.9, 0.8, 0.1], [0.9, 0.2, 0.1]])
    cheap = staircase([2, 4, 8], [1.0, 1.1, 1.2])
    assert int(best_size(s, 2, cheap)) == 2  # 2, 3.8, 5.0 tokens: 2.0, 3.5, 4.2 per second
    steep = staircase([2, 4, 8], [1.0, 1.5, 3.0])
    assert int(best_size(s, 2, steep)) == 1  # 2.0, 2.5, 1.7
    assert int(best_size(s * 0.1, 2, steep)) == 0
    # A step that does not pay does not hide one that does.
    jagged = staircase([2, 3, 5], [1.0, 2.0, 1.2])
    assert int(best_size(s, 2, jagged)) == 2


def test_best_size_has_room_for_every_root_and_keeps_to_the_rows_cap():
    s = jnp.array([[0.9, 0.8, 0.7]])
    assert int(best_size(s, 3, staircase([2, 4], [0.01, 1.0]))) == 1
    capped = staircase([1, 4, 8], [1.0, 1.5, 9.0], [1, 2, 4])
    assert int(best_size(s, 1, capped)) == 1  # 1.9 / 1.5: the cap leaves one drafted node
    assert int(best_size(s, 1, staircase([1, 4, 8], [1.0, 2.0, 9.0], [1, 2, 4]))) == 0


def test_survival_of_a_tree_never_rises_and_is_zero_for_padding():
    tree = DraftTree(
        tokens=jnp.zeros((1, 5), jnp.int32),
        parents=jnp.array([[-1, 0, 1, 0, -1]]),
        depths=jnp.array([[0, 1, 2, 1, 0]]),
        scores=jnp.log(jnp.array([[1.0, 0.5, 0.1, 0.3, 0.0]])),
        valid=jnp.array([[True, True, True, True, False]]),
    )
    np.testing.assert_allclose(survival(tree), [[0.5, 0.1, 0.1, 0.0]], rtol=1e-6)
