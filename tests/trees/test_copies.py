"""Copies behind a tree's nodes, against slow searches of lists of tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxspec.trees.copies import with_copies
from jaxspec.trees.merge import merge
from tests.trees.oracles import assert_same_paths, check_layout, paths, row

WEIGHTS = np.array([0.1, 0.4, 0.7])  # after 1, 2, 3 and more equal tokens
SIZE, DEPTH, CAPACITY = 12, 5, 30
grow = jax.jit(with_copies, static_argnames="depth")
merged = jax.jit(merge, static_argnames="size")


def grown(tree, texts, budget, depth=DEPTH):
    """Trees with copies; past the anchors stand tokens that must not be read."""
    array = np.random.default_rng(1).integers(0, 3, (len(texts), CAPACITY)).astype(np.int32)
    for i, tokens in enumerate(texts):
        array[i, : len(tokens)] = tokens
    last = jnp.array([len(tokens) - 1 for tokens in texts])
    budget = jnp.asarray(budget, jnp.int32)
    weights = jnp.asarray(WEIGHTS, jnp.float32)
    found = grow(tree, array, last, weights=weights, depth=depth, budget=budget)
    for b, tokens in enumerate(texts):
        check_layout(row(found, b), tokens[-1], budget[b])
    return [paths(row(found, b)) for b in range(len(texts))]


def copy_after(tokens):
    """The place after the longest, then latest, earlier match; and its length, up to three."""

    def common(end):
        back = 0
        while back < min(len(WEIGHTS), end + 1) and tokens[end - back] == tokens[-1 - back]:
            back += 1
        return back

    length, end = max(((common(end), end) for end in range(len(tokens) - 1)), default=(0, 0))
    return end + 1, length


def mixture(drafted, text):
    """Every node that may be in a tree with copies: {path: score}.

    Args:
      drafted: the drafter's, parents first.
    """
    scores, found = {(): 0.0}, {}
    for path, score in drafted.items():
        above = path[:-1]
        start, length = copy_after([*text, *above]) if len(above) < DEPTH else (0, 0)
        weight = WEIGHTS[length - 1] if length else 0.0
        q = np.exp(score - drafted.get(above, 0.0))
        copied = length and [*text, *above][start] == path[-1]
        scores[path] = scores[above] + np.log(weight * bool(copied) + (1 - weight) * q)
    for path in scores:
        tokens, score = [*text, *path], scores[path]
        start, length = copy_after(tokens)
        if not length or (*path, tokens[start]) in scores:
            continue
        for place in range(DEPTH - len(path)):
            tokens.append(tokens[start + place])
            score += np.log(WEIGHTS[min(length + place, len(WEIGHTS)) - 1])
            found[tuple(tokens[len(text) :])] = score
    return {path: score for path, score in (scores | found).items() if path}


def random_trees(draw, anchors):
    """Drafted trees [B]: the best nodes of three random continuations."""
    shape = (len(anchors), 3, DEPTH - 1)
    tokens = jnp.asarray(draw.integers(0, 3, shape), jnp.int32)
    scores = jnp.asarray(np.cumsum(-draw.exponential(0.7, shape), axis=-1), jnp.float32)
    full = jnp.full(len(anchors), SIZE, jnp.int32)
    return merged(jnp.asarray(anchors, jnp.int32), tokens, scores, size=SIZE, budget=full)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_best_nodes_of_drafter_and_copies(seed):
    draw = np.random.default_rng(seed)
    texts = [draw.integers(0, 3, draw.integers(1, 25)).tolist() for _ in range(6)]
    tree = random_trees(draw, [tokens[-1] for tokens in texts])
    budget = draw.integers(1, SIZE + 1, len(texts))
    for b, got in enumerate(grown(tree, texts, budget)):
        expected = mixture(paths(row(tree, b)), texts[b])
        best = sorted(expected, key=expected.get, reverse=True)[: budget[b] - 1]
        assert_same_paths(got, {path: expected[path] for path in best})
        for path, score in got.items():
            assert score == pytest.approx(expected[path], abs=1e-4)


def one(anchor, tokens, scores):
    """A tree of one drafted chain."""
    scores = jnp.array([[scores]], jnp.float32)
    return merged(
        jnp.array([anchor]), jnp.array([[tokens]]), scores, size=SIZE, budget=jnp.array([SIZE])
    )


def test_a_copy_follows_a_drafted_token_and_a_repetition_goes_on():
    text = [7, 8, 9, 5]
    (found,) = grown(one(5, [7], [-0.1]), [text], [SIZE])
    assert (7, 8, 9, 5, 7) in found  # what followed the 7, then again from the anchor on
    (found,) = grown(one(5, [6, 6], [-0.1, -0.2]), [[5]], [SIZE])
    assert (6, 6, 6, 6, 6) in found  # the path repeats itself


def test_a_copy_raises_the_child_it_agrees_with_and_lowers_the_others():
    text = [5, 8, 5]
    drafted = merged(
        jnp.array([5]),
        jnp.array([[[8], [7]]]),
        jnp.log(jnp.array([[[0.3], [0.5]]])),
        size=SIZE,
        budget=jnp.array([SIZE]),
    )
    (found,) = grown(drafted, [text], [SIZE], depth=1)
    assert found == pytest.approx({(8,): np.log(0.1 + 0.9 * 0.3), (7,): np.log(0.9 * 0.5)})


def test_without_a_match_the_tree_stays_as_it_is():
    tree = one(5, [6, 7], [-1.0, -1.5])
    (found,) = grown(tree, [[1, 2, 3, 5]], [SIZE])
    assert found == pytest.approx({(6,): -1.0, (6, 7): -1.5})
