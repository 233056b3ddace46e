"""P-EAGLE: an EAGLE-3 drafter that drafts all its tokens in one pass.

All rows but the first read the mask token and one learned feature, instead of a drafted token
and the output of the row before. So scores depend only on the depth.

Source: vLLM's `speculators`, "peagle".
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxspec.drafters.eagle import EagleDrafter, EagleParams, EagleState, feature_at
from jaxspec.drafters.eagle_head import ParallelEagleConfig
from jaxspec.drafters.rollout import Choose
from jaxspec.trees.build import build
from jaxspec.trees.tree import DraftTree, chain_nodes

TREES = ("chain", "best_first", "top_budget")


@dataclasses.dataclass(frozen=True)
class ParallelEagleDrafter(EagleDrafter):
    """P-EAGLE's chain, or a tree over its scores by depth (`TREES`)."""

    config: ParallelEagleConfig
    best_tree = "chain"
    passes = 1

    def __post_init__(self):
        if self.tree.kind not in TREES:
            raise ValueError(
                f"tree kind {self.tree.kind!r} needs scores given the tokens before, but "
                f"P-EAGLE's depend only on the depth; use one of {', '.join(TREES)}"
            )

    @property
    def pass_tokens(self) -> int:
        return self.depth

    def logits(
        self, params: EagleParams, state: EagleState, anchor: jax.Array, position: jax.Array
    ) -> jax.Array:
        """Scores of every depth, float32 [B, P, V'], from one pass."""
        c, head, batch = self.config, self.head(params), anchor.shape[0]
        last, rows = jnp.maximum(position - 1, 0), jnp.arange(self.depth)
        first = rows == 0
        masked = head.fuse(head.mask_hidden[...].astype(jnp.float32))
        own = feature_at(state, position - 1)
        features = jnp.where(first[:, None], own[:, None], masked)  # [B, P, M]
        tokens = jnp.where(first, anchor[:, None], c.mask_token_id)
        depths, bits = chain_nodes(batch, self.depth)

        def attend(layer, q, k, v):
            return self._attend(layer, q, k, v, state.cache, last, bits, depths)

        output = head(params.vocabulary, features, tokens, last[:, None] + depths, attend)
        return head.logits(params.vocabulary, output)

    def rollout(
        self,
        params: EagleParams,
        state: EagleState,
        anchor: jax.Array,
        position: jax.Array,
        choose: Choose,
    ) -> tuple[jax.Array, jax.Array]:
        """As `Drafter.rollout`, with choices independent of each other."""

        def step(_, inputs):
            chosen, law = choose(*inputs)
            return None, (params.vocabulary.ids(chosen), law)

        logits = self.logits(params, state, anchor, position)
        slots = jnp.arange(self.depth), logits.swapaxes(0, 1)
        _, (tokens, laws) = jax.lax.scan(step, None, slots)
        return tokens.swapaxes(0, 1), laws.swapaxes(0, 1)

    def _grow(
        self, params: EagleParams, state: EagleState, anchor, position, budget, added
    ) -> DraftTree:
        logits = self.logits(params, state, anchor, position) + added
        tree = build(self.tree, logits, anchor, budget)
        return params.vocabulary.of_tree(tree)
