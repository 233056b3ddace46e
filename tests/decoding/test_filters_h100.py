"""The filters of sampled choices, compiled for an H100: few passes over the vocabulary."""

import jax
import jax.numpy as jnp
import pytest

from jaxspec.decoding.filters import kept

pytestmark = pytest.mark.h100

NODES, VOCAB = 16, 151_936  # as many as are chosen for at a time


def test_the_likeliest_tokens_take_few_kernels():
    """Bisecting the whole vocabulary, where they do not suffice, takes several hundred."""
    from pallas_kernels.h100.compile import compile_for_h100
    from pallas_kernels.h100.target import mesh

    sharding = jax.sharding.NamedSharding(mesh(), jax.sharding.PartitionSpec())

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    share = array(jnp.float32, 1)
    options = (array(jnp.int32, 1), share, share)
    logits = array(jnp.float32, 1, NODES, VOCAB)
    module = compile_for_h100(jax.jit(kept), logits, *options).module
    assert module.host_transfers() == []
    assert module.launches() <= 25
    assert module.moved_bytes() <= 5 * NODES * VOCAB * 4
