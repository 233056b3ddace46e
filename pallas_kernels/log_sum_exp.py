"""The normaliser of a softmax over a large vocabulary."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

SEGMENTS = 32


def log_sum_exp(logits: jax.Array, peak: jax.Array) -> jax.Array:
    """log(sum(exp(logits))) over the last axis of [..., V], given its maximum."""
    total = lax.platform_dependent(logits, peak, cpu=_sum_exp_by_segments, default=_sum_exp)
    return peak + jnp.log(total)


def _sum_exp(logits, peak):
    return jnp.sum(jnp.exp(logits - peak[..., None]), axis=-1)


def _sum_exp_by_segments(logits, peak):
    # XLA's CPU backend does not vectorise exp inside a reduction; added segment by segment
    # it does (18 to 7 ms for 120 rows of 151,936).
    width, rest = divmod(logits.shape[-1], SEGMENTS)
    if rest:
        return _sum_exp(logits, peak)

    def add(i, total):
        segment = lax.dynamic_slice_in_dim(logits, i * width, width, axis=-1)
        return total + jnp.exp(segment - peak[..., None])

    total = lax.fori_loop(0, SEGMENTS, add, jnp.zeros((*peak.shape, width), jnp.float32))
    return jnp.sum(total, axis=-1)
