"""Converts Python lists to the arrays of a batch and back, in a few shapes, so that few
programs are compiled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxspec.arguments import integer
from jaxspec.config import TargetConfig
from jaxspec.decoding import logprobs
from jaxspec.decoding.sampling import (
    MAX_BIASES,
    MAX_PENALTY,
    MAX_STOP_IDS,
    NO_TOKEN,
    Sampling,
    SamplingRows,
)
from jaxspec.decoding.state import Decoder, DecodeState, Params, Requests
from jaxspec.decoding.stats import DecodeStats
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.models.target import Target

WORD = 32  # bits of a seed that a key takes at a time
# Beyond these limits float32 sampling does not change: only the likeliest token, all tokens
# alike, and the smallest probability not rounded to 0.
TEMPERATURES, LEAST_TOP_P = (1e-30, 1e30), float(np.finfo(np.float32).tiny)
REPETITIONS = (1e-6, 1e6)
MAX_INT = np.iinfo(np.int32).max  # more than any vocabulary or text has tokens


def capacity_for(tokens: int, decoder: Decoder) -> int:
    """S for rows of `tokens` tokens: 2, 3, 4, 6, 8, 12, … chunks, with room for P + 1 more."""
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
    asked: int = logprobs.NONE,
) -> Requests:
    """Arrays for `prompts`; further rows are empty requests that end at once.

    Args:
      batch: B, at least the number of prompts.
      capacity: S, from `capacity_for`.
      sampling: one per prompt.
      keys: [len(prompts)] typed keys.
      asked: `logprobs.NONE`, `NEW` or `ALL`.
    """
    count = len(prompts)
    tokens = np.zeros((batch, capacity), np.int32)
    length, new_tokens = np.ones(batch, np.int32), np.ones(batch, np.int32)
    new_tokens[:count] = max_new_tokens
    stop_ids = np.full((batch, MAX_STOP_IDS), NO_TOKEN, np.int32)
    biased = np.full((batch, MAX_BIASES), NO_TOKEN, np.int32)
    bias = np.zeros((batch, MAX_BIASES), np.float32)
    for row, (prompt, options) in enumerate(zip(prompts, sampling, strict=True)):
        tokens[row, : len(prompt)] = prompt
        length[row] = len(prompt)
        check_tokens(options, decoder.config)
        stops = stop_ids_of(options, decoder.config)
        stop_ids[row, : len(stops)] = stops
        if options.logit_bias:
            biases = slice(len(options.logit_bias))
            biased[row, biases], bias[row, biases] = zip(*options.logit_bias, strict=True)
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
            top_k=column("top_k", np.int32, 1, MAX_INT),
            top_p=column("top_p", np.float32, LEAST_TOP_P, 1),
            min_p=column("min_p", np.float32, 0, 1),
            stop_ids=stop_ids,
            min_tokens=column("min_tokens", np.int32, 0, MAX_INT),
            biased=biased,
            bias=bias,
            presence=column("presence_penalty", np.float32, -MAX_PENALTY, MAX_PENALTY),
            frequency=column("frequency_penalty", np.float32, -MAX_PENALTY, MAX_PENALTY),
            repetition=column("repetition_penalty", np.float32, *REPETITIONS),
            key=keys if count == batch else keys[np.minimum(np.arange(batch), count - 1)],
            logprobs=np.full(batch, asked, np.int32),
        ),
    )


def check_tokens(sampling: Sampling, config: TargetConfig) -> None:
    """Raises ValueError for stop ids or biases of tokens that the target does not have."""
    stop_ids_of(sampling, config)
    tokens = [token for token, _ in sampling.logit_bias]
    bad = next((token for token in tokens if not 0 <= token < config.vocab_size), None)
    if bad is not None:
        raise ValueError(
            f"logit_bias has token id {bad}; the target's vocabulary is "
            f"0 … {config.vocab_size - 1}"
        )


def stop_ids_of(sampling: Sampling, config: TargetConfig) -> tuple[int, ...]:
    """A request's stop ids, or the target's own.

    Raises:
      ValueError: there are too many, or one is outside the vocabulary.
    """
    stops = config.eos_token_ids if sampling.stop_ids is None else sampling.stop_ids
    if len(stops) > MAX_STOP_IDS:
        raise ValueError(
            f"stop_ids has {len(stops)} ids; expected at most {MAX_STOP_IDS}, the target's own "
            "included"
        )
    bad = next((token for token in stops if not 0 <= token < config.vocab_size), None)
    if bad is not None:
        raise ValueError(
            f"stop_ids has {bad}; the target's vocabulary is 0 … {config.vocab_size - 1}"
        )
    return tuple(stops)


def seed_key(seed: int) -> jax.Array:
    """A distinct typed key for every integer; below 2**32 it is `jax.random.key(seed)`.

    Further words of larger seeds are folded in. A negative seed is its magnitude with a final
    word of 0, which no positive seed has.
    """
    seed = integer("seed", seed)
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
    """New token ids and counts of the first rows, fetched from the device in one transfer."""
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


def check_positions(
    config: TargetConfig, length: int, max_new_tokens: int, spare: int = 0
) -> None:
    """Raises ValueError if a prompt and its new tokens exceed the target's positions.

    Args:
      spare: tokens past the answer that also need positions.
    """
    total, positions = length + max_new_tokens + spare, config.max_positions
    if total > positions:
        new = f"{max_new_tokens} new ones"
        parts = f", {new} and {spare} more of the last round" if spare else f" and {new}"
        raise ValueError(
            f"a prompt of {length} tokens{parts} need {total} positions; the target has "
            f"{positions}. Shorten the prompt or lower max_new_tokens"
        )


def request_keys(seed: int | Sequence[int] | jax.Array, count: int) -> jax.Array:
    """One typed key per request: `seed` folded with 0 … count - 1, each own seed with 0, or
    keys that are typed already."""
    if np.ndim(seed) == 0:
        return _fold_keys(seed_key(seed), np.arange(count))
    if len(seed) != count:
        raise ValueError(f"{len(seed)} seeds for {count} prompts; give one, or one per prompt")
    if is_key(seed):
        return seed
    return jax.numpy.stack([jax.random.fold_in(seed_key(s), 0) for s in seed])


def is_key(seed: Any) -> bool:
    """Whether a seed is a typed key, or an array of them."""
    return isinstance(seed, jax.Array) and jax.dtypes.issubdtype(
        seed.dtype, jax.dtypes.prng_key
    )


_fold_keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))


def decoder_for(
    target: Target, drafter: LoadedDrafter, *, rejection: bool = False
) -> tuple[Decoder, Params]:
    """The static part of decoding, and its weights.

    Raises:
      ValueError: rejection sampling with a drafter that cannot sample chains.
    """
    if rejection:
        drafter.drafter.check_sampled()
    decoder = Decoder(
        target.config,
        drafter.drafter,
        rejection=rejection,
        cache_dtype="float32" if jax.default_backend() == "cpu" else None,
    )
    return decoder, Params(target.params, drafter.params)


def check_capacity(
    decoder: Decoder, prompts: list[list[int]], max_new_tokens: int, capacity: int | None
) -> int:
    max_new_tokens = integer("max_new_tokens", max_new_tokens, low=1)
    longest = max(map(len, prompts))
    check_positions(decoder.config, longest, max_new_tokens)
    if capacity is None:
        return capacity_for(longest + max_new_tokens, decoder)
    capacity = integer("capacity", capacity)
    needed = longest + max_new_tokens + decoder.drafter.depth + 1
    if capacity < needed:
        raise ValueError(
            f"capacity is {capacity}; a prompt of {longest} tokens, {max_new_tokens} new ones "
            f"and the drafter's depth need {needed}. Raise it or leave it out"
        )
    if capacity % decoder.chunk:
        raise ValueError(f"capacity is {capacity}; expected a multiple of {decoder.chunk}")
    return capacity


def check_budget(decoder: Decoder, budget: int | None) -> int:
    size = decoder.drafter.size
    budget = size if budget is None else integer("budget", budget)
    if not 1 <= budget <= size:
        raise ValueError(f"budget is {budget}; the drafter's trees have 1 … {size} nodes")
    return budget
