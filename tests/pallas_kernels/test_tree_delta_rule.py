"""The gated delta rule over a tree, both implementations, against the recurrence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.tree_delta_rule import tree_delta_rule
from pallas_kernels.tree_delta_rule.reference import tree_delta_rule_reference
from pallas_kernels.tree_delta_rule.triton import tree_delta_rule_triton
from tests.pallas_kernels.ttir_check import execute

# Nodes, key heads, value heads of each, dk, dv. Two whole blocks and some nodes; four and some,
# in two programs for each value head; fewer than a block.
SHAPES = {
    "small": (70, 1, 2, 16, 32),
    "wide": (130, 2, 1, 32, 64),
    "one block": (20, 2, 3, 64, 32),
}
ROOT = -1


def random_tree(rng, n):
    """Parents: mostly near, so that paths are long."""
    return [ROOT] + [int(rng.integers(max(0, i - 3), i)) for i in range(1, n)]


def ancestor_bits(parents):
    bits = np.zeros((len(parents), -(-len(parents) // 32)), np.uint32)
    for node, parent in enumerate(parents):
        if parent != ROOT:
            bits[node] = bits[parent]
        bits[node, node // 32] |= np.uint32(1 << node % 32)
    return bits


def make_inputs(name, decay=0.9, repeated=False):
    """Two rows, of which the second has no prefix; and their trees, a chain the second."""
    n, heads, group, key_dim, value_dim = SHAPES[name]
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 2, n, heads, key_dim))
    if repeated:  # within one in a hundred
        k = k[:, :1] + 0.01 * rng.standard_normal(k.shape)
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    gates = 2, n, heads, group
    arrays = (
        q,
        k,
        rng.standard_normal((*gates, value_dim)),
        np.log(decay) * rng.uniform(0.5, 1.5, gates),
        rng.uniform(0.5 if repeated else 0.0, 1.0, gates),
        rng.standard_normal((2, heads, key_dim, group * value_dim)),
    )
    trees = random_tree(rng, n), list(range(-1, n - 1))
    bits = np.stack([ancestor_bits(tree) for tree in trees])
    arrays = tuple(jnp.asarray(x, jnp.float32) for x in arrays)
    return (*arrays, jnp.asarray(bits), jnp.array([True, False])), trees


def recurrence(trees, q, k, v, decay, rate, memory, bits, begun):
    """Node by node in float64, each from the state after its parent."""
    q, k, v, decay, rate, memory = map(np.float64, (q, k, v, decay, rate, memory))
    out, updates = np.zeros((2, *v.shape))
    for b, tree in enumerate(trees):
        shape = *k.shape[2:], *v.shape[3:]  # [J, dk, R, dv]
        root, states = memory[b].reshape(shape) * float(begun[b]), []
        for i, parent in enumerate(tree):
            state = root if parent == ROOT else states[parent]
            state = state * np.exp(decay[b, i])[:, None, :, None]
            predicted = np.einsum("jdre,jd->jre", state, k[b, i])
            updates[b, i] = rate[b, i][..., None] * (v[b, i] - predicted)
            states.append(state + np.einsum("jd,jre->jdre", k[b, i], updates[b, i]))
            out[b, i] = np.einsum("jdre,jd->jre", states[-1], q[b, i])
    return out, updates


def assert_close(found, expected, atol=2e-5):
    for actual, wanted in zip(found, expected, strict=True):
        assert actual.dtype == jnp.float32
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=atol)


reference = jax.jit(tree_delta_rule_reference)


@pytest.mark.parametrize("name", SHAPES)
def test_both_implementations_compute_the_recurrence(name):
    for decay, repeated in ((0.9, False), (1e-30, False), (1.0, True)):
        arrays, trees = make_inputs(name, decay, repeated)
        expected = recurrence(trees, *arrays)
        assert_close(reference(*arrays), expected)
        assert_close(tree_delta_rule_triton(*arrays, interpret=True), expected)


@pytest.mark.parametrize("name", ["small", "one block"])
def test_the_lowered_kernel_stays_in_bounds_and_reads_only_updates_that_stand(name):
    arrays, trees = make_inputs(name)
    assert_close(execute(tree_delta_rule_triton, *arrays), recurrence(trees, *arrays))


def test_shapes_that_the_kernel_does_not_take_are_named():
    (q, k, *rest), _ = make_inputs("small")
    rest[3] = rest[3][:, :, :12]
    with pytest.raises(ValueError, match="keys have 12 elements .* power of two.*; use 'xla'"):
        tree_delta_rule(q[..., :12], k[..., :12], *rest, implementation="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("decay, repeated", [(0.9, False), (1e-30, False), (1.0, True)])
def test_the_compiled_kernel_computes_the_recurrence(name, decay, repeated):
    arrays, trees = make_inputs(name, decay, repeated)
    found = jax.device_get(tree_delta_rule_triton(*arrays))
    # Three TF32 terms keep 21 bits or more of float32's 24.
    assert_close(found, recurrence(trees, *arrays), atol=2e-4)
