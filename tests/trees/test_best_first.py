"""JetSpec's tree against a heap, against its own traces, and its shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxspec.config import TreeConfig
from jaxspec.trees.best_first import best_first
from jaxspec.trees.build import build
from tests.trees.oracles import accum_logp, check_layout, row

grow = jax.jit(best_first, static_argnames="size")
build = jax.jit(build, static_argnames="tree")

CASES_PER_EXAMPLE = 100
SHAPES = [(1, 3, 8), (4, 2, 16), (5, 7, 40), (15, 7, 64)]  # P, W, N


def random_top(draw, batch, depth, width):
    """Tokens and falling log-probs in quarters: sums are exact and often equal."""
    tokens = draw.permuted(np.broadcast_to(np.arange(50), (batch, depth, 50)), axis=-1)
    falls = draw.integers(0, 4, (batch, depth, width)) / 4
    return tokens[..., :width].astype(np.int32), -np.cumsum(falls, -1).astype(np.float32)


def assert_equals_heap(tokens, log_probs, budget, size):
    batch = len(tokens)
    root = np.arange(batch, dtype=np.int32)
    tree = grow(tokens, log_probs, root, budget=budget, size=size)
    tree = jax.tree.map(np.asarray, tree)
    for b in range(batch):
        nodes = accum_logp(tokens[b], log_probs[b], b, budget[b])
        one = row(tree, b)
        check_layout(one, b, budget[b])
        columns = one.tokens, one.parents, one.depths, one.scores
        assert list(zip(*(x[: len(nodes)].tolist() for x in columns), strict=True)) == nodes
        assert one.valid.sum() == len(nodes)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), shape=st.sampled_from(SHAPES))
def test_equals_a_heap_on_1000_cases_with_ties(seed, shape):
    depth, width, size = shape
    draw = np.random.default_rng(seed)
    tokens, log_probs = random_top(draw, CASES_PER_EXAMPLE, depth, width)
    budget = draw.integers(1, size + 1, CASES_PER_EXAMPLE).astype(np.int32)
    assert_equals_heap(tokens, log_probs, budget, size)


def test_siblings_of_an_expanded_node_come_along_however_unlikely():
    tokens, log_probs = jnp.array([[[1, 2], [3, 4]]]), jnp.array([[[-0.5, -9.0], [-0.5, -1.0]]])
    tree = grow(tokens, log_probs, jnp.array([7]), budget=jnp.array([5]), size=6)
    assert tree.tokens[0].tolist() == [7, 1, 2, 3, 4, 0]
    assert tree.parents[0].tolist() == [-1, 0, 0, 1, 1, -1]
    assert tree.scores[0, :5].tolist() == [0, -0.5, -9.0, -1.0, -1.5]


@pytest.mark.parametrize("name", ["jetspec_a", "dflash_a"])
def test_equals_the_original_trees(golden, name):
    folder, trace = golden(name)
    width, size = trace["config"]["width"], trace["config"]["budget"]
    arrays = np.load(folder / "arrays.npz")
    rounds = [key.removesuffix("_draft_logits") for key in arrays if "draft_logits" in key]
    assert rounds

    def stack(what):
        return np.stack([arrays[f"{r}_{what}"] for r in rounds])

    tokens = stack("tree_tokens")
    budget = np.full(len(rounds), size, np.int32)
    kind = TreeConfig("best_first", size=size, width=width)
    tree = build(kind, stack("draft_logits"), tokens[:, 0].astype(np.int32), budget)
    np.testing.assert_array_equal(tree.tokens, tokens)
    np.testing.assert_array_equal(tree.parents, stack("tree_parents"))
    np.testing.assert_allclose(tree.scores, stack("tree_logp"), atol=1e-5)


@pytest.mark.parametrize(
    "width, budget, deepest", [(7, 16, 3), (7, 32, 5), (7, 64, 9), (1, 9, 8)]
)
def test_full_fan_out_bounds_the_depth(width, budget, deepest):
    """One likely token per depth: the tree is as deep as its budget allows."""
    logits = jnp.zeros((1, 15, 13)).at[..., 5].set(9.0)
    kind = TreeConfig("best_first", size=64, width=width)
    tree = build(kind, logits, jnp.array([1]), jnp.array([budget]))
    assert int(tree.depths.max()) == deepest == -(-(budget - 1) // width)
