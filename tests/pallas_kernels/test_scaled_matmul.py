"""The product with 8-bit values and scales, both implementations, against its definition."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.scaled_matmul import scaled_matmul, scaled_swiglu
from pallas_kernels.scaled_matmul.config import Tile, choose, unsupported
from pallas_kernels.scaled_matmul.triton import scaled_matmul_triton, scaled_swiglu_triton
from tests.pallas_kernels.ttir_check import execute
from tests.slow import slow_but

BLOCKS, ROWS = (128, 128), (1, 256)  # outputs and inputs that share a scale


def make_inputs(count, columns=128, depth=256, block=BLOCKS):
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.standard_normal((count, depth)), jnp.bfloat16)
    values = jnp.asarray(rng.standard_normal((columns, depth)), jnp.float8_e4m3fn)
    scale = rng.uniform(0.5, 2, (columns // block[0], depth // block[1]))
    return rows, values, jnp.asarray(scale, jnp.float32)


def oracle(rows, values, scale):
    """Element by element of the matrix, in float64."""
    values = np.asarray(values, np.float64)
    outputs, inputs = (n // m for n, m in zip(values.shape, scale.shape, strict=True))
    for i, j in np.ndindex(scale.shape):
        at = np.s_[i * outputs : (i + 1) * outputs, j * inputs : (j + 1) * inputs]
        values[at] *= float(scale[i, j])
    return np.asarray(rows, np.float64) @ values.T


def assert_close(found, expected):
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("count", "block"),
    slow_but(
        [(1, BLOCKS), (16, (64, 64)), (40, ROWS)],
        itertools.product([1, 16, 40], [BLOCKS, (64, 64), ROWS]),
    ),
)
def test_both_implementations_compute_the_definition(count, block):
    arrays = make_inputs(count, block=block)
    expected = oracle(*arrays)
    assert_close(scaled_matmul(*arrays, implementation="xla"), expected)
    assert_close(scaled_matmul_triton(*arrays, interpret=True), expected)


def swiglu(product):
    gate, up = np.split(product, 2, axis=1)
    return gate / (1 + np.exp(-gate)) * up


@pytest.mark.parametrize("count", [1, 40])
def test_swiglu_of_the_product_is_rounded_once(count):
    arrays = make_inputs(count, 256)
    expected = swiglu(oracle(*arrays))
    reference = scaled_swiglu(*arrays, implementation="xla")
    for found in (reference, scaled_swiglu_triton(*arrays, interpret=True)):
        assert found.shape == (count, 128) and found.dtype == jnp.bfloat16
        np.testing.assert_allclose(found.astype(float), expected, rtol=2**-8, atol=1e-4)
    rows, *rest = arrays
    assert_close(scaled_swiglu(rows.astype(jnp.float32), *rest), expected)


@pytest.mark.parametrize("splits", [1, 2])
def test_the_lowered_kernel_stays_in_bounds_and_writes_every_row_once(splits):
    arrays = make_inputs(20, 64, 512, (64, 128))
    tile = Tile(rows=16, columns=32, depth=128, splits=splits, warps=4, stages=2)
    (found,) = execute(lambda *x: scaled_matmul_triton(*x, tile=tile), *arrays)
    assert_close(found, oracle(*arrays))


def test_the_lowered_kernel_with_swiglu():
    arrays = make_inputs(20, 128, 256, (64, 128))
    (found,) = execute(scaled_swiglu_triton, *arrays)
    expected = swiglu(oracle(*arrays))
    np.testing.assert_allclose(found.astype(float), expected, rtol=2**-8, atol=1e-4)


def test_few_rows_take_narrow_tiles_and_more_split_the_inputs():
    qkv, down = (6144, 4096, 32), (4096, 12_288, 96)
    assert choose(1, *qkv) == Tile(16, 32, 128, 1, 4, 6)
    assert choose(1, 24_576, 4096, 32, halves=2) == Tile(16, 32, 128, 1, 4, 6)
    assert choose(64, 24_576, 4096, 32, halves=2) == Tile(64, 64, 128, 1, 8, 4)
    assert choose(64, *qkv) == Tile(64, 64, 128, 1, 8, 4)
    assert choose(64, *down) == Tile(64, 64, 128, 2, 8, 4)
    assert choose(512, *down) == Tile(128, 128, 128, 1, 8, 3)
    assert choose(8, 576, 576, 9) == Tile(16, 32, 64, 1, 4, 6)


def test_float32_rows_are_not_rounded():
    rows, values, scale = make_inputs(3)
    rows = rows.astype(jnp.float32) + 1e-4
    assert_close(scaled_matmul(rows, values, scale), oracle(rows, values, scale))


def test_its_derivative_is_that_of_the_definition():
    rows, values, scale = make_inputs(4)
    loss = lambda x: scaled_matmul(x, values, scale).sum()  # noqa: E731
    expected = oracle(np.eye(256), values, scale).sum(1)
    slope = jax.grad(loss)(rows.astype(jnp.float32))
    np.testing.assert_allclose(slope, np.tile(expected, (4, 1)), rtol=1e-5, atol=1e-3)


def test_shapes_that_the_kernel_does_not_take_are_named():
    rows, values, scale = make_inputs(4)
    assert unsupported(rows, values, scale) is None
    assert "scales of 32 inputs" in unsupported(rows, values, jnp.ones((1, 8)))
    with pytest.raises(ValueError, match="rows are float32 .* expected bfloat16.*; use 'xla'"):
        scaled_matmul(rows.astype(jnp.float32), values, scale, implementation="triton")
