"""Requests to an engine, and its updates."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax

from jaxspec.config import TargetConfig
from jaxspec.decoding import logprobs
from jaxspec.decoding.logprobs import LogProbs
from jaxspec.decoding.requests import check_tokens, is_key, request_keys, stop_ids_of
from jaxspec.decoding.sampling import MAX_BIAS, Sampling
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
      seed: seed of sampling, as in `jaxspec.generate(seed=[seed])`, or a typed key.
      logprobs: number of alternative tokens whose log-probabilities are returned, besides those
        of the new tokens; None returns no log-probabilities.
      prompt_logprobs: also for the prompt's tokens, all of which are then run.
      cache_salt: prefix cache entries are shared only by requests with equal salts.
      grammar: grammar of the answer, which ends with one of the target's own stop ids.
    """

    prompt: Sequence[int]
    max_new_tokens: int = 256
    sampling: Sampling = Sampling()
    seed: int | jax.Array = 0
    logprobs: int | None = None
    prompt_logprobs: bool = False
    cache_salt: str = ""
    grammar: Grammar | None = None

    def sampling_before_grammar(self, config: TargetConfig) -> Sampling:
        """Its sampling until its grammar holds: the token that ends the lead stops the row, and
        a lead in which an answer may not end has no other stop ids.

        Raises ValueError: see `stop_ids_of` and `Sampling`.
        """
        grammar = self.grammar
        if grammar is None or grammar.begin is None:
            return self.sampling
        stops, bias = stop_ids_of(self.sampling, config), dict(self.sampling.logit_bias)
        if not grammar.lead.may_end:
            bias |= dict.fromkeys(stops, -MAX_BIAS)
        stops = (*stops, grammar.begin)
        return dataclasses.replace(self.sampling, stop_ids=stops, logit_bias=bias)

    @property
    def asked(self) -> int:
        """Which log-probabilities the device keeps (`decoding.logprobs`)."""
        if self.logprobs is None:
            return logprobs.NONE
        return logprobs.ALL if self.prompt_logprobs else logprobs.NEW

    @property
    def keys(self) -> jax.Array:
        """The typed key [1] of its samples."""
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
                f"exceed the {room} tokens that this engine allows per request; shorten the "
                "prompt or ask for fewer tokens"
            )
        if type(self.seed) is not int and not is_key(self.seed):
            raise ValueError(f"the seed is {self.seed!r}; expected an integer")
        check_tokens(self.sampling_before_grammar(config), config)
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
            raise ValueError("this engine keeps no log-probabilities: its top_logprobs is 0")
        elif not 0 <= self.logprobs <= top_logprobs:
            raise ValueError(f"logprobs is {self.logprobs}; expected 0 … {top_logprobs} here")


def _check_ends(sampling: Sampling, config: TargetConfig) -> None:
    """A complete answer must be able to stop: the grammar allows nothing but a stop id."""
    if not set(config.eos_token_ids) <= set(stop_ids_of(sampling, config)):
        raise ValueError(
            "an answer with a grammar ends with one of the target's own stop ids; stop_ids "
            "must include them"
        )
    if sampling.min_tokens:
        raise ValueError(
            f"min_tokens is {sampling.min_tokens}, but a grammar decides where its answer "
            "ends; leave min_tokens out"
        )


@dataclasses.dataclass(frozen=True)
class TokenLogProb:
    """Log-probabilities of the target at one position.

    Attributes:
      logprob: of `token`; None for the first token of a text.
      top: the likeliest tokens and their log-probabilities, best first.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


def read_logprobs(
    laws: LogProbs | None,
    row: int,
    places: Sequence[int],
    tokens: Sequence[int],
    top: int | None,
) -> tuple[TokenLogProb, ...]:
    """Log-probabilities at some positions of a row, with `top` alternatives each; () if that is
    None.

    Args:
      laws: fetched from the device.
      tokens: the row's tokens by position.
    """
    if top is None:
        return ()
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
      tokens: new tokens since the last update, a final stop id included.
      finish: why the request ended; None while it goes on.
      stats: counts of the whole request, with `finish`; None before, or if it never ran.
      logprobs: of `tokens`, if asked for.
      prompt_logprobs: of the prompt's tokens, in the first update.
      cached: prompt tokens taken from the prefix cache, in the first update with tokens.
      waited: seconds in the queue, in the first update with tokens.
      failure: why a request that ended as "stuck" could not go on.
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
