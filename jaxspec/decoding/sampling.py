"""How tokens are chosen: the options of a request, and those of a batch's rows as arrays."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxspec.arguments import check_field, convert_field
from jaxspec.noise import Noise, drafting_scale

NO_TOKEN = -1
MAX_STOP_IDS, MAX_BIASES = 8, 300
MAX_BIAS, MAX_PENALTY = 100.0, 2.0  # as OpenAI bounds them
PENALTIES = ("presence_penalty", "frequency_penalty", "repetition_penalty")


def _number(value: Any) -> float:
    return float(value + 0)  # float alone would take "1"


def _token_ids(values: Iterable[Any] | None) -> tuple[int, ...] | None:
    return None if values is None else tuple(map(operator.index, values))


def _biases(biases: Any) -> tuple[tuple[int, float], ...]:
    pairs = biases.items() if isinstance(biases, Mapping) else biases
    return tuple((operator.index(token), _number(bias)) for token, bias in pairs)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the target's distribution.

    Biases and penalties change the target's logits (`decoding.penalties`); filters apply after
    them, in this order.

    Attributes:
      temperature: 0 is greedy.
      top_k: keep the k most probable tokens; 0 keeps all.
      top_p: keep the fewest most probable tokens whose probability reaches top_p; 1 keeps all.
      min_p: keep tokens with at least min_p times the largest probability; 0 keeps all.
      stop_ids: ids that end the output; None means the target's own end-of-text ids.
      min_tokens: no stop id is chosen before this many new tokens.
      logit_bias: added to the logits of tokens, by id; a mapping, stored as its items.
      presence_penalty: subtracted from the logits of tokens in the output.
      frequency_penalty: the same, times the token's count in the output.
      repetition_penalty: divides positive logits of tokens in the prompt or output, and
        multiplies negative ones; 1 changes nothing.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop_ids: tuple[int, ...] | None = None
    min_tokens: int = 0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        convert = functools.partial(convert_field, self)
        for name in ("temperature", "top_p", "min_p", *PENALTIES):
            convert(name, _number, "a number")
        for name in ("top_k", "min_tokens"):
            convert(name, operator.index, "an integer")
        convert("stop_ids", _token_ids, "token ids, or None for the target's own")
        convert("logit_bias", _biases, "numbers by token id")
        check = functools.partial(check_field, self)
        check(
            "temperature", 0 <= self.temperature < float("inf"), "a finite number, at least 0"
        )
        check("top_k", self.top_k >= 0, "at least 0 (0 keeps all tokens)")
        check("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1 (1 keeps all tokens)")
        check("min_p", 0 <= self.min_p <= 1, "0 … 1 (0 keeps all tokens)")
        check("min_tokens", self.min_tokens >= 0, "at least 0")
        for name in ("presence_penalty", "frequency_penalty"):
            check(name, abs(getattr(self, name)) <= MAX_PENALTY, "-2 … 2 (0 changes nothing)")
        check(
            "repetition_penalty",
            0 < self.repetition_penalty < float("inf"),
            "a finite number above 0 (1 changes nothing)",
        )
        bounded = all(abs(bias) <= MAX_BIAS for _, bias in self.logit_bias)
        check("logit_bias", bounded, "-100 … 100 for every token")
        few = len(self.logit_bias) <= MAX_BIASES
        check("logit_bias", few, f"at most {MAX_BIASES} tokens")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingRows:
    """`Sampling` of every row of a batch, as arrays: options never recompile.

    Attributes:
      temperature, top_p, min_p: [B] float32.
      top_k: [B] int32.
      stop_ids: [B, n] int32, padded with `NO_TOKEN`.
      min_tokens: [B] int32.
      biased: [B, n] int32, tokens of `logit_bias`, padded with `NO_TOKEN`.
      bias: [B, n] float32.
      presence, frequency, repetition: [B] float32, the penalties.
      key: [B] typed keys, one per request.
      logprobs: [B] int32, which log-probabilities are kept (`decoding.logprobs`).
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    stop_ids: jax.Array
    min_tokens: jax.Array
    biased: jax.Array
    bias: jax.Array
    presence: jax.Array
    frequency: jax.Array
    repetition: jax.Array
    key: jax.Array
    logprobs: jax.Array

    @property
    def noise(self) -> Noise:
        """The noise of the choices, and what it counts for a drafter."""
        return Noise(self.key, drafting_scale(self.temperature, self.top_p))


def greedy_rows(key: jax.Array) -> SamplingRows:
    """Greedy rows with these keys [B] and no other options."""
    zeros = lambda dtype: jnp.zeros(key.shape, dtype)  # noqa: E731
    return SamplingRows(
        temperature=zeros(jnp.float32),
        top_k=zeros(jnp.int32),
        top_p=zeros(jnp.float32) + 1,
        min_p=zeros(jnp.float32),
        stop_ids=jnp.full((*key.shape, MAX_STOP_IDS), NO_TOKEN, jnp.int32),
        min_tokens=zeros(jnp.int32),
        biased=jnp.full((*key.shape, MAX_BIASES), NO_TOKEN, jnp.int32),
        bias=jnp.zeros((*key.shape, MAX_BIASES), jnp.float32),
        presence=zeros(jnp.float32),
        frequency=zeros(jnp.float32),
        repetition=zeros(jnp.float32) + 1,
        key=key,
        logprobs=zeros(jnp.int32),
    )
