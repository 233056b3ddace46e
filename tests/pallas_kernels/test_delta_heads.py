"""Heads of a gated delta net from its projection in one kernel, against their definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.delta_heads import delta_heads
from pallas_kernels.delta_heads.triton import delta_heads_triton
from tests.pallas_kernels.ttir_check import execute
from tests.slow import slow_but

# sequences, nodes, padding, key heads, value heads per key head, dk, dv, taps
CASES = {
    "plain decoding": (1, 1, 7, 2, 2, 16, 16, 4),
    "qwen3.5": (2, 9, 0, 2, 2, 16, 16, 4),
    "three values": (1, 6, 2, 3, 3, 16, 32, 4),
    "two taps": (2, 5, 1, 1, 1, 32, 16, 2),
}

definition = jax.jit(delta_heads, static_argnames=("key_dim", "implementation"))
interpreted = functools.partial(delta_heads_triton, interpret=True)


def make_inputs(name, dtype="float32"):
    batch, n, padding, heads, group, key_dim, value_dim, taps = CASES[name]
    channels = 2 * key_dim + group * value_dim
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), "float32")  # noqa: E731
    # Chains, forks and a root that is padding; the last sequence has no prefix.
    parents = np.array([[rng.integers(-1, i) if i else -1 for i in range(n)]] * batch, np.int32)
    parents[0] = np.arange(n) - 1
    columns = channels + group * value_dim + 2 * group
    return (
        draw(batch * n + padding, heads, columns).astype(dtype),
        draw(heads, channels, taps).astype(dtype),
        draw(heads, group),
        8 * draw(heads, group),  # softplus on both sides of its bend
        draw(batch, taps - 1, heads, channels),
        jnp.asarray(parents),
        jnp.arange(batch) < max(1, batch - 1),
    )


def options(name):
    return dict(key_dim=CASES[name][5])


def oracle(name, *arrays):
    """Node by node and key head by key head, in float64."""
    batch, n, _, heads, group, key_dim, value_dim, taps = CASES[name]
    inputs, kernel, log_rate, step_bias, window, parents, begun = (
        np.asarray(x) if x.dtype in (bool, jnp.int32) else np.asarray(x, np.float64)
        for x in arrays
    )
    channels, nodes = kernel.shape[1], inputs[: batch * n].reshape(batch, n, heads, -1)
    found = [[] for _ in range(6)]
    for b in range(batch):
        before = window[b] * bool(begun[b])
        for node in range(n):
            path, at = [], node
            while at >= 0:
                path.insert(0, nodes[b, at, :, :channels])
                at = parents[b, at]
            line = np.concatenate([before, path])[-taps:]
            mixed = np.einsum("tjc,jct->jc", line, kernel)
            mixed = mixed / (1 + np.exp(-mixed))
            q, k, v = np.split(mixed, (key_dim, 2 * key_dim), axis=-1)
            length = lambda x: np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)  # noqa: E731
            rate, step = nodes[b, node, :, -2 * group : -group], nodes[b, node, :, -group:]
            gate = nodes[b, node, :, channels : -2 * group]
            decay = -np.exp(log_rate) * np.logaddexp(step + step_bias, 0)
            for kept, x in zip(
                found,
                (
                    *(q / length(q) / key_dim**0.5, k / length(k)),
                    *(x.reshape(heads, group, value_dim) for x in (v, gate)),
                    *(decay, 1 / (1 + np.exp(-rate))),
                ),
                strict=True,
            ):
                kept.append(x)
    return [np.reshape(x, (batch, n, *x[0].shape)) for x in found]


def check(found, expected, atol=5e-6):
    for actual, wanted in zip(jax.device_get(found), expected, strict=True):
        np.testing.assert_allclose(actual, wanted, atol=atol, rtol=atol)


@pytest.mark.parametrize("name", slow_but(["qwen3.5", "three values"], CASES))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_implementations_compute_the_definition(name, dtype):
    arrays = make_inputs(name, dtype)
    expected = oracle(name, *arrays)
    check(definition(*arrays, **options(name)), expected)
    check(interpreted(*arrays, **options(name)), expected)


def test_a_window_counts_only_after_a_prefix():
    inputs, *rest, window, parents, begun = make_inputs("qwen3.5")
    changed = jnp.where(begun[:, None, None, None], window, jnp.nan)
    for run in (definition, interpreted):
        found, same = (
            run(inputs, *rest, x, parents, begun, **options("qwen3.5"))
            for x in (window, changed)
        )
        jax.tree.map(np.testing.assert_array_equal, found, same)


@pytest.mark.parametrize("name", slow_but(["three values"], CASES))
def test_the_lowered_kernel_stays_in_bounds_and_writes_every_row_once(name):
    arrays = make_inputs(name)
    found = execute(lambda *a: delta_heads_triton(*a, **options(name)), *arrays)
    check(found, oracle(name, *arrays))


def test_heads_of_other_sizes_have_no_kernel():
    arrays = make_inputs("qwen3.5")
    with pytest.raises(ValueError, match="keys have 12 elements and values 20.*use 'xla'"):
        delta_heads(*arrays, key_dim=12, implementation="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_compiled_kernel_computes_the_definition(name, dtype):
    arrays = make_inputs(name, dtype)
    check(delta_heads_triton(*arrays, **options(name)), oracle(name, *arrays), atol=1e-5)
