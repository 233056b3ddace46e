"""Residual sum and RMS norm in one kernel, against their definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.add_norm import add_norm
from pallas_kernels.add_norm.triton import add_norm_triton
from pallas_kernels.ttir_check import execute

CASES = [(3, 64, True), (1, 80, True), (5, 80, False)]  # rows, width, with an update


def make_inputs(rows, width, updated, dtype=np.float32):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    return draw(rows, width), draw(rows, width) if updated else None, draw(width).astype(dtype)


def oracle(x, update, gain):
    x = np.asarray(x, np.float64) + (0 if update is None else np.asarray(update, np.float64))
    mean = np.mean(x * x, axis=1, keepdims=True)
    return x, x / np.sqrt(mean + 1e-6) * np.asarray(gain, np.float64)


@pytest.mark.parametrize("case", CASES)
def test_both_implementations_compute_the_definition(case):
    arrays = make_inputs(*case)
    for found in (
        add_norm(*arrays, eps=1e-6, dtype=jnp.float32),
        add_norm_triton(*arrays, eps=1e-6, dtype=jnp.dtype("float32"), interpret=True),
    ):
        for actual, expected in zip(found, oracle(*arrays), strict=True):
            np.testing.assert_allclose(actual, expected, atol=2e-6)


def test_the_lowered_kernel_stays_in_bounds_and_writes_every_row_once():
    arrays = make_inputs(*CASES[1])
    found = execute(
        lambda *a: add_norm_triton(*a, eps=1e-6, dtype=jnp.dtype("float32")), *arrays
    )
    for actual, expected in zip(found, oracle(*arrays), strict=True):
        np.testing.assert_allclose(actual, expected, atol=2e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES, (8, 4096, True), (64, 5120, True)])
def test_the_compiled_kernel_computes_the_definition(case):
    arrays = make_inputs(*case, dtype=jnp.bfloat16)
    found = jax.device_get(add_norm_triton(*arrays, eps=1e-6, dtype=jnp.dtype("bfloat16")))
    for actual, expected, atol in zip(found, oracle(*arrays), (1e-6, 0.04), strict=True):
        np.testing.assert_allclose(np.asarray(actual, np.float64), expected, atol=atol)
