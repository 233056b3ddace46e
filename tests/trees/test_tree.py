"""Ancestor sets, bit packing and the trees that need no scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxspec.trees import tree
from jaxspec.trees.tree import DraftTree, chain_nodes, root_only

# Operation by operation they would be dozens of small programs.
ancestors, pack_bits = jax.jit(tree.ancestors), jax.jit(tree.pack_bits)
unpack_bits = jax.jit(tree.unpack_bits, static_argnums=1)
chain = jax.jit(tree.chain, static_argnames="size")


def tree_of(parents) -> DraftTree:
    """A tree of which only the shape matters: parents [B, N]."""
    parents = jnp.asarray(parents, jnp.int32)
    zeros = jnp.zeros(parents.shape, jnp.int32)
    return DraftTree(zeros, parents, zeros, zeros.astype(jnp.float32), parents >= -1)


def test_ancestors_of_a_chain_beside_a_leaf():
    rows = ancestors(tree_of([[-1, 0, 1, 0]]))
    assert rows.dtype == jnp.uint32
    assert rows[0, :, 0].tolist() == [0b0001, 0b0011, 0b0111, 0b1001]


def test_padding_sees_only_itself():
    rows = unpack_bits(ancestors(tree_of([[-1, 0, -1, -1]])), 4)
    assert rows[0].astype(int).tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 0, 1],
    ]


@pytest.mark.parametrize("n", [1, 2, 32, 33, 100])
def test_ancestors_equal_a_walk_to_the_root(n):
    draw = np.random.default_rng(n)
    bushy = [-1] + [draw.integers(0, i) for i in range(1, n)]
    parents = np.array([bushy, np.arange(n) - 1])
    expected = np.zeros((2, n, n), bool)
    for b in range(2):
        for node in range(n):
            at = node
            while at != -1:
                expected[b, node, at] = True
                at = parents[b, at]
    got = ancestors(tree_of(parents))
    assert got.shape == (2, n, -(-n // 32))
    np.testing.assert_array_equal(unpack_bits(got, n), expected)


def test_bit_j_of_word_w_is_element_32w_plus_j():
    mask = np.zeros(40, bool)
    mask[[0, 5, 31, 33]] = True
    assert pack_bits(jnp.asarray(mask)).tolist() == [2**0 + 2**5 + 2**31, 2**1]


@pytest.mark.parametrize("size", [1, 31, 32, 33, 70])
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_packing_round_trip(size, data):
    mask = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    words = pack_bits(jnp.asarray([mask, mask]))
    assert unpack_bits(words, size).tolist() == [mask, mask]


def test_nodes_of_chains():
    depths, bits = chain_nodes(2, 3)
    assert depths.tolist() == [[0, 1, 2]] * 2
    assert bits[..., 0].tolist() == [[0b001, 0b011, 0b111]] * 2


def test_root_only():
    found = root_only(jnp.array([7, 8]), size=3)
    assert found.tokens.tolist() == [[7, 0, 0], [8, 0, 0]]
    assert found.parents.tolist() == [[-1] * 3] * 2
    assert found.depths.tolist() == [[0] * 3] * 2
    assert found.scores.tolist() == [[0.0, -np.inf, -np.inf]] * 2
    assert found.valid.tolist() == [[True, False, False]] * 2


def test_chain_keeps_the_first_tokens_and_sums_their_log_probs():
    found = chain(
        jnp.array([9, 9]),
        jnp.array([[1, 2, 3], [4, 5, 6]]),
        jnp.array([3, 1]),
        jnp.array([[-1.0, -2.0, -4.0], [-0.5, -1.0, -1.0]]),
    )
    assert found.tokens.tolist() == [[9, 1, 2, 3], [9, 4, 0, 0]]
    assert found.parents.tolist() == [[-1, 0, 1, 2], [-1, 0, -1, -1]]
    assert found.depths.tolist() == [[0, 1, 2, 3], [0, 1, 0, 0]]
    assert found.scores.tolist() == [[0, -1, -3, -7], [0, -0.5, -np.inf, -np.inf]]


@pytest.mark.parametrize("size, tokens", [(2, [9, 1]), (5, [9, 1, 2, 0, 0])])
def test_chain_is_cut_or_padded_to_its_size(size, tokens):
    found = chain(jnp.array([9]), jnp.array([[1, 2]]), jnp.array([2]), size=size)
    assert found.tokens.tolist() == [tokens]
    assert int(found.valid.sum()) == min(size, 3)
