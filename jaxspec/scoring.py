"""The target on given texts: logits, hidden states, log-probabilities."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.arguments import integer
from jaxspec.config import TargetConfig
from jaxspec.decoding.precision import precision_of
from jaxspec.decoding.requests import capacity_for, decoder_for
from jaxspec.drafters.plain import PLAIN
from jaxspec.models.decoder import ForwardOutput, forward_chain, unembed
from jaxspec.models.params import TargetParams
from jaxspec.models.state import LayerStates, init_states
from jaxspec.models.target import Target, check_target
from jaxspec.prompts import Prompt, as_token_ids
from jaxspec.settings import on_devices_of_target, own_settings

POSITIONS = 128  # positions whose logits are in memory at a time


@own_settings()
def logits(target: Target, ids: Any = None, *, embeddings: Any = None) -> jax.Array:
    """Logits after every token of one text, or of several of equal length.

    A pure function of arrays: it may be jitted, and differentiated with respect to the target
    (a pytree of its weights) or the embeddings. Traced ids are not checked: one outside the
    vocabulary gives meaningless logits. Memory grows with T · V and with T²; use `score` for
    long texts.

    Args:
      ids: [T] or [B, T] token ids, a list or an array (possibly traced).
      embeddings: [T, M] or [B, T, M] float32, a list or an array, instead of ids.

    Returns:
      float32 [T, V] or [B, T, V].

    Raises:
      ValueError: not exactly one of `ids` and `embeddings` is given, a shape or an id is out of
        range, or the text is longer than the target's positions.

    >>> loss = lambda target: jaxspec.logits(target, [1, 2, 3])[-1, 7]      # doctest: +SKIP
    >>> jax.grad(loss)(target).params.embed.shape                          # doctest: +SKIP
    """
    check_target(target)
    output, rows = _run(target, ids, embeddings)
    with precision_of(target.params.embed.dtype):
        return rows(unembed(target.params, output.hidden))


@own_settings()
def hidden_states(target: Target, ids: Any = None, *, embeddings: Any = None) -> jax.Array:
    """Outputs of all layers, as Hugging Face's `output_hidden_states` gives them.

    A pure function of arrays, as `logits`. Args: as for `logits`.

    Returns:
      float32 [L + 1, T, M] or [L + 1, B, T, M]: the embedding first; the last layer's output
      after the final norm, from which `models.decoder.unembed` computes logits.
    """
    check_target(target)
    layers = tuple(range(-1, target.config.num_layers))
    output, rows = _run(target, ids, embeddings, layers)
    batch, length = output.taps.shape[:2]
    apart = output.taps.reshape(batch, length, len(layers), -1)
    return jax.vmap(rows, in_axes=2)(apart)


def _run(target: Target, ids, embeddings, taps=()):
    """One forward over an empty cache, and a function that gives outputs the input's rank."""
    if (ids is None) == (embeddings is None):
        raise ValueError("give either ids or embeddings, exactly one of them")
    if embeddings is None:
        ids = _as_array(ids, target.config)
        tokens = jnp.atleast_2d(ids)
        single = ids.ndim == 1
    else:
        embeddings = _as_embeddings(embeddings, target.config.hidden_size)
        single = embeddings.ndim == 2
        embeddings = embeddings[None] if single else embeddings
        tokens = jnp.zeros(embeddings.shape[:2], jnp.int32)
    most = target.config.max_positions
    if not 0 < tokens.shape[1] <= most:
        raise ValueError(f"the text has {tokens.shape[1]} tokens; expected 1 … {most}")
    output = _without_past(target.config, target.params, tokens, embeddings, taps=taps)
    return output, lambda x: x[0] if single else x


def _as_embeddings(embeddings, width: int) -> jax.Array:
    """Embeddings as float32 [T, M] or [B, T, M], possibly traced."""
    try:
        embeddings = jnp.asarray(embeddings, jnp.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"embeddings are no array of numbers ({error}); expected [T, {width}] or "
            f"[B, T, {width}]"
        ) from None
    if embeddings.ndim not in (2, 3) or embeddings.shape[-1] != width:
        raise ValueError(
            f"embeddings have shape {embeddings.shape}; expected [T, {width}] or "
            f"[B, T, {width}]"
        )
    return embeddings


def _as_array(ids, config: TargetConfig) -> jax.Array:
    """Ids as int32 [T] or [B, T], checked unless traced."""
    if not isinstance(ids, jax.core.Tracer):
        try:
            ids = np.asarray(ids)
        except ValueError:
            raise ValueError(
                "ids has rows of different lengths; expected equal ones: pad them, or pass "
                "them one by one"
            ) from None
        if ids.dtype.kind in "iu" and ids.size:
            bad = ids[(ids < 0) | (ids >= config.vocab_size)]
            if bad.size:
                raise ValueError(
                    f"ids has token id {bad[0]}; the target's vocabulary is "
                    f"0 … {config.vocab_size - 1}"
                )
    if ids.ndim not in (1, 2) or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"ids have shape {ids.shape} and dtype {ids.dtype}; expected integers [T] or [B, T]"
        )
    return jnp.asarray(ids, jnp.int32)


@functools.partial(jax.jit, static_argnames=("config", "taps"))
def _without_past(
    config: TargetConfig, params: TargetParams, tokens, embeddings, *, taps
) -> ForwardOutput:
    batch = tokens.shape[0]
    dtype = jnp.float32 if jax.default_backend() == "cpu" else params.embed.dtype
    with precision_of(params.embed.dtype):
        return forward_chain(
            params,
            config,
            tokens,
            init_states(config, batch, 1, dtype),
            jnp.zeros(batch, jnp.int32),
            taps=taps,
            embeddings=embeddings,
        )


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Score:
    """How likely the target finds a text.

    Attributes:
      token_ids: [T] tokens of the text.
      log_probs: [T - 1] float32 natural log-probabilities: entry i is token i + 1's, given the
        tokens before it, at temperature 1.
    """

    token_ids: np.ndarray
    log_probs: np.ndarray

    @property
    def total(self) -> float:
        """Log-probability of the text after its first token."""
        return float(self.log_probs.sum(dtype=np.float64))

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability; NaN for a single token."""
        count = len(self.log_probs)
        return float(np.exp(-self.total / count)) if count else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """One row of a table: `pandas.DataFrame(x.to_dict() for x in scores)`."""
        return {
            "tokens": len(self.token_ids),
            "total": self.total,
            "perplexity": self.perplexity,
        }

    def __repr__(self) -> str:
        return (
            f"Score({len(self.token_ids)} tokens, total {self.total:.2f}, "
            f"perplexity {self.perplexity:.2f})"
        )


@on_devices_of_target
def score(
    target: Target, texts: Prompt | Sequence[Prompt], *, batch_size: int = 8
) -> list[Score]:
    """Log-probabilities of given texts, read as they are, without a chat template.

    Texts run in chunks over a cache, with logits of a few positions at a time: unlike `logits`,
    memory does not grow with T · V.

    Args:
      texts: texts or lists of token ids, of any lengths, or a single one.
      batch_size: texts run together.

    Returns:
      One `Score` per text.

    Raises:
      ValueError: a text is empty, longer than the target's positions, or has an id outside the
        vocabulary.
    """
    rows = as_token_ids(target, texts, raw=True, thinking=None)
    longest, most = max(map(len, rows)), target.config.max_positions
    if longest > most:
        raise ValueError(f"a text has {longest} tokens; the target has {most} positions")
    batch, found = min(integer("batch_size", batch_size, low=1), len(rows)), []
    for start in range(0, len(rows), batch):
        own = rows[start : start + batch]
        log_probs = _log_probs(target, own + [[0]] * (batch - len(own)))
        found += [
            Score(np.array(row, np.int32), log_probs[i, : len(row) - 1])
            for i, row in enumerate(own)
        ]
    return found


def _log_probs(target: Target, rows: list[list[int]]) -> np.ndarray:
    """Log-probabilities [B, S] float32: entry i is token i + 1's, up to each row's length."""
    decoder, _ = decoder_for(target, PLAIN)
    longest, chunk, c = max(map(len, rows)), decoder.chunk, target.config
    tokens = np.zeros((len(rows), capacity_for(longest, decoder) + 1), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    dtype = decoder.cache_dtype or target.params.embed.dtype
    capacity = tokens.shape[1] - 1
    cache = init_states(c, len(rows), capacity, dtype)
    parts = []
    for start in range(0, max(longest - 1, 1), chunk):
        piece = tokens[:, start : start + chunk + 1]
        cache, part = _score_chunk(c, target.params, cache, piece, np.int32(start))
        parts.append(part)
    return np.concatenate(jax.device_get(parts), axis=1)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def _score_chunk(
    config: TargetConfig, params: TargetParams, cache: LayerStates, tokens: jax.Array, start
) -> tuple[LayerStates, jax.Array]:
    """Log-probabilities [B, C] of tokens[:, 1:], for tokens [B, C + 1] at position `start`."""
    batch, count = tokens.shape[0], tokens.shape[1] - 1
    with precision_of(params.embed.dtype):
        starts = jnp.full(batch, start)
        output = forward_chain(params, config, tokens[:, :-1], cache, starts)

        def of_some(args):
            hidden, token = args  # [POSITIONS, M], [POSITIONS]
            law = jax.nn.log_softmax(unembed(params, hidden))
            return jnp.take_along_axis(law, token[:, None], axis=1)[:, 0]

        hidden = output.hidden.reshape(-1, POSITIONS, output.hidden.shape[-1])
        found = jax.lax.map(of_some, (hidden, tokens[:, 1:].reshape(-1, POSITIONS)))
    cache = cache.write(output.rows, start, jnp.full(batch, count), after=found)
    return cache, found.reshape(batch, count)
