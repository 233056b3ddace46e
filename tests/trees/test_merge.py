"""The trie of several continuations against a dictionary of paths."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxspec.trees.merge import merge
from jaxspec.trees.tree import NO_PARENT

merged = jax.jit(merge, static_argnames="size")


def rows(*values):
    return jnp.asarray(values, jnp.int32)


def test_two_continuations_share_their_beginning():
    tree = merged(rows(9), rows([[1, 2, 3], [1, 2, 4]]), rows([3, 3]), size=8, budget=rows(8))
    assert tree.tokens[0].tolist() == [9, 1, 2, 3, 4, 0, 0, 0]
    assert tree.parents[0].tolist() == [-1, 0, 1, 2, 2, -1, -1, -1]
    assert tree.depths[0].tolist() == [0, 1, 2, 3, 3, 0, 0, 0]
    assert tree.valid[0].tolist() == [True] * 5 + [False] * 3
    assert tree.scores[0].tolist() == [0.0] * 5 + [-np.inf] * 3


def test_equal_tokens_under_different_parents_are_different_nodes():
    tree = merged(rows(9), rows([[1, 5], [2, 5]]), rows([2, 2]), size=5, budget=rows(5))
    assert tree.tokens[0].tolist() == [9, 1, 5, 2, 5]
    assert tree.parents[0].tolist() == [-1, 0, 1, 0, 3]


def test_a_shorter_earlier_continuation_is_extended_by_a_later_one():
    tree = merged(rows(9), rows([[1, 7, 7], [1, 2, 3]]), rows([1, 3]), size=4, budget=rows(4))
    assert tree.tokens[0].tolist() == [9, 1, 2, 3]
    assert tree.parents[0].tolist() == [-1, 0, 1, 2]


def test_the_budget_and_the_size_cut_the_tree():
    args = rows(9), rows([[1, 2, 3], [4, 5, 6]]), rows([3, 3])
    by_budget = merged(*args, size=8, budget=rows(3))
    by_size = merged(*args, size=3, budget=rows(8))
    assert by_budget.tokens[0].tolist() == [9, 1, 2, 0, 0, 0, 0, 0]
    assert by_size.tokens[0].tolist() == [9, 1, 2]


def oracle(anchor, continuations, lengths, budget):
    """Nodes in order of creation as (token, parent, depth)."""
    nodes, numbers = [(anchor, NO_PARENT, 0)], {(): 0}
    for tokens, length in zip(continuations, lengths, strict=True):
        for end in range(1, length + 1):
            path = tuple(tokens[:end])
            if path not in numbers:
                numbers[path] = len(nodes)
                nodes.append((path[-1], numbers[path[:-1]], end))
    return nodes[:budget]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_equals_a_dictionary_of_paths(data):
    batch, count, depth, size = 4, 3, 4, 10
    draw = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    continuations = draw.integers(0, 2, (batch, count, depth))
    lengths = draw.integers(0, depth + 1, (batch, count))
    anchor, budget = draw.integers(0, 9, batch), draw.integers(1, size + 1, batch)
    tree = merged(
        jnp.asarray(anchor, jnp.int32),
        jnp.asarray(continuations, jnp.int32),
        jnp.asarray(lengths, jnp.int32),
        size=size,
        budget=jnp.asarray(budget, jnp.int32),
    )
    for b in range(batch):
        nodes = oracle(int(anchor[b]), continuations[b].tolist(), lengths[b], budget[b])
        padding = [(0, NO_PARENT, 0)] * (size - len(nodes))
        got = zip(tree.tokens[b], tree.parents[b], tree.depths[b], strict=True)
        assert [tuple(map(int, node)) for node in got] == nodes + padding
        assert int(tree.valid[b].sum()) == len(nodes)
