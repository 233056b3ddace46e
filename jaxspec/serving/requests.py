"""What goes into an engine and what comes out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from jaxspec.config import TargetConfig
from jaxspec.decoding import logprobs
from jaxspec.decoding.logprobs import LogProbs
from jaxspec.decoding.requests import check_tokens, request_keys, stop_ids_of
from jaxspec.decoding.sampling import Sampling
from jaxspec.decoding.stats import DecodeStats
from jaxspec.serving.grammars import Grammar

Finish = Literal["stop", "length", "cancelled", "stuck"]


class QueueFull(Exception):
    """The queue is full; try again later."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt.

    Attributes:
      prompt: token ids.
      seed: decides what is sampled, as `jaxspec.generate(seed=[seed])` does; or the typed key
        that would follow from it.
      logprobs: alternatives whose log-probabilities come beside those of the new tokens; None
        for neither.
      prompt_logprobs: they come for the prompt's tokens too; all of the prompt is run for it.
      cache_salt: prefixes of prompts are shared by requests with the same one.
      grammar: what the answer keeps to; it ends with one of the target's own stop ids.
    """

    prompt: Sequence[int]
    max_new_tokens: int = 256
    sampling: Sampling = Sampling()
    seed: int | jax.Array = 0
    logprobs: int | None = None
    prompt_logprobs: bool = False
    cache_salt: str = ""
    grammar: Grammar | None = None

    @property
    def asked(self) -> int:
        """Which log-probabilities are kept on the device."""
        if self.logprobs is None:
            return logprobs.NONE
        return logprobs.ALL if self.prompt_logprobs else logprobs.NEW

    @property
    def keys(self) -> jax.Array:
        """[1] typed, the key of its samples."""
        return request_keys([self.seed], 1) if type(self.seed) is int else self.seed[None]

    def check(self, config: TargetConfig, room: int, top_logprobs: int) -> None:
        """Raises ValueError when the request cannot be served.

        Args: room, top_logprobs: of the engine (`EngineConfig`).
        """
        if not self.prompt:
            raise ValueError("the prompt is empty; expected at least one token")
        bad = [t for t in self.prompt if type(t) is not int or not 0 <= t < config.vocab_size]
        if bad:
            raise ValueError(
                f"the prompt has token id {bad[0]!r}; the target's vocabulary is "
                f"0 … {config.vocab_size - 1}"
            )
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; expected at least 1")
        places = len(self.prompt) + self.max_new_tokens
        if places > room:
            raise ValueError(
                f"a prompt of {len(self.prompt)} tokens and {self.max_new_tokens} new ones "
                f"need {places} places; requests have {room} here. Shorten the prompt or ask "
                "for fewer tokens"
            )
        keyed = isinstance(self.seed, jax.Array) and jnp.issubdtype(
            self.seed.dtype, jax.dtypes.prng_key
        )
        if type(self.seed) is not int and not keyed:
            raise ValueError(f"the seed is {self.seed!r}; expected an integer")
        check_tokens(self.sampling, config)
        least = self.sampling.min_tokens
        if least > self.max_new_tokens:
            raise ValueError(
                f"min_tokens is {least}; expected at most max_new_tokens, {self.max_new_tokens}"
            )
        if self.grammar is not None:
            _check_ends(self.sampling, config)
        if self.logprobs is None:
            if self.prompt_logprobs:
                raise ValueError("prompt_logprobs needs logprobs, the number of alternatives")
        elif not top_logprobs:
            raise ValueError("log-probabilities are not kept here: top_logprobs is 0")
        elif not 0 <= self.logprobs <= top_logprobs:
            raise ValueError(f"logprobs is {self.logprobs}; expected 0 … {top_logprobs} here")


def _check_ends(sampling: Sampling, config: TargetConfig) -> None:
    """An answer that is complete has no other token to go on with."""
    if not set(config.eos_token_ids) <= set(stop_ids_of(sampling, config)):
        raise ValueError(
            "an answer that keeps to a grammar ends with the target's own stop ids; stop_ids "
            "must have them"
        )
    if sampling.min_tokens:
        raise ValueError(
            f"min_tokens is {sampling.min_tokens}; a grammar decides where its answer ends. "
            "Leave it out"
        )


@dataclasses.dataclass(frozen=True)
class TokenLogProb:
    """The target's law where a token stands.

    Attributes:
      logprob: of the token; None for the first of a text.
      top: the likeliest tokens and their log-probabilities, best first.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


def read_logprobs(
    laws: LogProbs, row: int, places: Sequence[int], tokens: Sequence[int], top: int
) -> tuple[TokenLogProb, ...]:
    """Those of some places of a row, with `top` alternatives each.

    Args:
      laws: fetched from the device.
      tokens: by place.
    """
    return tuple(
        TokenLogProb(
            tokens[place],
            float(laws.chosen[row, place]),
            tuple(
                zip(
                    laws.tokens[row, place, :top].tolist(),
                    laws.top[row, place, :top].tolist(),
                    strict=True,
                )
            ),
        )
        for place in places
    )


@dataclasses.dataclass(frozen=True)
class Update:
    """Progress of one request.

    Attributes:
      id: what `Engine.submit` returned.
      tokens: decided since the last update, a final stop id included.
      finish: why it ended; None while it goes on.
      stats: counts of the whole request, with `finish`; None before, or if it never ran.
      logprobs: of `tokens`, where they were asked for.
      prompt_logprobs: of the prompt's tokens, with the first update.
      cached: tokens of the prompt that were not run again, with the first tokens.
      waited: seconds in the queue, with the first tokens.
      failure: why a "stuck" one could not go on.
    """

    id: int
    tokens: tuple[int, ...]
    finish: Finish | None = None
    stats: DecodeStats | None = None
    logprobs: tuple[TokenLogProb, ...] = ()
    prompt_logprobs: tuple[TokenLogProb, ...] = ()
    cached: int = 0
    waited: float | None = None
    failure: str | None = None
