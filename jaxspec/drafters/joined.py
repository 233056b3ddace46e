"""Several drafters in one: what one does not see coming another may."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxspec.drafters.base import Committed, Drafter
from jaxspec.trees.merge import union
from jaxspec.trees.tree import DraftTree


@dataclasses.dataclass(frozen=True)
class Together:
    """Several drafters that observe one pass of the target; it drafts nothing itself."""

    drafters: tuple[Drafter, ...]
    size: int = 1
    verify_sizes: tuple[int, ...] = ()

    @property
    def depth(self) -> int:
        return max(drafter.depth for drafter in self.drafters)

    @property
    def taps(self) -> tuple[int, ...]:
        return tuple(sorted({tap for drafter in self.drafters for tap in drafter.taps}))

    def init(self, params, batch: int, capacity: int):
        pairs = zip(self.drafters, params, strict=True)
        return tuple(drafter.init(own, batch, capacity) for drafter, own in pairs)

    def observe(self, params, state, committed: Committed):
        taps = jnp.split(committed.features, max(len(self.taps), 1), axis=-1)

        def own(drafter):
            parts = [taps[self.taps.index(tap)] for tap in drafter.taps]
            features = jnp.concatenate(parts or [taps[0][..., :0]], axis=-1)
            return dataclasses.replace(committed, features=features)

        parts = zip(self.drafters, params, state, strict=True)
        return tuple(drafter.observe(p, s, own(drafter)) for drafter, p, s in parts)


@dataclasses.dataclass(frozen=True)
class Joined(Together):
    """Two drafters with scores; their best nodes by either's score make one tree.

    A trained drafter and prompt lookup complete each other: the one knows the language, the
    other what was said before, and goes on deeper than a block.
    """

    def __post_init__(self):
        sizes = [drafter.size for drafter in self.drafters]
        if sizes != [self.size, self.size]:
            raise ValueError(
                f"joined drafters have trees of {sizes} nodes; expected two of {self.size}"
            )

    def draft(
        self, params, state, anchor: jax.Array, position: jax.Array, budget: jax.Array
    ) -> tuple[DraftTree, tuple]:
        whole = jnp.full_like(budget, self.size)
        parts = zip(self.drafters, params, state, strict=True)
        drafts = [drafter.draft(p, s, anchor, position, whole) for drafter, p, s in parts]
        (first, second), states = zip(*drafts, strict=True)
        tree = union(first, second, size=self.size, depth=self.depth, budget=budget)
        return tree, states
