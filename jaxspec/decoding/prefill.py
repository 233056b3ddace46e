"""Prefill: the target runs on the prompts, chunk by chunk, and decides the first new token."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxspec.decoding.choice import choose, masked
from jaxspec.decoding.logprobs import empty_logprobs, of_path, of_prompts
from jaxspec.decoding.penalties import Written
from jaxspec.decoding.precision import exact_in_float32
from jaxspec.decoding.state import (
    Decoder,
    DecodeState,
    Params,
    Prefilling,
    Requests,
    write_tokens,
)
from jaxspec.drafters.base import Committed
from jaxspec.models.decoder import forward_chain, unembed
from jaxspec.models.state import init_states
from jaxspec.trees.tree import ancestors, root_only


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
    cache = init_states(config, batch, capacity, dtype)
    logprobs = empty_logprobs(batch, capacity, decoder.top_logprobs)
    final = jnp.zeros((batch, config.hidden_size), jnp.float32)
    return Prefilling(cache, drafter, logprobs, final)


@exact_in_float32
def prefill_chunk(
    decoder: Decoder, params: Params, requests: Requests, i: jax.Array, prefilling: Prefilling
) -> Prefilling:
    """Runs the target on chunk i (scalar) of every prompt."""
    batch, drafter, chunk = requests.length.shape[0], decoder.drafter, decoder.chunk
    last = requests.length - 1
    start = i * chunk
    starts = jnp.full(batch, start)
    tokens = jax.lax.dynamic_slice_in_dim(requests.tokens, start, chunk, axis=1)
    output = forward_chain(
        params.target,
        decoder.config,
        tokens,
        prefilling.cache,
        starts,
        taps=drafter.taps,
        implementation=decoder.implementation,
    )
    count = jnp.clip(requests.length - start, 0, chunk)
    observed = Committed(tokens, output.taps, starts, count)
    at = jnp.clip(last - start, 0, chunk - 1)[:, None, None]
    here = jnp.take_along_axis(output.hidden, at, axis=1)[:, 0]
    logprobs = prefilling.logprobs
    if logprobs is not None:
        asked = requests.sampling.logprobs
        logprobs = of_prompts(
            params.target, output.hidden, requests.tokens, start, asked, logprobs
        )
    return Prefilling(
        cache=prefilling.cache.write(output.rows, start, count, after=output.hidden),
        drafter=drafter.observe(params.drafter, prefilling.drafter, observed),
        logprobs=logprobs,
        final=jnp.where((last // chunk == i)[:, None], here, prefilling.final),
    )


@exact_in_float32
def end_prefill(
    params: Params,
    requests: Requests,
    prefilling: Prefilling,
    allowed: jax.Array | None = None,
) -> DecodeState:
    """Decides the first new token of prompts whose chunks have all run.

    Args: allowed: [B, 1, ceil(V / 32)] uint32, bits of the allowed tokens; None allows all.
    """
    batch, capacity = requests.tokens.shape
    logits = unembed(params.target, prefilling.final)[:, None]  # [B, 1, V]
    root = jnp.zeros((batch, 1), jnp.int32)
    tree = root_only(root[:, 0])
    written = Written.before(
        requests.tokens,
        start=requests.length,
        length=requests.length,
        tree=tree,
        ancestors=ancestors(tree),
    )
    first = choose(
        masked(logits, allowed), root, requests.length, requests.sampling, 0, written
    )
    length = requests.length + 1
    stopped = jnp.any(first == requests.sampling.stop_ids, axis=1)
    kept = prefilling.logprobs
    top = 0 if kept is None else kept.top.shape[-1]
    new = of_path(logits, None, root, first, requests.sampling.logprobs, top)

    def write(kept, new):
        return write_tokens(kept, new, requests.length, length)

    return DecodeState(
        tokens=write(requests.tokens, first),
        start=requests.length,
        length=length,
        limit=requests.length + requests.max_new_tokens,
        done=stopped | (requests.max_new_tokens <= 1),
        budget=requests.budget,
        cache=prefilling.cache,
        drafter=prefilling.drafter,
        rounds=jnp.zeros(batch, jnp.int32),
        committed=jnp.zeros((batch, capacity), jnp.int32),
        nodes=jnp.zeros(batch, jnp.int32),
        logprobs=jax.tree.map(write, kept, new),
    )
