"""The target's choice at a node: argmax, or Gumbel-max with the noise of `jaxspec.noise`."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxspec.config import check_field, convert_field
from jaxspec.decoding.filters import filtered
from jaxspec.decoding.penalties import Written, adjusted, changes_logits
from jaxspec.noise import Noise, drafting_scale
from jaxspec.trees.candidates import likeliest

NO_TOKEN = -1
MAX_STOP_IDS, MAX_BIASES = 8, 300
MAX_BIAS, MAX_PENALTY = 100.0, 2.0  # as OpenAI bounds them
PENALTIES = ("presence_penalty", "frequency_penalty", "repetition_penalty")
ROWS_AT_ONCE, NODES_AT_ONCE = 8, 16  # sampled at a time, to bound the memory of [., ., V]


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


def choose(
    logits: jax.Array,
    depths: jax.Array,
    positions: jax.Array,
    rows: SamplingRows,
    max_depth: int,
    written: Written,
) -> jax.Array:
    """The token the target chooses after each node.

    Args:
      logits: [R, N, V] float32.
      depths: [R, N] int32, 0 … max_depth.
      positions: [R] int32, absolute position of the token chosen after depth 0.
      rows: [B], indexed by `written.row`; consumes `rows.key` folded with the absolute position
        of the chosen token.
      written: the text before each choice.

    Returns:
      [R, N] int32.
    """
    greedy = likeliest(logits)
    drawn = ((rows.temperature > 0) | changes_logits(rows))[written.row]

    def draw(_):
        order = jnp.argsort(~drawn)  # sampled rows first: only they cost something
        together = math.gcd(logits.shape[0], ROWS_AT_ONCE)

        def some_rows(i, chosen):
            some = jax.lax.dynamic_slice_in_dim(order, i * together, together)
            tokens = _draw(logits, depths, positions, rows, some, max_depth, written)
            return chosen.at[some].set(jnp.where(drawn[some, None], tokens, chosen[some]))

        return jax.lax.fori_loop(0, -(-drawn.sum() // together), some_rows, greedy)

    return jax.lax.cond(drawn.any(), draw, lambda _: greedy, None)


def _draw(logits, depths, positions, rows, some, max_depth: int, written: Written) -> jax.Array:
    """`choose` for `some` [R'] of the R, with noise or adjusted logits: [R', N] int32."""
    rows = jax.tree.map(lambda x: x[written.row[some]], rows)
    # Nodes of one depth choose for the same position, so they share its noise.
    hot, vocab = rows.temperature > 0, logits.shape[-1]
    noise = jax.lax.cond(  # without it XLA draws the noise again for every node
        jnp.any(hot),
        lambda: rows.noise.at(positions[some], max_depth + 1, vocab),
        lambda: jnp.zeros((some.shape[0], max_depth + 1, vocab)),
    )  # [R', P + 1, V]
    noise = jnp.where(hot[:, None, None], noise, 0.0)
    step = math.gcd(logits.shape[1], NODES_AT_ONCE)

    def some_nodes(i, chosen):
        part = lambda x: x[some[:, None], i * step + jnp.arange(step)]  # noqa: E731
        depth = part(depths)
        law = _law(
            part(logits), rows, written, some, part(written.node), positions[some], depth
        )
        drawn = jnp.take_along_axis(noise, depth[..., None], axis=1)
        drawn = likeliest(law + drawn)
        return jax.lax.dynamic_update_slice_in_dim(chosen, drawn, i * step, axis=1)

    start = jnp.zeros((some.shape[0], logits.shape[1]), jnp.int32)
    return jax.lax.fori_loop(0, logits.shape[1] // step, some_nodes, start)


def _law(logits, rows, written: Written, some, node, positions, depths) -> jax.Array:
    """Adjusted and filtered logits of the choices `some`: [R', N, V]."""

    def adjust(logits):
        position = positions[:, None] + depths
        return adjusted(logits, rows, written, written.row[some], node, position)

    logits = jax.lax.cond(jnp.any(changes_logits(rows)), adjust, lambda x: x, logits)
    scaled = logits / jnp.where(rows.temperature > 0, rows.temperature, 1.0)[:, None, None]
    return filtered(scaled, rows.top_k, rows.top_p, rows.min_p)


def log_law(
    logits: jax.Array, positions: jax.Array, rows: SamplingRows, written: Written
) -> jax.Array:
    """The log-probabilities [B, N, V] that `choose` samples from; one-hot in greedy rows.

    Args:
      logits: [B, N, V] float32, after the first N nodes of a chain.
      positions, rows, written: as in `choose`, for all nodes of every row in order.
    """
    every, depths = jnp.arange(logits.shape[0]), jnp.arange(logits.shape[1])
    depths = jnp.broadcast_to(depths, logits.shape[:2])
    laws = _law(logits, rows, written, every, depths, positions, depths)
    best = likeliest(laws)[..., None] == jnp.arange(logits.shape[-1])
    greedy = jnp.where(best, 0.0, -jnp.inf)
    sampled = jax.nn.log_softmax(laws, axis=-1)
    return jnp.where((rows.temperature > 0)[:, None, None], sampled, greedy)
