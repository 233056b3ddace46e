"""Which slots of its block a slot attends to, by layer."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool

from jaxspec.config import DrafterConfig


def block_visibility(config: DrafterConfig, layer: int) -> Bool[Array, "b b"]:
    """Attention mask within a block, bool [b, b]: row i has the slots that slot i attends to.

    A window bounds the distance both ways. Causal, window 2, and bidirectional, window 2:

      1 0 0 0    1 1 0 0
      1 1 0 0    1 1 1 0
      0 1 1 0    0 1 1 1
      0 0 1 1    0 0 1 1
    """
    slot = jnp.arange(config.block_size)
    behind = slot[:, None] - slot  # how far the key is behind the query
    seen = behind >= 0 if config.causal[layer] else jnp.ones(behind.shape, bool)
    window = config.window[layer]
    return seen if window is None else seen & (jnp.abs(behind) < window)
