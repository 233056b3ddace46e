"""Head norm, rotation and rounding in one kernel, against their definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.rotary_heads import rotary_heads
from pallas_kernels.rotary_heads.triton import rotary_heads_triton
from tests.pallas_kernels.ttir_check import execute
from tests.slow import slow_but

# rows, padding, key/value heads, group, head dim, pairs that turn, bias, norm, gates
CASES = {
    "qwen3": (3, 5, 2, 4, 32, 16, False, True, False),
    "llama": (4, 0, 3, 1, 16, 8, False, False, False),
    "qwen2": (1, 7, 2, 7, 16, 8, True, False, False),
    "qwen3.5": (3, 1, 2, 3, 32, 4, False, True, True),
    "three of eight pairs": (2, 0, 1, 2, 16, 3, False, False, False),
    "everything": (2, 1, 1, 3, 16, 4, True, True, True),
}

definition = jax.jit(rotary_heads, static_argnames=("eps", "dtype", "gated"))


def make_inputs(name, dtype=np.float32):
    rows, padding, kv_heads, group, dim, pairs, biased, normed, gated = CASES[name]
    columns = (2 if gated else 1) * group + 2
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)  # noqa: E731
    angle = rng.uniform(0, 6, (rows, pairs))
    return (
        jnp.asarray(draw(rows + padding, kv_heads, columns, dim), jnp.float32),
        draw(kv_heads, columns, dim) if biased else None,
        draw(dim) if normed else None,
        draw(dim) if normed else None,
        jnp.asarray(np.cos(angle), jnp.float32),
        jnp.asarray(np.sin(angle), jnp.float32),
    )


def options(name, dtype="float32"):
    return dict(eps=1e-6, dtype=jnp.dtype(dtype), gated=CASES[name][-1])


def oracle(name, qkv, bias, q_gain, k_gain, cos, sin, eps=1e-6):
    """Head by head, in float64."""
    rows, pairs = cos.shape
    x = np.asarray(qkv, np.float64)[:rows]
    x = x if bias is None else x + np.asarray(bias, np.float64)
    outputs = [[], [], []]
    for row in range(rows):
        for head in x[row]:
            if CASES[name][-1]:
                head = np.concatenate([head[:-2:2], head[-2:]])
            for i, vector in enumerate(head):
                kind = (0, 1, 2)[max(0, i - len(head) + 3)]
                gain = (q_gain, k_gain, None)[kind]
                if gain is not None:
                    vector = vector / np.sqrt(np.mean(vector**2) + eps) * np.asarray(gain)
                if kind < 2:
                    turn = np.asarray(cos[row]) + 1j * np.asarray(sin[row])
                    turned = (vector[:pairs] + 1j * vector[pairs : 2 * pairs]) * turn
                    rest = vector[2 * pairs :]
                    vector = np.concatenate([turned.real, turned.imag, rest])
                outputs[kind].append(vector)
    return [np.reshape(found, (rows, -1, qkv.shape[-1])) for found in outputs]


@pytest.mark.parametrize("name", slow_but(["llama", "qwen3.5", "everything"], CASES))
def test_both_implementations_compute_the_definition(name):
    arrays = make_inputs(name)
    for found in (
        definition(*arrays, **options(name)),
        rotary_heads_triton(*arrays, **options(name), interpret=True),
    ):
        for actual, expected in zip(found, oracle(name, *arrays), strict=True):
            np.testing.assert_allclose(actual, expected, atol=3e-6)


def test_a_narrow_projection_is_widened_first():
    qkv, *rest = make_inputs("qwen2")
    narrow = qkv.astype(jnp.bfloat16)
    expected = definition(narrow.astype(jnp.float32), *rest, **options("qwen2"))
    for found in (
        definition(narrow, *rest, **options("qwen2")),
        rotary_heads_triton(narrow, *rest, **options("qwen2"), interpret=True),
    ):
        for actual, wanted in zip(found, expected, strict=True):
            np.testing.assert_allclose(actual, wanted, atol=3e-6)


@pytest.mark.parametrize(
    "name", slow_but(["everything"], ["qwen3", "three of eight pairs", "everything"])
)
def test_the_lowered_kernel_stays_in_bounds_and_writes_every_row_once(name):
    arrays = make_inputs(name)
    found = execute(lambda *a: rotary_heads_triton(*a, **options(name)), *arrays)
    for actual, expected in zip(found, oracle(name, *arrays), strict=True):
        np.testing.assert_allclose(actual, expected, atol=3e-6)


def test_heads_of_other_sizes_have_no_kernel():
    qkv, *rest = make_inputs("llama")
    with pytest.raises(ValueError, match="heads have 12 elements.*use 'xla'"):
        rotary_heads(qkv[..., :12], *rest, **options("llama"), implementation="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_compiled_kernel_computes_the_definition(name, dtype):
    arrays = make_inputs(name, dtype)
    found = rotary_heads_triton(*arrays, **options(name, dtype))
    atol = 1e-5 if dtype == "float32" else 0.04
    for actual, expected in zip(jax.device_get(found), oracle(name, *arrays), strict=True):
        np.testing.assert_allclose(np.asarray(actual, np.float64), expected, atol=atol)
