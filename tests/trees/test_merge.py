"""Tries of continuations, against dictionaries of paths."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxspec.trees.merge import merge

merged = jax.jit(merge, static_argnames="size")


def rows(*values):
    return jnp.asarray(values, jnp.int32)


def scores(*values):
    return jnp.asarray([values], jnp.float32)


def test_two_continuations_share_their_beginning():
    given = scores([-1, -2, -3], [-1.5, -2.5, -3.5])
    tree = merged(rows(9), rows([[1, 2, 3], [1, 2, 4]]), given, size=8, budget=rows(8))
    assert tree.tokens[0].tolist() == [9, 1, 2, 3, 4, 0, 0, 0]
    assert tree.parents[0].tolist() == [-1, 0, 1, 2, 2, -1, -1, -1]
    assert tree.depths[0].tolist() == [0, 1, 2, 3, 3, 0, 0, 0]
    assert tree.valid[0].tolist() == [True] * 5 + [False] * 3
    assert tree.scores[0].tolist() == [0, -1, -2, -3, -3.5] + [-np.inf] * 3


def test_equal_tokens_under_different_parents_are_different_nodes():
    given = scores([-1, -2], [-3, -4])
    tree = merged(rows(9), rows([[1, 5], [2, 5]]), given, size=5, budget=rows(5))
    assert tree.tokens[0].tolist() == [9, 1, 5, 2, 5]
    assert tree.parents[0].tolist() == [-1, 0, 1, 0, 3]


def test_the_better_score_of_a_shared_node_counts():
    given = scores([-3, -4], [-1, -5])
    tree = merged(rows(9), rows([[1, 7], [1, 2]]), given, size=4, budget=rows(4))
    assert tree.tokens[0].tolist() == [9, 1, 7, 2]
    assert tree.scores[0].tolist() == [0, -1, -4, -5]


def test_the_budget_and_the_size_keep_the_best():
    args = rows(9), rows([[1, 2, 3], [4, 5, 6]]), scores([-1, -4, -5], [-2, -3, -6])
    by_budget = merged(*args, size=8, budget=rows(4))
    by_size = merged(*args, size=4, budget=rows(8))
    assert by_budget.tokens[0].tolist() == [9, 1, 4, 5, 0, 0, 0, 0]
    assert by_size.tokens[0].tolist() == [9, 1, 4, 5]


def paths_of(tree, b):
    """{path: score} of a row's drafted nodes."""
    tree = jax.device_get(tree)
    paths, found = {0: ()}, {}
    for node in range(1, tree.size):
        if tree.valid[b, node]:
            parent = int(tree.parents[b, node])
            assert 0 <= parent < node and tree.depths[b, node] == len(paths[parent]) + 1
            paths[node] = (*paths[parent], int(tree.tokens[b, node]))
            assert paths[node] not in found
            found[paths[node]] = float(tree.scores[b, node])
    return found


def random_continuations(draw, batch, count, depth):
    """Tokens, and scores that fall from level to level and end somewhere."""
    tokens = draw.integers(0, 2, (batch, count, depth))
    found = np.cumsum(-draw.integers(1, 50, (batch, count, depth)) / 8.0, axis=-1)
    ends = draw.integers(0, depth + 1, (batch, count, 1))
    found = np.where(np.arange(depth) < ends, found, -np.inf)
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(found, jnp.float32)


def best(paths, budget):
    """The scores that a tree of `budget` nodes must hold."""
    return sorted(paths.values(), reverse=True)[: budget - 1]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_equals_a_dictionary_of_paths(seed):
    batch, size = 4, 10
    draw = np.random.default_rng(seed)
    tokens, found = random_continuations(draw, batch, 3, 4)
    anchor, budget = draw.integers(0, 9, batch), draw.integers(1, size + 1, batch)
    args = jnp.asarray(anchor, jnp.int32), tokens, found
    tree = merged(*args, size=size, budget=jnp.asarray(budget, jnp.int32))
    assert tree.tokens[:, 0].tolist() == anchor.tolist()
    for b in range(batch):
        expected = {}
        for row, values in zip(tokens[b].tolist(), found[b].tolist(), strict=True):
            for end, value in enumerate(values, 1):
                if value > -np.inf:
                    path = tuple(row[:end])
                    expected[path] = max(value, expected.get(path, -np.inf))
        got = paths_of(tree, b)
        assert list(got.values()) == best(expected, budget[b])
        assert got.items() <= expected.items()
