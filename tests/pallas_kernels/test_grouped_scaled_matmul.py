"""The grouped product with 8-bit values, both implementations, against a loop over groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_scaled_matmul import grouped_scaled_matmul
from pallas_kernels.grouped_scaled_matmul.triton import (
    grouped_scaled_matmul_triton,
    unsupported,
)
from tests.pallas_kernels import test_scaled_matmul as scaled
from tests.pallas_kernels.ttir_check import execute

GROUPS, COLUMNS, DEPTH = 4, 128, 256


def make_inputs(group_sizes, block=(128, 128)):
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.standard_normal((sum(group_sizes), DEPTH)), jnp.bfloat16)
    values = jnp.asarray(rng.standard_normal((GROUPS, COLUMNS, DEPTH)), jnp.float8_e4m3fn)
    scale = rng.uniform(0.5, 2, (GROUPS, COLUMNS // block[0], DEPTH // block[1]))
    return rows, values, jnp.asarray(scale, jnp.float32), jnp.asarray(group_sizes, jnp.int32)


def oracle(rows, values, scale, group_sizes):
    ends = np.cumsum(group_sizes)
    parts = zip(ends - group_sizes, ends, values, scale, strict=True)
    return np.concatenate([scaled.oracle(rows[a:b], v, s) for a, b, v, s in parts])


@pytest.mark.parametrize(
    "group_sizes, block", [((0, 17, 0, 23), (128, 128)), ((1, 0, 0, 0), (64, 64))]
)
def test_both_implementations_compute_the_definition(group_sizes, block):
    arrays = make_inputs(group_sizes, block)
    expected = oracle(*arrays)
    scaled.assert_close(grouped_scaled_matmul(*arrays, implementation="xla"), expected)
    scaled.assert_close(grouped_scaled_matmul_triton(*arrays, interpret=True), expected)


def test_the_lowered_kernel_stays_in_bounds_and_writes_every_row_once():
    arrays = make_inputs((0, 17, 0, 3))
    (found,) = execute(grouped_scaled_matmul_triton, *arrays)
    scaled.assert_close(found, oracle(*arrays))


def test_shapes_that_the_kernel_does_not_take_are_named():
    rows, values, scale, sizes = make_inputs((1, 0, 0, 0))
    assert unsupported(rows, values, scale) is None
    assert "scales of 32 inputs" in unsupported(rows, values, jnp.ones((GROUPS, 1, 8)))
    rows = rows.astype(jnp.float32)
    with pytest.raises(ValueError, match="rows are float32 .* expected bfloat16.*; use 'xla'"):
        jax.eval_shape(
            lambda *x: grouped_scaled_matmul(*x, implementation="triton"),
            *(rows, values, scale, sizes),
        )
