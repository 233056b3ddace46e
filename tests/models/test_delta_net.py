"""Gated delta nets over trees equal the recurrence along every path from the root."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxspec.models.delta_net import (
    DeltaRows,
    DeltaState,
    kinship,
)
from jaxspec.trees.tree import NO_PARENT, ancestors, chain_nodes
from pallas_kernels.delta_heads.reference import tree_convolution
from pallas_kernels.tree_delta_rule import tree_delta_rule
from tests import tiny

J, R, DK, DV, TAPS = 2, 2, 4, 6, 4
CHANNELS = 2 * DK + R * DV
SIZES = (1, 16, 64)  # each is one compiled program


def recurrence(memory, nodes):
    """The paper's, one token after the other, in float64: outputs and the last state."""
    memory, outputs = np.float64(memory).reshape(J, DK, R, DV), []
    for q, k, v, decay, rate in nodes:
        memory = np.exp(decay)[:, None, :, None] * memory  # [J, dk, R, dv]
        predicted = np.einsum("jdre,jd->jre", memory, k)
        update = rate[..., None] * (v - predicted)
        memory = memory + np.einsum("jd,jre->jdre", k, update)
        outputs.append(np.einsum("jdre,jd->jre", memory, q))
    return outputs, memory.reshape(J, DK, -1)


def random_nodes(rng, n, decay, repeated=False):
    """q, k, v, decay, rate of n nodes; decays exp(g) near `decay`."""
    q, k = rng.normal(size=(2, n, J, DK))
    if repeated:
        k = np.broadcast_to(k[:1], k.shape)
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    g = np.log(decay) * rng.uniform(0.5, 1.5, size=(n, J, R))
    rate = rng.uniform(0.5 if repeated else 0.0, 1.0, size=(n, J, R))
    arrays = q * DK**-0.5, k, rng.normal(size=(n, J, R, DV)), g, rate
    return tuple(np.float32(x) for x in arrays)


def path_to(parents, node):
    path = []
    while node != NO_PARENT:
        path.insert(0, node)
        node = int(parents[node])
    return path


@functools.partial(jax.jit, static_argnames="size")
def random_trees(keys, counts, size):
    draw = functools.partial(tiny.random_tree, size, size, 11)
    return jax.vmap(lambda key, n: draw(key, jnp.int32(0), n))(keys, counts)


@jax.jit
def run(arrays, state, kernel, inputs, trees, lengths):
    memory, window, bits = state.memory, state.window, ancestors(trees)
    kin = kinship(bits, lengths)
    out, updates = tree_delta_rule(*arrays, memory, bits, kin.begun)
    convolved = tree_convolution(kernel, inputs, window, kin.parents, kin.begun)
    return out, convolved, DeltaRows(arrays[1], updates, arrays[3], inputs)


@jax.jit
def commit(state, rows, paths, starts, counts):
    return state.write(rows.take(paths), starts, counts)


def draw_case(seed, size, decay, repeated, share):
    """Two random trees, of which only `share` is valid, and all that a layer computes on; the
    second row has no prefix."""
    rng = np.random.default_rng(seed)
    counts = np.maximum(1, np.int32(np.array(share) * size))
    trees = random_trees(jax.random.split(jax.random.key(seed), 2), counts, size)
    rows = [random_nodes(rng, size, decay, repeated) for _ in range(2)]
    arrays = tuple(np.stack(x) for x in zip(*rows, strict=True))
    state = DeltaState(
        np.float32(rng.normal(size=(2, J, DK, R * DV))),
        np.float32(rng.normal(size=(2, TAPS - 1, J, CHANNELS))),
    )
    kernel = np.float32(rng.normal(size=(J, CHANNELS, TAPS)))
    inputs = np.float32(rng.normal(size=(2, size, J, CHANNELS)))
    return trees, counts, arrays, state, kernel, inputs


LENGTHS = np.array([9, 0])


def prefix_of(state, row):
    """What a sequence that has begun kept; zeros before one begins."""
    return tuple(x[row] * float(LENGTHS[row] > 0) for x in (state.memory, state.window))


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    size=st.sampled_from(SIZES),
    decay=st.sampled_from([1e-30, 1e-3, 0.5, 0.999, 1.0]),
    repeated=st.booleans(),
    share=st.tuples(st.floats(0.05, 1), st.floats(0.05, 1)),
)
def test_a_tree_equals_the_recurrence_along_every_path(seed, size, decay, repeated, share):
    case = draw_case(seed, size, decay, repeated, share)
    trees, counts, arrays, state, kernel, inputs = case
    parents = np.asarray(trees.parents)
    out, convolved, rows = run(arrays, state, kernel, inputs, trees, LENGTHS)
    out, convolved = np.asarray(out), np.asarray(convolved)
    deepest = np.zeros((2, size), np.int32)
    accepted = np.zeros(2, np.int32)
    for row in range(2):
        memory, window = prefix_of(state, row)
        for node in range(counts[row]):
            path = path_to(parents[row], node)
            nodes = zip(*(x[row][path] for x in arrays), strict=True)
            outputs, after = recurrence(memory, nodes)
            np.testing.assert_allclose(out[row, node], outputs[-1], atol=2e-5)
            line = np.concatenate([window, inputs[row][path]])[-TAPS:]
            expected = np.einsum("tjc,jct->jc", line, kernel)
            np.testing.assert_allclose(convolved[row, node], expected, atol=2e-5)
            if len(path) > accepted[row]:
                deepest[row, : len(path)], accepted[row] = path, len(path)
    # Committing a path is running it as a chain.
    found = jax.device_get(commit(state, rows, deepest, LENGTHS, accepted))
    for row in range(2):
        memory, window = prefix_of(state, row)
        path = deepest[row, : accepted[row]]
        expected = recurrence(memory, zip(*(x[row][path] for x in arrays), strict=True))[1]
        np.testing.assert_allclose(found.memory[row], expected, atol=2e-5)
        line = np.concatenate([window, inputs[row][path]])
        np.testing.assert_array_equal(found.window[row], line[1 - TAPS :])


def test_a_state_takes_in_no_rejected_node_and_stays_without_a_count():
    """Rows past the count may hold anything; a sequence without one stays bit for bit."""
    case = draw_case(3, 16, 0.9, False, (1.0, 1.0))
    trees, _, arrays, state, kernel, inputs = case
    rows = jax.device_get(run(arrays, state, kernel, inputs, trees, LENGTHS)[2])
    path = np.tile(np.arange(16, dtype=np.int32), (2, 1))
    rest = lambda x, value: np.concatenate([x[:, :3], np.full_like(x[:, 3:], value)], 1)  # noqa: E731
    spoiled, cut = (jax.tree.map(lambda x, v=v: rest(x, v), rows) for v in (np.nan, 7.0))
    lengths = np.array([9, 5])
    found = jax.device_get(commit(state, spoiled, path, lengths, np.array([3, 0])))
    for name in ("memory", "window"):
        same, moved = getattr(found, name), getattr(state, name)
        np.testing.assert_array_equal(same[1], moved[1])
        assert np.isfinite(same).all() and (same[0] != moved[0]).any()
    expected = commit(state, cut, path, lengths, np.array([3, 0]))
    np.testing.assert_array_equal(found.memory, expected.memory)
    # With one node more than was accepted the state is another.
    wrong = commit(state, cut, path, lengths, np.array([4, 0]))
    assert np.abs(np.subtract(wrong.memory, expected.memory)[0]).max() > 0.1


@pytest.mark.parametrize("chunk", [1, 16])
def test_a_long_prefix_keeps_float32(chunk):
    """4,000 tokens, a chunk or a token at a time, against float64."""
    rng, total = np.random.default_rng(0), 4000
    arrays = random_nodes(rng, total, 0.98)
    expected = recurrence(np.zeros((J, DK, R * DV)), zip(*arrays, strict=True))[1]
    chunks = [np.reshape(x, (total // chunk, 1, chunk, *x.shape[1:])) for x in arrays]
    bits, inputs = chain_nodes(1, chunk)[1], jnp.zeros((1, chunk, J, CHANNELS))

    @jax.jit
    def decode(state):
        def step(carry, part):
            state, length = carry
            _, updates = tree_delta_rule(*part, state.memory, bits, length > 0)
            rows = DeltaRows(part[1], updates, part[3], inputs)
            return (state.write(rows, length, jnp.array([chunk])), length + chunk), None

        return jax.lax.scan(step, (state, jnp.zeros(1, jnp.int32)), tuple(chunks))[0][0]

    start = DeltaState(jnp.zeros((1, J, DK, R * DV)), jnp.zeros((1, TAPS - 1, J, CHANNELS)))
    found = decode(start).memory[0]
    assert np.abs(found - expected).max() < 3e-6 * np.abs(expected).max()
