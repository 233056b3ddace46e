"""Between Python lists and the arrays of a batch; shapes come in buckets, so that few programs
are compiled."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import jax
import numpy as np

from jaxspec.config import TargetConfig
from jaxspec.decoding.sampling import NO_TOKEN, Sampling, SamplingRows
from jaxspec.decoding.state import Decoder, DecodeState, Requests
from jaxspec.decoding.stats import DecodeStats

MAX_STOP_IDS = 8
WORD = 32  # bits of a seed that a key takes at a time
# Beyond these float32 knows no other law: the likeliest token alone, all tokens alike, and a
# probability that is not rounded to 0.
TEMPERATURES, LEAST_TOP_P = (1e-30, 1e30), float(np.finfo(np.float32).tiny)
MAX_TOP_K = np.iinfo(np.int32).max  # more than any vocabulary


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
        stops = stop_ids_of(options, decoder.config)
        stop_ids[row, : len(stops)] = stops
    sampling = [*sampling, *[Sampling()] * (batch - count)]

    def column(name, dtype, least, most):
        values = [getattr(options, name) for options in sampling]
        return np.array([x and min(max(x, least), most) for x in values], dtype)

    return Requests(
        tokens=tokens,
        length=length,
        max_new_tokens=new_tokens,
        budget=np.full(batch, budget, np.int32),
        sampling=SamplingRows(
            temperature=column("temperature", np.float32, *TEMPERATURES),
            top_k=column("top_k", np.int32, 1, MAX_TOP_K),
            top_p=column("top_p", np.float32, LEAST_TOP_P, 1),
            min_p=column("min_p", np.float32, 0, 1),
            stop_ids=stop_ids,
            key=keys[np.minimum(np.arange(batch), count - 1)],
        ),
    )


def stop_ids_of(sampling: Sampling, config: TargetConfig) -> tuple[int, ...]:
    """A request's stop ids, or the target's own.

    Raises:
      ValueError: too many, or one that the target cannot choose.
    """
    stops = config.eos_token_ids if sampling.stop_ids is None else sampling.stop_ids
    if len(stops) > MAX_STOP_IDS:
        raise ValueError(f"{len(stops)} stop ids were given; at most {MAX_STOP_IDS} fit")
    bad = next((token for token in stops if not 0 <= token < config.vocab_size), None)
    if bad is not None:
        raise ValueError(
            f"there is stop id {bad}; the target's vocabulary is 0 … {config.vocab_size - 1}"
        )
    return tuple(stops)


def seed_key(seed: int) -> jax.Array:
    """A typed key, another one for every integer; below 2**32 it is `jax.random.key(seed)`.

    Of larger ones every further word is folded in. A negative one is its magnitude with a last
    word of 0, which no other has.
    """
    seed = operator.index(seed)
    words = [abs(seed) & (1 << WORD) - 1]
    rest = abs(seed) >> WORD
    while rest:
        words.append(rest & (1 << WORD) - 1)
        rest >>= WORD
    key = jax.random.key(np.uint32(words[0]))
    for word in words[1:] + [0] * (seed < 0):
        key = jax.random.fold_in(key, np.uint32(word))
    return key


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
