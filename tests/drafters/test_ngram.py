"""Prompt lookup against a slow search of the token list."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxspec.drafters.base import Committed
from jaxspec.drafters.ngram import PromptLookup
from jaxspec.trees.tree import NO_PARENT, root_only
from tests.drafters import cases

LOOKUP = PromptLookup(size=8, depth=4, continuations=2, min_match=1, agreement=(0.3, 0.5, 0.6))


@functools.partial(jax.jit, static_argnames="drafter")
def _draft(drafter, tokens, last, budget):
    observed = Committed(tokens, jnp.zeros((1, 64, 0)), jnp.array([0]), last[None])
    state = drafter.observe((), drafter.init((), 1, 128), observed)
    return drafter.draft((), state, tokens[:, last], last[None], budget[None])[0]


def draft(tokens, drafter=LOOKUP, budget=None):
    """The tree drafted after `tokens`, the last of which is the anchor; paths as tuples."""
    padded = np.array([tokens + [0] * (64 - len(tokens))])
    tree = _draft(drafter, padded, np.int32(len(tokens) - 1), np.int32(budget or drafter.size))
    tree = jax.device_get(tree)
    paths = {}
    for node in range(tree.size):
        if tree.valid[0, node]:
            parent = int(tree.parents[0, node])
            above = () if parent == NO_PARENT else (*paths[parent], int(tree.tokens[0, node]))
            paths[node] = above
    return set(paths.values()) - {()}


def prefixes(*continuations):
    return {tuple(c[: i + 1]) for c in continuations for i in range(len(c))}


def test_what_followed_the_longest_match_is_drafted():
    #         1 2 3 matched       2 3 matched          anchor 3
    tokens = [1, 2, 3, 4, 5, 6, 9, 2, 3, 7, 7, 7, 8, 1, 2, 3]
    assert draft(tokens, PromptLookup(size=8, depth=3, continuations=1)) == prefixes([4, 5, 6])
    both = prefixes([4, 5, 6], [7, 7, 7])
    assert draft(tokens, PromptLookup(size=8, depth=3, continuations=2)) == both


def test_of_equal_matches_the_latest_wins():
    tokens = [5, 1, 5, 2, 5, 3, 5]
    assert draft(tokens, PromptLookup(size=2, depth=1, continuations=1)) == prefixes([3])


def test_a_repetition_goes_on():
    assert draft([7, 1, 2, 1, 2], PromptLookup(size=8, depth=5, continuations=1)) == prefixes(
        [1, 2, 1, 2, 1]
    )


def test_no_match_no_draft():
    assert draft([1, 2, 3, 4]) == set()
    assert draft([3]) == set()


def test_shorter_matches_than_the_least_are_ignored():
    tokens = [1, 2, 9, 9, 3, 2]
    assert draft(tokens, PromptLookup(min_match=1)) != set()
    assert draft(tokens, PromptLookup(min_match=2)) == set()


@pytest.mark.parametrize("min_match, copied", [(1, 2), (2, 0)])
def test_behind_a_drafter_shorter_matches_are_ignored_too(min_match, copied):
    history, last = jnp.array([[1, 2, 9, 9, 3, 2, 0, 0]]), jnp.array([5])
    drafted = root_only(jnp.array([2]), size=4)
    lookup = PromptLookup(size=4, depth=2, min_match=min_match)
    tree, _ = jax.jit(lookup.behind)(drafted, history, last, jnp.array([4]))
    assert tree.tokens[0, tree.valid[0]].tolist() == [2, 9, 9][: 1 + copied]


def slow_lookup(tokens, drafter):
    """All earlier ends of a common suffix, longest (up to max_match) then latest first."""
    last = len(tokens) - 1
    found = []
    for end in range(last):
        length = 0
        while (
            length < len(drafter.agreement)
            and end - length >= 0
            and tokens[end - length] == tokens[last - length]
        ):
            length += 1
        if length >= drafter.min_match:
            found.append((length, end))
    best = sorted(found, reverse=True)[: drafter.continuations]
    repeated = [tokens[end + 1 :] * (drafter.depth + 1) for _, end in best]
    return prefixes(*(c[: drafter.depth] for c in repeated))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_random_histories(tokens):
    drafter = PromptLookup(
        size=16, depth=4, continuations=3, min_match=1, agreement=(0.3, 0.5, 0.6)
    )
    assert draft(tokens, drafter) == slow_lookup(tokens, drafter)


@pytest.mark.parametrize("budget", range(1, 9))
def test_a_smaller_budget_keeps_a_part(budget):
    tokens = [1, 2, 3, 4, 5, 6, 9, 2, 3, 7, 7, 7, 8, 1, 2, 3]
    whole = draft(tokens)
    part = draft(tokens, budget=budget)
    assert len(part) == min(budget - 1, len(whole)) and part <= whole


def test_paths_have_the_probability_of_their_match():
    """1 2 3 matches by three tokens, 2 3 by two: the second counts if the first fails."""
    tokens = [1, 2, 3, 4, 5, 6, 9, 2, 3, 7, 7, 7, 8, 1, 2, 3]
    drafter = PromptLookup(size=5, depth=2, continuations=2, agreement=(0.3, 0.5, 0.6, 0.9))
    history, last = jnp.array([tokens]), jnp.array([len(tokens) - 1])
    tree = cases.draft(drafter, (), history, history[:, -1], last, jnp.array([5]))
    assert tree.tokens[0].tolist() == [3, 4, 5, 7, 7]
    expected = [1.0, 0.6, 0.6 * 0.9, 0.4 * 0.5, 0.4 * 0.5 * 0.6]
    np.testing.assert_allclose(np.exp(tree.scores[0]), expected, rtol=1e-6)
