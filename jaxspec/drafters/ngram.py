"""Prompt lookup: what followed the longest earlier match of the current suffix.

No model and no training. After Saxena, "Prompt Lookup Decoding" (2023); here the matching runs
on the device over prompt and output, and several continuations are merged into one tree.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxspec.drafters.base import Committed
from jaxspec.trees.merge import merge
from jaxspec.trees.tree import DraftTree


@dataclasses.dataclass(frozen=True)
class PromptLookup:
    """Drafts the continuations of the longest, then most recent, earlier matches.

    Attributes:
      size: N, nodes of the tree, root included.
      depth: P, tokens copied from each match.
      continuations: C, matches merged into the tree, best first.
      min_match, max_match: tokens that must agree, and beyond which longer is not better.
    """

    size: int = 8
    depth: int = 7
    continuations: int = 4
    min_match: int = 1
    max_match: int = 4
    taps: tuple[int, ...] = ()
    verify_sizes: tuple[int, ...] = (1, 4)

    def __post_init__(self):
        for name in ("size", "depth", "continuations", "min_match"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"PromptLookup.{name} is {getattr(self, name)}; expected at least 1"
                )
        if self.max_match < self.min_match:
            raise ValueError(
                f"PromptLookup.max_match is {self.max_match}; "
                f"expected at least min_match = {self.min_match}"
            )

    def init(self, params, batch: int, capacity: int) -> jax.Array:
        """The tokens seen so far: [B, S] int32."""
        return jnp.zeros((batch, capacity), jnp.int32)

    def observe(self, params, state: jax.Array, committed: Committed) -> jax.Array:
        # Rows past `count` are padding that the next call overwrites, as in a KV cache.
        return _write(state, committed.tokens, committed.position)

    def draft(
        self,
        params,
        state: jax.Array,
        anchor: jax.Array,
        position: jax.Array,
        budget: jax.Array,
    ) -> tuple[DraftTree, jax.Array]:
        history = _write(state, anchor[:, None], position)
        continuations, lengths = jax.vmap(self._look_up)(history, position)
        tree = merge(anchor, continuations, lengths, size=self.size, budget=budget)
        return tree, history

    def _look_up(self, history: jax.Array, last: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Continuations [C, P] of the best earlier matches, and their lengths [C].

        Args:
          history: [S] tokens, decided up to and including index `last`.
        """
        end = jnp.arange(history.shape[0])  # where an earlier match would end
        length = jnp.zeros_like(end)  # of the common suffix, up to max_match
        unbroken = end < last
        for back in range(self.max_match):
            same = jnp.roll(history, back) == history[last - back]
            unbroken = unbroken & same & (end >= back) & (last >= back)
            length = length + unbroken
        rank = jnp.where(length >= self.min_match, length * history.shape[0] + end, -1)
        best, end = jax.lax.top_k(rank, self.continuations)  # longest first, then latest

        # A match that runs into the suffix itself is a repetition; go on repeating it.
        period = jnp.maximum(last - end, 1)[:, None]
        take = end[:, None] + 1 + jnp.arange(self.depth) % period
        tokens = history.at[take].get(mode="fill", fill_value=0)
        lengths = jnp.where(best >= 0, self.depth, 0)
        return tokens, lengths


_write = jax.vmap(
    lambda tokens, new, start: jax.lax.dynamic_update_slice(tokens, new, (start,))
)
