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

from jaxspec.decoding.logprobs import LogProbs
from jaxspec.decoding.prefill import begin_prefill, end_prefill, prefill_chunk
from jaxspec.decoding.sampling import NO_TOKEN, SamplingRows
from jaxspec.decoding.schedule import Batch, unknown_survivals
from jaxspec.decoding.state import Decoder, Params, Prefilling, Requests
from jaxspec.models.state import LayerStates


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
    return Batch(state, requests.sampling, unknown_survivals(decoder, 1, age))


@functools.partial(jax.jit, donate_argnames="batch")
def place_row(batch: Batch, fresh: Batch, row: jax.Array) -> Batch:
    """Overwrites one row."""
    return _put(batch, fresh, row)


@jax.jit
def move_rows(batch: Batch, rows: jax.Array) -> Batch:
    """A batch of the given rows [B'] of another; -1 gives an empty row."""
    moved = jax.tree.map(lambda x: x[rows], batch)
    return _with_done(moved, moved.state.done | (rows < 0))


@functools.partial(jax.jit, donate_argnames="batch")
def stop_rows(batch: Batch, stopped: jax.Array) -> Batch:
    """Marks the rows of a mask [B] as done."""
    return _with_done(batch, batch.state.done | stopped)


@functools.partial(jax.jit, donate_argnames="batch")
def resume_row(batch: Batch, sampling: SamplingRows, row: jax.Array) -> Batch:
    """Lets a done row go on, with the sampling given [1]."""
    batch = _with_done(batch, batch.state.done.at[row].set(False))
    return dataclasses.replace(batch, sampling=_put(batch.sampling, sampling, row))


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


def _put(rows: Any, new: Any, row: jax.Array) -> Any:
    """Overwrites one row of every leaf."""
    put = jax.lax.dynamic_update_slice_in_dim
    return jax.tree.map(lambda x, one: put(x, one, row, 0), rows, new)


def _with_done(batch: Batch, done: jax.Array) -> Batch:
    state = dataclasses.replace(batch.state, done=done)
    return dataclasses.replace(batch, state=state)
