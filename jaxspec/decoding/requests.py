"""Between Python lists and the arrays of a batch; shapes come in buckets, so that few programs
are compiled."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from jaxspec.decoding.sampling import NO_TOKEN, Sampling, SamplingRows
from jaxspec.decoding.state import Decoder, DecodeState, Requests
from jaxspec.decoding.stats import DecodeStats

MAX_STOP_IDS = 8


def capacity_for(tokens: int, decoder: Decoder) -> int:
    """S for rows of `tokens` tokens: 2, 3, 4, 6, 8, 12, … chunks, P + 1 places to spare."""
    chunks = -(-(tokens + decoder.drafter.depth + 1) // decoder.chunk)
    power = 1 << (chunks - 1).bit_length()
    return decoder.chunk * max(2, power * 3 // 4 if power * 3 // 4 >= chunks else power)


def pack(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    batch: int,
    capacity: int,
    max_new_tokens: int,
    budget: int,
    sampling: Sequence[Sampling],
    keys: jax.Array,
) -> Requests:
    """Arrays for `prompts`; rows beyond them are empty requests that are done at once.

    Args:
      batch: B, at least the number of prompts.
      capacity: S, from `capacity_for`.
      sampling: one per prompt.
      keys: [len(prompts)] typed keys.
    """
    count = len(prompts)
    tokens = np.zeros((batch, capacity), np.int32)
    length, new_tokens = np.ones(batch, np.int32), np.ones(batch, np.int32)
    new_tokens[:count] = max_new_tokens
    stop_ids = np.full((batch, MAX_STOP_IDS), NO_TOKEN, np.int32)
    for row, (prompt, options) in enumerate(zip(prompts, sampling, strict=True)):
        tokens[row, : len(prompt)] = prompt
        length[row] = len(prompt)
        stops = options.stop_ids
        stops = decoder.config.eos_token_ids if stops is None else stops
        if len(stops) > MAX_STOP_IDS:
            raise ValueError(f"{len(stops)} stop ids were given; at most {MAX_STOP_IDS} fit")
        stop_ids[row, : len(stops)] = stops

    def column(name, dtype):
        values = [getattr(options, name) for options in sampling]
        return np.array(values + [getattr(Sampling(), name)] * (batch - count), dtype)

    return Requests(
        tokens=tokens,
        length=length,
        max_new_tokens=new_tokens,
        budget=np.full(batch, budget, np.int32),
        sampling=SamplingRows(
            temperature=column("temperature", np.float32),
            top_k=column("top_k", np.int32),
            top_p=column("top_p", np.float32),
            min_p=column("min_p", np.float32),
            stop_ids=stop_ids,
            key=keys[np.minimum(np.arange(batch), count - 1)],
        ),
    )


def unpack(
    state: DecodeState, prompt_lengths: Sequence[int]
) -> list[tuple[list[int], DecodeStats]]:
    """New token ids and counts of the first rows, fetched from the device in one go."""
    tokens, length, rounds, committed, nodes = jax.device_get(
        (state.tokens, state.length, state.rounds, state.committed, state.nodes)
    )
    return [
        (
            tokens[row, start : length[row]].tolist(),
            DecodeStats(tuple(committed[row, : rounds[row]].tolist()), int(nodes[row])),
        )
        for row, start in enumerate(prompt_lengths)
    ]
