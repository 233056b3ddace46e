"""Everything that changes from round to round."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxspec.models.cache import KVCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """A batch of sequences between two rounds.

    The token at `length - 1` is the anchor: it is decided, but the target has not run on it,
    so the cache (and the drafter) hold `length - 1` rows.

    Attributes:
      tokens: [B, S] int32.
      length: [B] int32, tokens decided.
      limit: [B] int32, length at which the row is full.
      done: [B] bool.
      budget: [B] int32, nodes verified per round, root included.
      cache: the target's.
      drafter: the drafter's state.
      rounds: [B] int32.
      committed: [B, S] int32, tokens decided by each round, bonus included. A round cut short
        by `limit` counts in full, as published acceptance lengths do; one that meets a stop
        id counts up to it.
      nodes: [B] int32, nodes verified in all, padding excluded.
    """

    tokens: jax.Array
    length: jax.Array
    limit: jax.Array
    done: jax.Array
    budget: jax.Array
    cache: KVCache
    drafter: Any
    rounds: jax.Array
    committed: jax.Array
    nodes: jax.Array

    @property
    def anchor(self) -> jax.Array:
        """[B] int32, the last decided token of every row."""
        return jnp.take_along_axis(self.tokens, self.length[:, None] - 1, axis=1)[:, 0]
