"""The likeliest tokens of a position, exactly, without sorting the vocabulary."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.log_sum_exp import log_sum_exp


def likeliest(logits: Float[Array, "*L V"]) -> Int[Array, "*L"]:
    """The argmax over the vocabulary, int32; of equal logits the lowest id.

    On a CPU in two passes that are vectorised: XLA's own argmax goes one by one there (1.0
    against 2.3 ms for 16 rows of 49,152 on one core).
    """
    return lax.platform_dependent(logits, cpu=_first_of_largest, default=_argmax)


def _argmax(logits):
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _first_of_largest(logits):
    vocab = logits.shape[-1]
    smaller = logits < jnp.max(logits, axis=-1, keepdims=True)
    return jnp.min(jnp.where(smaller, vocab, jnp.arange(vocab, dtype=jnp.int32)), axis=-1)


def top_log_probs(
    logits: Float[Array, "*L V"], k: int
) -> tuple[Int[Array, "*L {k}"], Float[Array, "*L {k}"]]:
    """Tokens and log-probabilities of the k likeliest tokens, over the full vocabulary.

    Args:
      logits: [..., V], any float type; computed in float32.
      k: how many.

    Returns:
      tokens int32 and log-probs float32, both [..., k], likeliest first; of equal ones the
      lowest id first.

    Raises:
      ValueError: if k exceeds V.
    """
    tokens, top, log_total = top_logits(logits, k)
    return tokens, top - log_total[..., None]


def top_logits(
    logits: Float[Array, "*L V"], k: int
) -> tuple[Int[Array, "*L {k}"], Float[Array, "*L {k}"], Float[Array, "*L"]]:
    """`top_log_probs` before it normalises: tokens, their logits, log-sum-exp of all logits.

    Each of the k largest logits lies in one of the k chunks whose maxima are largest, so one
    pass for the maxima and two short searches replace a search of the whole vocabulary
    (0.5 against 6.2 ms for 15 rows of 151,936 on two CPU cores, k = 7). Chunks of about
    sqrt(V / k) balance the two searches.
    """
    vocab = logits.shape[-1]
    if k > vocab:
        raise ValueError(f"k is {k}, the vocabulary {vocab}; ask for at most the vocabulary")
    logits = logits.astype(jnp.float32)
    width = math.gcd(vocab, 2 ** round(math.log2(vocab / k) / 2))
    chunks = logits.reshape(*logits.shape[:-1], vocab // width, width)
    maxima = jnp.max(chunks, axis=-1)
    log_total = log_sum_exp(logits, jnp.max(maxima, axis=-1))
    if width == 1 or k * width >= vocab:
        top, tokens = lax.top_k(logits, k)
        return tokens, top, log_total
    # In ascending order, so that equal logits still come lowest id first.
    best = _ascending(lax.top_k(maxima, k)[1])
    finalists = jnp.take_along_axis(chunks, best[..., None], axis=-2)  # [..., k, width]
    top, place = lax.top_k(finalists.reshape(*best.shape[:-1], k * width), k)
    tokens = jnp.take_along_axis(best, place // width, axis=-1) * width + place % width
    return tokens, top, log_total


def _ascending(index: jax.Array) -> jax.Array:
    """Sorts [..., k] ids below 2**24, which float32 holds exactly."""
    # On a CPU a top k is a partial sort in C++, several times as fast as XLA's own sort.
    return -lax.top_k(-index.astype(jnp.float32), index.shape[-1])[0].astype(jnp.int32)
