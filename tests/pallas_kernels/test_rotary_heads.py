"""Head norm, rotation and rounding in one kernel, against their definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.rotary_heads import rotary_heads
from pallas_kernels.rotary_heads.triton import rotary_heads_triton, unsupported
from pallas_kernels.ttir_check import execute

# rows, padding, key/value heads, group, head dim, bias, norm
CASES = {
    "qwen3": (3, 5, 2, 4, 32, False, True),
    "llama": (4, 0, 3, 1, 16, False, False),
    "qwen2": (1, 7, 2, 7, 16, True, False),
    "everything": (2, 1, 1, 3, 16, True, True),
}


def make_inputs(name, dtype=np.float32):
    rows, padding, kv_heads, group, dim, biased, normed = CASES[name]
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)  # noqa: E731
    angle = rng.uniform(0, 6, (rows, dim // 2))
    return (
        jnp.asarray(draw(rows + padding, kv_heads, group + 2, dim), jnp.float32),
        draw(kv_heads, group + 2, dim) if biased else None,
        draw(dim) if normed else None,
        draw(dim) if normed else None,
        jnp.asarray(np.cos(angle), jnp.float32),
        jnp.asarray(np.sin(angle), jnp.float32),
    )


def oracle(qkv, bias, q_gain, k_gain, cos, sin, eps):
    """Head by head, in float64."""
    rows, half = cos.shape
    x = np.asarray(qkv, np.float64)[:rows]
    x = x if bias is None else x + np.asarray(bias, np.float64)
    outputs = [[], [], []]
    for row in range(rows):
        for head in x[row]:
            for i, vector in enumerate(head):
                kind = (0, 1, 2)[max(0, i - len(head) + 3)]
                gain = (q_gain, k_gain, None)[kind]
                if gain is not None:
                    vector = vector / np.sqrt(np.mean(vector**2) + eps) * np.asarray(gain)
                if kind < 2:
                    turn = np.asarray(cos[row]) + 1j * np.asarray(sin[row])
                    turned = (vector[:half] + 1j * vector[half:]) * turn
                    vector = np.concatenate([turned.real, turned.imag])
                outputs[kind].append(vector)
    return [np.reshape(x, (rows, -1, 2 * half)) for x in outputs]


@pytest.mark.parametrize("name", CASES)
def test_both_implementations_compute_the_definition(name):
    arrays, options = make_inputs(name), dict(eps=1e-6, dtype=jnp.float32)
    for found in (
        rotary_heads(*arrays, **options),
        rotary_heads_triton(*arrays, eps=1e-6, dtype=jnp.dtype("float32"), interpret=True),
    ):
        for actual, expected in zip(found, oracle(*arrays, 1e-6), strict=True):
            np.testing.assert_allclose(actual, expected, atol=3e-6)


@pytest.mark.parametrize("name", ["qwen3", "everything"])
def test_the_lowered_kernel_stays_in_bounds_and_writes_every_row_once(name):
    arrays = make_inputs(name)
    found = execute(
        lambda *a: rotary_heads_triton(*a, eps=1e-6, dtype=jnp.dtype("float32")), *arrays
    )
    for actual, expected in zip(found, oracle(*arrays, 1e-6), strict=True):
        np.testing.assert_allclose(actual, expected, atol=3e-6)


def test_partial_rotation_leaves_the_rest_and_has_no_kernel():
    qkv, _, _, _, cos, sin = make_inputs("llama")
    q, k, v = rotary_heads(
        qkv, None, None, None, cos[:, :3], sin[:, :3], eps=0.0, dtype=jnp.float32
    )
    np.testing.assert_array_equal(k[..., 6:], qkv[:, :, 1, 6:])
    assert not np.allclose(k[..., :6], qkv[:, :, 1, :6])
    np.testing.assert_array_equal(v, qkv[:, :, 2])
    assert "rotate 6" in unsupported(qkv, cos[:, :3])
    with pytest.raises(ValueError, match="use 'xla'"):
        rotary_heads(
            qkv, None, None, None, cos[:, :3], sin[:, :3], eps=0.0, dtype=jnp.float32,
            implementation="triton",
        )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_compiled_kernel_computes_the_definition(name, dtype):
    arrays = make_inputs(name, dtype)
    found = rotary_heads_triton(*arrays, eps=1e-6, dtype=jnp.dtype(dtype))
    atol = 1e-5 if dtype == "float32" else 0.04
    for actual, expected in zip(jax.device_get(found), oracle(*arrays, 1e-6), strict=True):
        np.testing.assert_allclose(np.asarray(actual, np.float64), expected, atol=atol)
