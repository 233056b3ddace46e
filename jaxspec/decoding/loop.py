"""Rounds until every row is done, on the device.

`decode` runs rounds in a `lax.while_loop`, without a transfer to the host; streaming calls the
same compiled program for a few rounds at a time.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxspec.decoding.round import decode_round
from jaxspec.decoding.sampling import SamplingRows
from jaxspec.decoding.state import Decoder, DecodeState, Params


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
