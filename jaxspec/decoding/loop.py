"""Prefill, and rounds until every row is done. All of it runs on the device.

`decode` runs rounds in a `lax.while_loop`, without a transfer to the host; streaming calls the
same compiled program for a few rounds at a time.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxspec.decoding.commit import write_tokens
from jaxspec.decoding.round import Decoder, Params, decode_round
from jaxspec.decoding.sampling import SamplingRows, choose
from jaxspec.decoding.state import DecodeState
from jaxspec.drafters.base import Committed
from jaxspec.models.cache import KVCache, init_cache
from jaxspec.models.decoder import forward, unembed
from jaxspec.trees.tree import causal_bits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Requests:
    """A batch to decode.

    Attributes:
      tokens: [B, S] int32, prompts at the left; S is the capacity, a multiple of the chunk, and
        leaves P + 1 places after the last token of every row.
      length: [B] int32, prompt lengths, at least 1.
      max_new_tokens: [B] int32, at least 1.
      budget: [B] int32, nodes verified per round, root included, 1 … N.
      sampling: how each row chooses.
    """

    tokens: jax.Array
    length: jax.Array
    max_new_tokens: jax.Array
    budget: jax.Array
    sampling: SamplingRows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefilling:
    """A batch of prompts on its way through the target.

    Attributes:
      cache, drafter: as in `DecodeState`.
      final: [B, M] float32, hidden state at the last prompt token, once its chunk has run.
    """

    cache: KVCache
    drafter: Any
    final: jax.Array


@functools.partial(jax.jit, static_argnames="decoder")
def prefill(decoder: Decoder, params: Params, requests: Requests) -> DecodeState:
    """Runs the target on the prompts, chunk by chunk, and decides the first new token."""
    batch, capacity = requests.tokens.shape
    prefilling = begin_prefill(decoder, params, batch, capacity)

    def chunk(i, prefilling):
        return prefill_chunk(decoder, params, requests, i, prefilling)

    chunks = jnp.max(requests.length - 1) // decoder.chunk + 1
    prefilling = jax.lax.fori_loop(0, chunks, chunk, prefilling)
    return end_prefill(params, requests, prefilling)


def begin_prefill(decoder: Decoder, params: Params, batch: int, capacity: int) -> Prefilling:
    """Empty caches for `batch` prompts, the drafter's in the dtype of the target's."""
    config = decoder.config
    dtype = decoder.cache_dtype or params.target.embed.dtype
    drafter = decoder.drafter.init(params.drafter, batch, capacity)
    drafter = jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, drafter
    )
    cache = init_cache(
        config.num_layers,
        batch,
        config.num_kv_heads,
        capacity,
        config.head_dim,
        dtype,
    )
    return Prefilling(cache, drafter, jnp.zeros((batch, config.hidden_size), jnp.float32))


def prefill_chunk(
    decoder: Decoder, params: Params, requests: Requests, i: jax.Array, prefilling: Prefilling
) -> Prefilling:
    """Runs the target on chunk i (scalar) of every prompt."""
    batch, drafter, chunk = requests.length.shape[0], decoder.drafter, decoder.chunk
    bits = jnp.broadcast_to(causal_bits(chunk), (batch, chunk, causal_bits(chunk).shape[-1]))
    depths = jnp.broadcast_to(jnp.arange(chunk), (batch, chunk))
    last = requests.length - 1
    start = i * chunk
    starts = jnp.full(batch, start)
    tokens = jax.lax.dynamic_slice_in_dim(requests.tokens, start, chunk, axis=1)
    output = forward(
        params.target,
        decoder.config,
        tokens,
        depths,
        bits,
        prefilling.cache,
        starts,
        taps=drafter.taps,
        implementation=decoder.implementation,
    )
    count = jnp.clip(requests.length - start, 0, chunk)
    observed = Committed(tokens, output.taps, starts, count)
    at = jnp.clip(last - start, 0, chunk - 1)[:, None, None]
    here = jnp.take_along_axis(output.hidden, at, axis=1)[:, 0]
    return Prefilling(
        cache=prefilling.cache.write(output.rows, start, after=output.hidden),
        drafter=drafter.observe(params.drafter, prefilling.drafter, observed),
        final=jnp.where((last // chunk == i)[:, None], here, prefilling.final),
    )


def end_prefill(params: Params, requests: Requests, prefilling: Prefilling) -> DecodeState:
    """Decides the first new token of prompts whose chunks have all run."""
    batch, capacity = requests.tokens.shape
    logits = unembed(params.target, prefilling.final)[:, None]  # [B, 1, V]
    root = jnp.zeros((batch, 1), jnp.int32)
    first = choose(logits, root, requests.length, requests.sampling, 0)
    length = requests.length + 1
    stopped = jnp.any(first == requests.sampling.stop_ids, axis=1)
    return DecodeState(
        tokens=write_tokens(requests.tokens, first, requests.length, length),
        length=length,
        limit=requests.length + requests.max_new_tokens,
        done=stopped | (requests.max_new_tokens <= 1),
        budget=requests.budget,
        cache=prefilling.cache,
        drafter=prefilling.drafter,
        rounds=jnp.zeros(batch, jnp.int32),
        committed=jnp.zeros((batch, capacity), jnp.int32),
        nodes=jnp.zeros(batch, jnp.int32),
    )


@functools.partial(jax.jit, static_argnames="decoder", donate_argnames="state")
def decode(
    decoder: Decoder,
    params: Params,
    state: DecodeState,
    sampling: SamplingRows,
    rounds: jax.Array,
) -> DecodeState:
    """Runs up to `rounds` (a scalar) rounds, or until every row is done."""

    def unfinished(carry):
        i, state = carry
        return (i < rounds) & ~jnp.all(state.done)

    def step(carry):
        i, state = carry
        return i + 1, decode_round(decoder, params, state, sampling)

    return jax.lax.while_loop(unfinished, step, (jnp.int32(0), state))[1]
