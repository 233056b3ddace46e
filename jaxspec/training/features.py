"""Features: the frozen target's outputs on known sequences."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxspec.config import TargetConfig
from jaxspec.models.decoder import forward_chain
from jaxspec.models.params import TargetParams
from jaxspec.models.state import init_states


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Features:
    """The target's outputs on sequences of T tokens.

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
    starts: jax.Array | None = None,
    *,
    taps: tuple[int, ...],
    chunk: int = 256,
) -> Features:
    """Runs the target over whole sequences, `chunk` tokens at a time, no logits computed.

    Args:
      tokens: [B, T] int32; T is at most `chunk` or a multiple of it.
      starts: [B, T] int32, first position of the sequence a token belongs to, where rows hold
        several; multiples of `chunk`. A sequence's first chunk sees an empty cache, so that no
        other mask is needed.

    Returns:
      In the dtype of the weights.
    """
    batch, length = tokens.shape
    size = min(chunk, length)
    if length % size:
        raise ValueError(f"tokens has length {length}; expected a multiple of chunk = {size}")
    dtype = params.embed.dtype
    # One chunk has no prefix. A cache of one row, unseen, keeps XLA from folding masks of T².
    capacity = length if length > size else 1
    cache = init_states(config, batch, capacity, dtype)
    whole = jnp.full(batch, size)

    def run(tokens, cache, length):
        lengths = jnp.broadcast_to(length, batch)
        return forward_chain(params, config, tokens, cache, lengths, taps=taps)

    def features(output):
        return Features(output.hidden.astype(dtype), output.taps.astype(dtype))

    def step(cache, chunk):
        tokens, length = chunk
        output = run(tokens, cache, length)
        cache = cache.write(output.rows, length, whole, after=output.hidden)
        return cache, features(output)

    if length == size:
        return jax.lax.stop_gradient(features(run(tokens, cache, 0)))
    chunks = jnp.moveaxis(tokens.reshape(batch, -1, size), 1, 0)
    lengths = jnp.arange(0, length, size)  # of what is in the cache
    if starts is not None:
        lengths = lengths[:, None] - starts[:, ::size].T
    _, stacked = jax.lax.scan(step, cache, (chunks, lengths))

    def join(x):
        return jnp.moveaxis(x, 0, 1).reshape(batch, length, -1)

    return jax.lax.stop_gradient(jax.tree.map(join, stacked))
