"""The device side of continuous batching: filling, moving and freeing rows.

A batch has one of a few numbers of rows (1, 2, 4, … slots) and grows or shrinks to the next,
so that a single request does not pay for empty slots. A prompt runs chunk by chunk in its own
batch of one row, which is copied into a free row when it is done.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxspec.decoding.habit import UNKNOWN
from jaxspec.decoding.logprobs import LogProbs
from jaxspec.decoding.prefill import begin_prefill, end_prefill, prefill_chunk
from jaxspec.decoding.sampling import NO_TOKEN, greedy_rows
from jaxspec.decoding.schedule import Batch
from jaxspec.decoding.state import Decoder, DecodeState, Params, Prefilling, Requests
from jaxspec.models.state import LayerStates


@functools.partial(jax.jit, static_argnames=("decoder", "rows", "capacity", "age"))
def empty_rows(
    decoder: Decoder, params: Params, *, rows: int, capacity: int, age: int
) -> Batch:
    """A batch whose rows are all done."""
    prefilling = begin_prefill(decoder, params, rows, capacity)
    zeros = lambda dtype: jnp.zeros(rows, dtype)  # noqa: E731
    state = DecodeState(
        tokens=jnp.zeros((rows, capacity), jnp.int32),
        start=zeros(jnp.int32) + 1,
        length=zeros(jnp.int32) + 1,
        limit=zeros(jnp.int32) + 1,
        done=zeros(bool) | True,
        budget=zeros(jnp.int32) + decoder.drafter.size,
        cache=prefilling.cache,
        drafter=prefilling.drafter,
        rounds=zeros(jnp.int32),
        committed=jnp.zeros((rows, capacity), jnp.int32),
        nodes=zeros(jnp.int32),
        logprobs=prefilling.logprobs,
    )
    sampling = greedy_rows(jax.random.split(jax.random.key(0), rows))
    return Batch(state, sampling, _unknown(decoder, rows, age))


@functools.partial(jax.jit, static_argnames=("decoder", "capacity"))
def begin_prompt(decoder: Decoder, params: Params, *, capacity: int) -> Prefilling:
    """Empty caches for one prompt."""
    return begin_prefill(decoder, params, 1, capacity)


@functools.partial(jax.jit, static_argnames="decoder", donate_argnames="prefilling")
def run_chunk(
    decoder: Decoder, params: Params, requests: Requests, i: jax.Array, prefilling: Prefilling
) -> Prefilling:
    """Chunk i of one prompt."""
    return prefill_chunk(decoder, params, requests, i, prefilling)


@functools.partial(jax.jit, static_argnames=("decoder", "age"), donate_argnames="held")
def end_prompt(
    decoder: Decoder,
    params: Params,
    requests: Requests,
    final: jax.Array,
    held: tuple[LayerStates, Any, LogProbs | None],
    allowed: jax.Array | None = None,
    *,
    age: int,
) -> Batch:
    """The first new token, and a batch of one row ready to `place_row`.

    Args:
      final: `Prefilling.final`.
      held: the cache, drafter's state and log-probabilities of `Prefilling`.
      allowed: as for `end_prefill`.
    """
    state = end_prefill(params, requests, Prefilling(*held, final), allowed)
    return Batch(state, requests.sampling, _unknown(decoder, 1, age))


@functools.partial(jax.jit, donate_argnames="batch")
def place_row(batch: Batch, fresh: Batch, row: jax.Array) -> Batch:
    """Overwrites one row."""
    put = jax.lax.dynamic_update_slice_in_dim
    return jax.tree.map(lambda x, new: put(x, new, row, 0), batch, fresh)


@jax.jit
def move_rows(batch: Batch, rows: jax.Array) -> Batch:
    """A batch of the given rows [B'] of another; -1 gives an empty row."""
    moved = jax.tree.map(lambda x: x[rows], batch)
    return _with_done(moved, moved.state.done | (rows < 0))


@functools.partial(jax.jit, donate_argnames="batch")
def stop_rows(batch: Batch, stopped: jax.Array) -> Batch:
    """Marks the rows of a mask [B] as done."""
    return _with_done(batch, batch.state.done | stopped)


@functools.partial(jax.jit, static_argnames="width")
def recent_tokens(batch: Batch, start: jax.Array, *, width: int) -> jax.Array:
    """The tokens [B, width] from position `start` [B] on."""
    index = start[:, None] + jnp.arange(width)
    return batch.state.tokens.at[jnp.arange(start.shape[0])[:, None], index].get(
        mode="fill", fill_value=NO_TOKEN
    )


@functools.partial(jax.jit, static_argnames="width")
def recent_logprobs(batch: Batch, start: jax.Array, *, width: int) -> LogProbs | None:
    """Log-probabilities of `recent_tokens`; past a row's end, those of its last position."""
    index = start[:, None] + jnp.arange(width)
    row = jnp.arange(start.shape[0])[:, None]
    return jax.tree.map(lambda x: x.at[row, index].get(mode="clip"), batch.state.logprobs)


def _with_done(batch: Batch, done: jax.Array) -> Batch:
    state = dataclasses.replace(batch.state, done=done)
    return dataclasses.replace(batch, state=state)


def _unknown(decoder: Decoder, rows: int, age: int) -> jax.Array:
    return jnp.full((rows, age, decoder.drafter.size - 1), UNKNOWN, jnp.float32)
