"""The path-conditioned tree: its scores, its optimality, and what it is without a head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.config import TreeConfig
from jaxspec.trees.build import build
from jaxspec.trees.path_conditioned import LowRank, path_conditioned
from tests.trees.oracles import (
    assert_same_paths,
    best_paths,
    check_layout,
    log_softmax,
    paths,
    row,
)

BATCH, DEPTH, VOCAB, RANK, SIZE = 3, 5, 23, 4, 24
BUDGET = np.array([24, 17, 1], np.int32)
ROOT = jnp.array([4, 5, 6])


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


BASE = 1.5 * normal(0, BATCH, DEPTH, VOCAB)
PREVIOUS, OUTPUT = normal(1, VOCAB, RANK), normal(2, VOCAB, RANK)  # W1, W2
RECURRENT = 0.7 * normal(3, 2 * RANK, RANK)
CONFIDENCE = normal(4, DEPTH, VOCAB)


def no_head(slot, state, tokens):
    logits = jnp.asarray(BASE)[:, slot, None]
    return jnp.broadcast_to(logits, (*tokens.shape, VOCAB)), state


def markov(slot, state, tokens):
    """base + W2 W1[previous token]."""
    latent = jnp.asarray(PREVIOUS)[tokens]
    return jnp.asarray(BASE)[:, slot, None] + latent @ OUTPUT.T, state


def recurrent(slot, state, tokens):
    """s' = tanh(R [s; W1[previous token]]), base + W2 s'."""
    state = jnp.tanh(jnp.concatenate([state, jnp.asarray(PREVIOUS)[tokens]], -1) @ RECURRENT)
    return jnp.asarray(BASE)[:, slot, None] + state @ OUTPUT.T, state


def confident(slot, state, tokens):
    return jnp.asarray(CONFIDENCE)[slot, tokens]


STATES = {no_head: (), markov: (), recurrent: np.zeros((BATCH, 1, RANK), np.float32)}
STATIC = ("step", "depth", "parents", "size", "confidence")
grow = jax.jit(path_conditioned, static_argnames=STATIC)


def grown(step, *, parents=400, size=SIZE, budget=BUDGET, confidence=None):
    tree = grow(
        ROOT,
        step,
        STATES[step],
        depth=DEPTH,
        parents=parents,
        budget=budget,
        size=size,
        confidence=confidence,
    )
    for b in range(BATCH):
        check_layout(row(tree, b), ROOT[b], budget[b])
    return tree


def teacher_forced(step, b, path):
    """Corrected logits [V] after the given tokens of row b, computed along that path alone."""
    tokens, state = (ROOT[b], *path), np.zeros(RANK)
    for token in tokens:
        state = np.tanh(np.concatenate([state, PREVIOUS[token]]) @ RECURRENT)
    latent = {no_head: 0 * state, markov: PREVIOUS[tokens[-1]], recurrent: state}[step]
    return BASE[b, len(path)] + OUTPUT.astype(float) @ latent


def laws(step, b, path):
    """(token, log-prob) of all tokens after a path."""
    return list(enumerate(log_softmax(teacher_forced(step, b, path))))


@pytest.mark.parametrize("step", [markov, recurrent])
def test_scores_are_the_teacher_forced_log_probs(step):
    tree = grown(step, parents=3)
    for b in range(BATCH):
        for path, score in paths(row(tree, b)).items():
            forced = sum(
                log_softmax(teacher_forced(step, b, path[:d]))[token]
                for d, token in enumerate(path)
            )
            assert score == pytest.approx(forced, abs=1e-4)


@pytest.mark.parametrize("step", [no_head, markov, recurrent])
def test_equals_best_first_search_over_its_scores(step):
    tree = grown(step)
    for b in range(BATCH):
        expected = best_paths(lambda path, b=b: laws(step, b, path), DEPTH, BUDGET[b] - 1)
        assert_same_paths(paths(row(tree, b)), expected)


@jax.jit
def low_rank_markov(budget):
    def latent(slot, state, tokens):
        return jnp.asarray(PREVIOUS)[tokens], state

    step = LowRank(jnp.asarray(BASE), jnp.asarray(OUTPUT), latent)
    return path_conditioned(ROOT, step, (), depth=DEPTH, parents=400, budget=budget, size=SIZE)


@jax.jit
def low_rank_recurrent(budget):
    def latent(slot, state, tokens):
        joined = jnp.concatenate([state, jnp.asarray(PREVIOUS)[tokens]], -1)
        state = jnp.tanh(joined @ RECURRENT)
        return state, state

    step = LowRank(jnp.asarray(BASE), jnp.asarray(OUTPUT), latent)
    start = STATES[recurrent]
    return path_conditioned(
        ROOT, step, start, depth=DEPTH, parents=400, budget=budget, size=SIZE
    )


@pytest.mark.parametrize(
    "grow, step", [(low_rank_markov, markov), (low_rank_recurrent, recurrent)]
)
def test_low_rank_steps_grow_the_tree_of_their_logits(grow, step):
    tree, expected = grow(BUDGET), grown(step)
    for b in range(BATCH):
        check_layout(row(tree, b), ROOT[b], BUDGET[b])
        assert_same_paths(paths(row(tree, b)), paths(row(expected, b)))


@pytest.mark.parametrize("parents", [1, 3])
def test_the_best_nodes_of_a_level_are_its_parents(parents):
    """A search that expands so many of a level, kept or not, and then takes the best of all."""
    tree = grown(recurrent, parents=parents)
    for b in range(BATCH):
        level, found = [((), 0.0)], {}
        for _ in range(DEPTH):
            level = [
                ((*path, token), score + gain)
                for path, score in level[:parents]
                for token, gain in laws(recurrent, b, path)
            ]
            level.sort(key=lambda node: -node[1])
            found |= dict(level)
        best = sorted(found.items(), key=lambda node: -node[1])[: BUDGET[b] - 1]
        assert_same_paths(paths(row(tree, b)), dict(best))


def test_without_a_head_it_is_the_best_tree_under_marginals():
    got = grown(no_head)
    tree = TreeConfig("top_budget", size=SIZE)
    expected = jax.jit(build, static_argnames="tree")(tree, BASE, ROOT, BUDGET)
    np.testing.assert_array_equal(got.tokens, expected.tokens)
    np.testing.assert_array_equal(got.parents, expected.parents)
    np.testing.assert_allclose(got.scores, expected.scores, atol=1e-5)


def test_a_recurrent_head_sees_more_than_the_last_token():
    """Same depth, same parent token, other grandparent: other scores for the same child."""
    tree = row(grown(recurrent, size=200, budget=np.full(3, 200, np.int32)), 0)
    steps = {}
    for node in np.flatnonzero(tree.depths >= 2):
        parent = tree.parents[node]
        where = (tree.depths[node], tree.tokens[parent], tree.tokens[node])
        gain = tree.scores[node] - tree.scores[parent]
        steps.setdefault(where, []).append(gain)
    assert max(np.ptp(gains) for gains in steps.values()) > 0.1


def survival(b, path):
    """(token, log-survival): the first choice takes c, the others what remains."""
    tokens, log_q = zip(*laws(markov, b, path), strict=True)
    q = np.exp(log_q)
    c = 1 / (1 + np.exp(-CONFIDENCE[len(path), (ROOT[b], *path)[-1]].astype(float)))
    first = int(np.argmax(q))
    kept = q * min(1.0, (1 - c) / (1 - q[first]))
    kept[first] = c
    assert kept.sum() < 1 + 1e-6
    return list(zip(tokens, np.log(kept), strict=True))


def test_with_confidence_scores_are_survival_probabilities():
    tree = grown(markov, confidence=confident)
    for b in range(BATCH):
        expected = best_paths(lambda path, b=b: survival(b, path), DEPTH, BUDGET[b] - 1)
        assert_same_paths(paths(row(tree, b)), expected)


def test_the_first_choices_survive_like_a_chain():
    """Along the head's greedy chain, survival is the product of its confidences."""
    tree = grown(markov, size=400, budget=np.full(3, 400, np.int32), confidence=confident)
    scores, path, total = paths(row(tree, 0)), (), 0.0
    for slot in range(2):
        total += -np.log1p(np.exp(-CONFIDENCE[slot, (ROOT[0], *path)[-1]]))
        path = (*path, int(np.argmax(teacher_forced(markov, 0, path))))
        assert scores[path] == pytest.approx(total, abs=1e-4)


def test_confidence_in_the_drafters_own_words_changes_nothing():
    """Where c is the probability of the first choice, survival is the log-probability."""

    def own(slot, state, tokens):
        best = jnp.max(jax.nn.softmax(jnp.asarray(BASE)[:, slot]), axis=-1)
        return jnp.broadcast_to(jnp.log(best / (1 - best))[:, None], tokens.shape)

    plain, same = grown(no_head), grown(no_head, confidence=own)
    np.testing.assert_allclose(same.scores, plain.scores, atol=1e-4)
