"""What the frozen target computes on known sequences."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxspec.config import TargetConfig
from jaxspec.models.cache import init_cache
from jaxspec.models.decoder import forward
from jaxspec.models.params import TargetParams
from jaxspec.trees.tree import causal_bits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Features:
    """The target's view of sequences of T tokens.

    Attributes:
      hidden: [B, T, M], after the final norm: the LM head turns it into logits.
      taps: [B, T, len(taps) * M].
    """

    hidden: jax.Array
    taps: jax.Array


def target_features(
    params: TargetParams,
    config: TargetConfig,
    tokens: jax.Array,
    *,
    taps: tuple[int, ...],
    chunk: int = 256,
    implementation: str | None = None,
) -> Features:
    """Runs the target over whole sequences, `chunk` tokens at a time, no logits computed.

    Args:
      tokens: [B, T] int32; T is at most `chunk` or a multiple of it.

    Returns:
      In the dtype of the weights.
    """
    batch, length = tokens.shape
    size = min(chunk, length)
    if length % size:
        raise ValueError(f"{length} tokens are not a multiple of the chunk of {size}")
    dtype = params.embed.dtype
    cache = init_cache(
        config.num_layers, batch, config.num_kv_heads, length, config.head_dim, dtype
    )
    bits = causal_bits(size)
    bits = jnp.broadcast_to(bits, (batch, *bits.shape))
    depths = jnp.broadcast_to(jnp.arange(size), (batch, size))

    def step(carry, tokens):
        cache, start = carry
        starts = jnp.full(batch, start)
        output = forward(
            params,
            config,
            tokens,
            depths,
            bits,
            cache,
            starts,
            taps=taps,
            implementation=implementation,
        )
        cache = cache.write(output.rows, start, after=output.hidden)
        features = Features(output.hidden.astype(dtype), output.taps.astype(dtype))
        return (cache, start + size), features

    chunks = jnp.moveaxis(tokens.reshape(batch, -1, size), 1, 0)
    _, features = jax.lax.scan(step, (cache, jnp.int32(0)), chunks)

    def join(x):
        return jnp.moveaxis(x, 0, 1).reshape(batch, length, -1)

    return jax.lax.stop_gradient(jax.tree.map(join, features))
