"""Numbers that tell whether arrays are what they were."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.checkpoints.checksums import checksums

DTYPES = ["float32", "bfloat16", "float16", "int32", "int8", "bool"]


def test_literal_sums():
    tree = {"a": jnp.array([1, 2, 3], jnp.uint32), "b": {"c": jnp.uint8(7)}}
    assert checksums(tree) == {"a": 1 * 1 + 2 * 3 + 3 * 5, "b.c": 7}
    assert checksums(jnp.array([[1], [2]], jnp.int16)) == {"": 7}


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_counts(dtype):
    x = np.array(jax.random.normal(jax.random.key(0), (3, 5, 7)), jnp.dtype(dtype))
    before, raw = checksums(jnp.asarray(x)), x.reshape(-1).view(np.uint8)
    for at in range(0, len(raw), 7):
        for bit in (1,) if dtype == "bool" else (1, 16, 128):
            raw[at] ^= bit
            assert checksums(jnp.asarray(x)) != before
            raw[at] ^= bit
    assert checksums(jnp.asarray(x)) == before


def test_order_counts():
    x = jnp.arange(24.0).reshape(4, 6)
    assert checksums(x) != checksums(x[::-1]) != checksums(x.T)
