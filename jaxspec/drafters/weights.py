"""The weights of a draft head as a pytree, and the head with weights; for every kind of head.

A head is a Flax NNX module in the tree-safe subset (no shared references, no state changed in a
call), which owns construction and initialisation. Every jit boundary is crossed as
`graphdef, weights = nnx.split(head)`: `weights` is an ordinary pytree for jit, optax and orbax,
the graph definition follows from the config, and `bind` joins them at trace time, so a decoding
step contains nothing of the framework.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jaxspec.config import DrafterConfig
from jaxspec.drafters.eagle_head import (
    EagleConfig,
    EagleHead,
    ParallelEagleConfig,
    ParallelEagleHead,
)
from jaxspec.drafters.head import DraftHead

NETWORKS = {
    DrafterConfig: DraftHead,
    EagleConfig: EagleHead,
    ParallelEagleConfig: ParallelEagleHead,
}


def bind(config: DrafterConfig | EagleConfig, weights: nnx.State) -> DraftHead | EagleHead:
    """The head with the given weights; also inside jit."""
    return nnx.merge(_split(config)[0], weights)


def abstract_weights(config: DrafterConfig | EagleConfig, dtype=jnp.float32) -> nnx.State:
    """The shape of every weight as a `ShapeDtypeStruct`, nothing allocated."""
    return _split(config, dtype)[1]


def random_weights(
    config: DrafterConfig | EagleConfig, key: jax.Array, dtype=jnp.float32
) -> nnx.State:
    """Weights of an untrained head. Consumes `key`."""
    head = NETWORKS[type(config)](config, rngs=nnx.Rngs(params=key), dtype=dtype)
    return nnx.state(head)


@functools.lru_cache
def _split(config: DrafterConfig | EagleConfig, dtype=jnp.float32):
    def make():
        return NETWORKS[type(config)](config, rngs=nnx.Rngs(0), dtype=dtype)

    return nnx.split(nnx.eval_shape(make))
