"""Prefill and the round: draft, verify, accept, commit. All of it runs on the device.

`decode` runs rounds in a `lax.while_loop`, without a transfer to the host; streaming calls the
same compiled program for a few rounds at a time.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxspec.config import TargetConfig
from jaxspec.decoding.accept import accept
from jaxspec.decoding.commit import commit, write_tokens
from jaxspec.decoding.reject import accept_sampled, round_keys
from jaxspec.decoding.sampling import SamplingRows, choose, log_law
from jaxspec.decoding.state import DecodeState
from jaxspec.drafters.base import Committed, Drafter
from jaxspec.models.cache import init_cache
from jaxspec.models.decoder import forward, unembed
from jaxspec.models.params import TargetParams
from jaxspec.trees.tree import ancestors, causal_bits, chain


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The static half of decoding: hashable, an argument of every jitted function here.

    Attributes:
      config: of the target.
      drafter: proposes trees.
      chunk: prompt tokens per forward; capacities are multiples of it.
      rejection: the drafter draws chains (`draft_sampled`), verified by rejection sampling;
        otherwise trees are verified by sample-then-match. Both are lossless; only the latter
        gives plain sampling's tokens at the same seed.
      implementation: of tree attention.
    """

    config: TargetConfig
    drafter: Drafter
    rejection: bool = False
    chunk: int = 128
    implementation: str | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Params:
    """The weights a round reads."""

    target: TargetParams
    drafter: Any


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


@functools.partial(jax.jit, static_argnames="decoder")
def prefill(decoder: Decoder, params: Params, requests: Requests) -> DecodeState:
    """Runs the target on the prompts, chunk by chunk, and decides the first new token."""
    batch, capacity = requests.tokens.shape
    config, drafter, chunk = decoder.config, decoder.drafter, decoder.chunk
    cache = init_cache(
        config.num_layers,
        batch,
        config.num_kv_heads,
        capacity,
        config.head_dim,
        params.target.embed.dtype,
    )
    drafter_state = drafter.init(params.drafter, batch, capacity)
    bits = jnp.broadcast_to(causal_bits(chunk), (batch, chunk, causal_bits(chunk).shape[-1]))
    depths = jnp.broadcast_to(jnp.arange(chunk), (batch, chunk))
    last = requests.length - 1

    def run_chunk(i, carry):
        cache, drafter_state, final = carry
        start = i * chunk
        starts = jnp.full(batch, start)
        tokens = jax.lax.dynamic_slice_in_dim(requests.tokens, start, chunk, axis=1)
        output = forward(
            params.target,
            config,
            tokens,
            depths,
            bits,
            cache,
            starts,
            taps=drafter.taps,
            implementation=decoder.implementation,
        )
        count = jnp.clip(requests.length - start, 0, chunk)
        observed = Committed(tokens, output.taps, starts, count)
        at = jnp.clip(last - start, 0, chunk - 1)[:, None, None]
        here = jnp.take_along_axis(output.hidden, at, axis=1)[:, 0]
        return (
            cache.write(output.rows, start, after=output.hidden),
            drafter.observe(params.drafter, drafter_state, observed),
            jnp.where((last // chunk == i)[:, None], here, final),
        )

    final = jnp.zeros((batch, config.hidden_size), jnp.float32)
    chunks = jnp.max(last) // chunk + 1
    cache, drafter_state, final = jax.lax.fori_loop(
        0, chunks, run_chunk, (cache, drafter_state, final)
    )
    logits = unembed(params.target, final)[:, None]  # [B, 1, V]
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
        cache=cache,
        drafter=drafter_state,
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


def decode_round(
    decoder: Decoder, params: Params, state: DecodeState, sampling: SamplingRows
) -> DecodeState:
    """One round: draft a tree, verify it in one forward, accept a path, commit it."""
    drafter, position = decoder.drafter, state.length - 1
    anchor = jnp.take_along_axis(state.tokens, position[:, None], axis=1)[:, 0]
    drafted_from = params.drafter, state.drafter, anchor, position
    if decoder.rejection:
        draft_keys, verify_keys = round_keys(sampling.key, position)
        drawn, drafted = drafter.draft_sampled(*drafted_from, sampling.temperature, draft_keys)
        lengths = jnp.minimum(drawn.lengths, jnp.minimum(state.budget, drafter.size) - 1)
        tree = chain(anchor, drawn.tokens, lengths, size=drafter.size)
    else:
        tree, drafted = drafter.draft(*drafted_from, state.budget)
    state = dataclasses.replace(state, drafter=drafted)

    bits = ancestors(tree)
    output = forward(
        params.target,
        decoder.config,
        tree.tokens,
        tree.depths,
        bits,
        state.cache,
        position,
        taps=drafter.taps,
        implementation=decoder.implementation,
    )
    logits = unembed(params.target, output.hidden)
    if decoder.rejection:
        laws = log_law(logits[:, : drafter.depth + 1], sampling)
        acceptance = accept_sampled(laws, drawn.tokens, drawn.log_q, lengths, verify_keys)
    else:
        choices = choose(logits, tree.depths, position + 1, sampling, drafter.depth)
        acceptance = accept(tree, bits, choices, drafter.depth)
    return commit(state, drafter, params.drafter, tree, acceptance, output, sampling.stop_ids)
