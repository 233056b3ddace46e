"""DDTree's optimum against everything there is, and against best-first search."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxspec.config import TreeConfig
from jaxspec.trees.build import build, build_from_top
from jaxspec.trees.candidates import top_log_probs
from tests.trees.oracles import (
    all_paths,
    assert_same_paths,
    best_paths,
    check_layout,
    log_softmax,
    paths,
    row,
)


@functools.partial(jax.jit, static_argnames="size")
def grow(logits, root, *, budget, size):
    return build(TreeConfig("top_budget", size=size), logits, root, budget)


def random_logits(seed, *shape, sharpness=2.0):
    draw = np.random.default_rng(seed)
    return (sharpness * draw.normal(size=shape)).astype(np.float32)


def test_the_four_likeliest_prefixes():
    """0.6, 0.4 then 0.9, 0.1: prefixes 0.6, 0.54, 0.4, 0.36, 0.06, 0.04."""
    logits = jnp.log(jnp.array([[[0.6, 0.4], [0.9, 0.1]]]))
    tree = grow(logits, jnp.array([9]), budget=jnp.array([5]), size=8)
    assert tree.tokens[0].tolist() == [9, 0, 0, 1, 0, 0, 0, 0]
    assert tree.parents[0].tolist() == [-1, 0, 1, 0, 3, -1, -1, -1]
    np.testing.assert_allclose(np.exp(tree.scores[0, :5]), [1, 0.6, 0.54, 0.4, 0.36], atol=1e-6)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(4, 3, 33), (2, 2, 8)]))
def test_no_tree_is_worth_more(seed, shape):
    """The sum of path probabilities is the largest there is: brute force, all tokens."""
    depth, vocab, size = shape
    logits = random_logits(seed, 20, depth, vocab)
    budget = np.random.default_rng(seed).integers(1, size + 1, 20).astype(np.int32)
    tree = grow(logits, np.arange(20, dtype=np.int32), budget=budget, size=size)
    for b in range(20):
        one = row(tree, b)
        check_layout(one, b, budget[b])
        everything = sorted(all_paths(log_softmax(logits[b])).items(), key=lambda x: -x[1])
        assert_same_paths(paths(one), dict(everything[: budget[b] - 1]))


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 4.0, 10.0])
@pytest.mark.parametrize("depth, vocab, size", [(15, 600, 256), (7, 100, 128), (3, 600, 512)])
def test_equals_best_first_search(depth, vocab, size, sharpness):
    logits = random_logits(7, 2, depth, vocab, sharpness=sharpness)
    tree = grow(logits, jnp.arange(2), budget=jnp.array([size, size // 3]), size=size)
    for b, budget in enumerate((size, size // 3)):
        log_probs = log_softmax(logits[b])
        order = np.argsort(-log_probs, axis=-1)[:, :size]

        def children(path, log_probs=log_probs, order=order):
            tokens = order[len(path)]
            return zip(tokens, log_probs[len(path), tokens], strict=True)

        assert_same_paths(paths(row(tree, b)), best_paths(children, depth, budget - 1))


def test_equally_good_nodes_keep_their_parents():
    """With one certain token per depth all scores are 0: the chain, whatever the budget."""
    logits = jnp.full((1, 6, 10), -jnp.inf).at[..., 4].set(0.0)
    for budget in range(1, 9):
        tree = grow(logits, jnp.array([1]), budget=jnp.array([budget]), size=8)
        count = min(budget, 7)
        assert tree.parents[0, :count].tolist() == list(range(-1, count - 1))
        assert int(tree.valid.sum()) == count


def test_only_the_given_tokens_are_considered():
    logits = jnp.asarray(random_logits(0, 1, 3, 50, sharpness=0.1))
    kind = TreeConfig("top_budget", size=20)
    grow = jax.jit(lambda *given: build_from_top(kind, *top_log_probs(logits, 2), *given))
    tree = jax.device_get(grow(jnp.array([1]), jnp.array([20])))
    assert len(set(tree.tokens[0][tree.depths[0] == 1].tolist())) == 2
    assert int(tree.valid.sum()) == 15  # the root and all of 2 + 4 + 8


def test_a_tree_of_one_is_the_root():
    tree = grow(random_logits(0, 2, 3, 5), jnp.array([3, 4]), budget=jnp.array([1, 1]), size=1)
    assert tree.tokens.tolist() == [[3], [4]] and tree.parents.tolist() == [[-1], [-1]]
