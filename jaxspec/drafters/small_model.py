"""A small language model as the drafter: any loaded target with the same vocabulary."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxspec.config import TargetConfig, TreeConfig
from jaxspec.drafters.base import Committed, Drafter
from jaxspec.models.decoder import forward_chain, unembed
from jaxspec.models.params import TargetParams, abstract_params
from jaxspec.models.state import LayerStates, init_states
from jaxspec.noise import Noise, bias
from jaxspec.trees.build import build
from jaxspec.trees.candidates import likeliest
from jaxspec.trees.tree import DraftTree


@dataclasses.dataclass(frozen=True)
class SmallModel(Drafter):
    """Runs the small model greedily for P tokens and grows the tree over its scores.

    The scores at each depth are those along its own greedy chain: exact for the chain and the
    siblings of its nodes, an approximation below them. A draft costs P forwards of one row.

    Attributes:
      config: of the small model; the drafter's params are its `TargetParams`.
      tree: how scores become a tree.
      depth: P.
    """

    config: TargetConfig
    tree: TreeConfig = TreeConfig("chain", size=8)
    depth: int = 7

    def __post_init__(self):
        if self.config.delta_layers:
            raise ValueError(
                "a small model with gated delta nets cannot draft, as its state cannot be "
                "rolled back; expected a model with attention only"
            )

    @property
    def size(self) -> int:
        return self.tree.size

    def init(self, params: TargetParams, batch: int, capacity: int) -> LayerStates:
        return init_states(self.config, batch, capacity, params.embed.dtype)

    def observe(
        self, params: TargetParams, state: LayerStates, committed: Committed
    ) -> LayerStates:
        # Cache rows from drafting are not reused: accepted tokens off the greedy chain have
        # none, and a forward of C tokens costs little more than one.
        where = committed.position, committed.count
        return self._run(params, state, committed.tokens, *where)[1]

    def draft(
        self,
        params: TargetParams,
        state: LayerStates,
        anchor: Int[Array, " B"],
        position: Int[Array, " B"],
        budget: Int[Array, " B"],
        noise: Noise | None = None,
    ) -> tuple[DraftTree, LayerStates]:
        one = jnp.ones_like(position)
        added = bias(noise, position, self.depth, params.unembed.shape[0])

        def step(carry, i):
            token, cache = carry
            hidden, cache = self._run(params, cache, token[:, None], position + i, one)
            logits = unembed(params, hidden[:, 0]) + added[:, i]
            return (likeliest(logits), cache), logits

        # Drafted rows lie past the committed ones; `observe` overwrites them.
        (_, state), logits = jax.lax.scan(step, (anchor, state), jnp.arange(self.depth))
        return build(self.tree, logits.swapaxes(0, 1), anchor, budget), state

    def with_tree(self, tree: TreeConfig) -> SmallModel:
        return dataclasses.replace(self, tree=tree)

    def abstract_params(self, target: TargetParams) -> TargetParams:
        return abstract_params(self.config, target.embed.dtype)

    def _run(
        self,
        params: TargetParams,
        cache: LayerStates,
        tokens: jax.Array,
        start: jax.Array,
        counts: jax.Array,
    ):
        """Runs on C consecutive tokens [B, C] and commits the first `counts` [B]."""
        output = forward_chain(params, self.config, tokens, cache, start)
        return output.hidden, cache.write(output.rows, start, counts, after=output.hidden)
