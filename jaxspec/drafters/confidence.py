"""Confidence: the probability that a drafted token is accepted if all before it are.

A rule that shortens a chain may look at a slot's confidence, which depends on the tokens
*before* the slot, never on the slot's own token or later ones: that would bias the output of
rejection sampling (`tests/decoding/test_reject.py` counts it out).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxspec.config import DrafterConfig
from jaxspec.drafters.sequential import join, weight, zeros
from jaxspec.models.layers import project


class Confidence(nnx.Module):
    """sigmoid(w · [h_k; W1[x_{k-1}]] + b), or w · h_k + b (DSpark, equation 7)."""

    def __init__(self, config: DrafterConfig, *, rngs: nnx.Rngs, dtype):
        previous = config.rank if config.confidence == "hidden_and_previous" else 0
        self.kernel = weight(rngs, dtype, config.hidden_size + previous)
        self.bias = zeros(dtype, 1)

    def __call__(self, hidden: jax.Array, embedded: jax.Array | None) -> jax.Array:
        """Logits [...] of hidden [..., M] and, if used, the previous token's W1 [..., R]."""
        inputs = hidden if embedded is None else join(hidden, embedded)
        logits = project("...i,i->...", inputs, self.kernel[...])
        return logits + self.bias[...].astype(jnp.float32)[0]


def confident_prefix(confidence: Float[Array, "B P"], threshold: jax.Array) -> Int[Array, " B"]:
    """Slots before the first one below the threshold.

    Args:
      confidence: [B, P], conditional acceptance probabilities.
      threshold: [B] or scalar; 0 keeps all.

    Returns:
      [B] int32, 0 … P.
    """
    return _leading(confidence >= jnp.asarray(threshold)[..., None])


def surviving_prefix(confidence: Float[Array, "B P"], threshold: jax.Array) -> Int[Array, " B"]:
    """The longest prefix whose survival probability reaches the threshold.

    Survival of slot j is the product of the confidences up to j; it never rises.

    Args:
      confidence: [B, P], conditional acceptance probabilities.
      threshold: [B] or scalar; 0 keeps all.

    Returns:
      [B] int32, 0 … P.
    """
    survival = jnp.cumprod(confidence, axis=-1)
    return _leading(survival >= jnp.asarray(threshold)[..., None])


def _leading(kept: jax.Array) -> jax.Array:
    """Length of the leading run of True: bool [B, P] -> int32 [B]."""
    return jnp.cumprod(kept.astype(jnp.int32), axis=-1).sum(axis=-1)
