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
    # One chunk has no prefix. A cache of one row, unseen, keeps XLA from folding masks of T².
    capacity = length if length > size else 1
    cache = init_cache(
        config.num_layers, batch, config.num_kv_heads, capacity, config.head_dim, dtype
    )
    bits = causal_bits(size)
    bits = jnp.broadcast_to(bits, (batch, *bits.shape))
    depths = jnp.broadcast_to(jnp.arange(size), (batch, size))

    def run(tokens, cache, start):
        return forward(
            params,
            config,
            tokens,
            depths,
            bits,
            cache,
            jnp.full(batch, start),
            taps=taps,
            implementation=implementation,
        )

    def features(output):
        return Features(output.hidden.astype(dtype), output.taps.astype(dtype))

    def step(carry, tokens):
        cache, start = carry
        output = run(tokens, cache, start)
        cache = cache.write(output.rows, start, after=output.hidden)
        return (cache, start + size), features(output)

    if length == size:
        return jax.lax.stop_gradient(features(run(tokens, cache, 0)))
    chunks = jnp.moveaxis(tokens.reshape(batch, -1, size), 1, 0)
    _, stacked = jax.lax.scan(step, (cache, jnp.int32(0)), chunks)

    def join(x):
        return jnp.moveaxis(x, 0, 1).reshape(batch, length, -1)

    return jax.lax.stop_gradient(jax.tree.map(join, stacked))
