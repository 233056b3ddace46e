"""Prompt lookup: drafts the text that followed the longest earlier match of the suffix.

No model and no training. After Saxena, "Prompt Lookup Decoding" (2023); here matching runs on
the device over prompt and output, and several continuations are merged into one tree.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxspec.config import TreeConfig, at_least, check_field
from jaxspec.drafters.base import Committed, Drafter
from jaxspec.noise import Noise
from jaxspec.trees.copies import common_suffixes, with_copies
from jaxspec.trees.merge import merge
from jaxspec.trees.tree import DraftTree

# How often the token after the longest and latest match, of 1, 2, … tokens, is the target's
# next token: counted in 240 greedy answers of SmolLM2-135M-Instruct to training prompts, 32,000
# tokens, and made monotone. In 240 others, 40,000 tokens, examples/shipped_drafter/counts.py
# finds the same within 0.03. `evaluate` reports the calibration of such paths.
AGREEMENT = (0.26, 0.57, 0.61, 0.67, 0.72, 0.78, 0.80, 0.83, 0.85, 0.92)

# The weight of a copy beside a drafter (`trees.copies`) after a match of 1, 2, … tokens: the
# likeliest for 96 greedy answers of SmolLM2-135M-Instruct that the drafter had not seen, made
# monotone. For 96 others examples/shipped_drafter/copy_weights.py finds the same within 0.07 up
# to 12 tokens, and 0.13 above.
WEIGHTS = (
    *(0.08, 0.36, 0.44, 0.57, 0.61, 0.66, 0.67, 0.69),
    *(0.71, 0.71, 0.72, 0.73, 0.81, 0.85, 0.92),
)


@dataclasses.dataclass(frozen=True)
class PromptLookup(Drafter):
    """Drafts the continuations of the longest, then most recent, earlier matches.

    An accepted token lengthens the match by one, so a path's probability is the product of the
    agreements from its match on, times the probability that all better matches fail.

    Attributes:
      size: N, nodes of the tree, root included.
      depth: P, tokens copied from each match.
      continuations: C, matches merged into the tree, best first.
      min_match: tokens that must agree.
      agreement: probability that the token after a match of 1, 2, … tokens is right; the last
        one also holds for longer matches.
      weights: of copies behind another drafter's nodes (`behind`), after 1, 2, … equal tokens;
        `continuations` and `agreement` do not matter there.
    """

    size: int = 8
    depth: int = 7
    continuations: int = 4
    min_match: int = 1
    agreement: tuple[float, ...] = AGREEMENT
    weights: tuple[float, ...] = WEIGHTS
    verify_sizes: tuple[int, ...] = (1, 4)

    def __post_init__(self):
        at_least(1, self, "size", "depth", "continuations", "min_match")
        for name in ("agreement", "weights"):
            found = getattr(self, name)
            good = len(found) >= self.min_match and all(0 < x < 1 for x in found)
            expected = f"at least min_match = {self.min_match} probabilities"
            check_field(self, name, good, expected)

    def init(self, params, batch: int, capacity: int) -> Int[Array, "B S"]:
        """The tokens seen so far: [B, S] int32."""
        return jnp.zeros((batch, capacity), jnp.int32)

    def observe(
        self, params, state: Int[Array, "B S"], committed: Committed
    ) -> Int[Array, "B S"]:
        # Rows past `count` are padding that the next call overwrites, as in a KV cache.
        return _write(state, committed.tokens, committed.position)

    def draft(
        self,
        params,
        state: Int[Array, "B S"],
        anchor: Int[Array, " B"],
        position: Int[Array, " B"],
        budget: Int[Array, " B"],
        noise: Noise | None = None,
    ) -> tuple[DraftTree, jax.Array]:
        history = _write(state, anchor[:, None], position)
        continuations, scores = jax.vmap(self._look_up)(history, position)
        tree = merge(anchor, continuations, scores, size=self.size, budget=budget)
        return tree, history

    def behind(
        self,
        tree: DraftTree,
        state: Int[Array, "B S"],
        position: Int[Array, " B"],
        budget: Int[Array, " B"],
    ) -> tuple[DraftTree, Int[Array, "B S"]]:
        """A drafter's tree with copies behind its nodes, and the state."""
        history = _write(state, tree.tokens[:, :1], position)
        enough = jnp.arange(1, 1 + len(self.weights)) >= self.min_match
        weights = jnp.where(enough, jnp.array(self.weights), 0.0)
        options = dict(weights=weights, depth=self.depth, budget=budget)
        return with_copies(tree, history, position, **options), history

    def with_tree(self, tree: TreeConfig) -> PromptLookup:
        return dataclasses.replace(self, size=tree.size)

    def _look_up(self, history: jax.Array, last: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Continuations [C, P] of the best earlier matches, and their paths' log-probabilities
        [C, P].

        Args:
          history: [S] tokens, decided up to index `last`, included.
        """
        end = jnp.arange(history.shape[0])  # where an earlier match would end
        longest = len(self.agreement)
        suffix = history[last - jnp.arange(longest)]
        length = common_suffixes(history, suffix, last[None])
        rank = jnp.where(length >= self.min_match, length * history.shape[0] + end, -1)
        best, end = jax.lax.top_k(rank, self.continuations)  # longest first, then latest

        # A match that overlaps the suffix is a repetition: continue repeating it.
        period = jnp.maximum(last - end, 1)[:, None]
        take = end[:, None] + 1 + jnp.arange(self.depth) % period
        tokens = history.at[take].get(mode="fill", fill_value=0)
        match = jnp.minimum(length[end][:, None] + jnp.arange(self.depth), longest)
        agreement = jnp.array(self.agreement)[match - 1]  # [C, P]
        failed = jnp.cumprod(1 - agreement[:-1, 0])  # all better matches
        agreement = agreement.at[1:, 0].multiply(failed)
        scores = jnp.cumsum(jnp.log(agreement), axis=1)
        return tokens, jnp.where(best[:, None] >= 0, scores, -jnp.inf)


_write = jax.vmap(
    lambda tokens, new, start: jax.lax.dynamic_update_slice(tokens, new, (start,))
)
