"""Several drafters combined into one, whose trees hold the best nodes of all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxspec.config import TreeConfig
from jaxspec.drafters.base import Committed, Drafter, LoadedDrafter
from jaxspec.drafters.ngram import PromptLookup
from jaxspec.models.params import TargetParams
from jaxspec.noise import Noise
from jaxspec.trees.tree import DraftTree

DEEPEST_MATCH = 15  # tokens that prompt lookup copies at a time beside another drafter


@dataclasses.dataclass(frozen=True)
class Together(Drafter):
    """Several drafters that observe the same target forward; it does not draft."""

    drafters: tuple[Drafter, ...]
    size: int = 1

    @property
    def depth(self) -> int:
        return max(drafter.depth for drafter in self.drafters)

    @property
    def taps(self) -> tuple[int, ...]:
        return tuple(sorted({tap for drafter in self.drafters for tap in drafter.taps}))

    @property
    def parts(self) -> tuple[Drafter, ...]:
        return self.drafters

    def abstract_params(self, target: TargetParams) -> tuple:
        return tuple(drafter.abstract_params(target) for drafter in self.drafters)

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
    """A drafter with scores, and prompt lookup behind every node of its tree.

    The two complement each other: one models language, the other copies earlier text, and goes
    deeper than a block.
    """

    def __post_init__(self):
        kinds = [isinstance(drafter, PromptLookup) for drafter in self.drafters]
        sizes = [drafter.size for drafter in self.drafters]
        if kinds[1:] != [True] or sizes != [self.size, self.size]:
            raise ValueError(
                f"the joined drafters are {self.drafters}; expected one and a PromptLookup, "
                f"with trees of {self.size} nodes (`beside_lookup` makes them)"
            )

    def with_tree(self, tree: TreeConfig) -> Joined:
        return beside_lookup(self.drafters[0].with_tree(tree))

    def draft(
        self,
        params,
        state,
        anchor: Int[Array, " B"],
        position: Int[Array, " B"],
        budget: Int[Array, " B"],
        noise: Noise | None = None,
    ) -> tuple[DraftTree, tuple]:
        (drafter, lookup), (own, text) = self.drafters, state
        whole = jnp.full_like(budget, self.size)
        tree, own = drafter.draft(params[0], own, anchor, position, whole, noise)
        tree, text = lookup.behind(tree, text, position, budget)
        return tree, (own, text)


def with_lookup(loaded: LoadedDrafter) -> LoadedDrafter:
    """A drafter joined with prompt lookup (`beside_lookup`)."""
    return LoadedDrafter(beside_lookup(loaded.drafter), (loaded.params, ()))


def beside_lookup(drafter: Drafter) -> Joined:
    """The static part of a drafter joined with prompt lookup, in trees of the same size.

    Raises:
      ValueError: the drafter drafts nothing.
    """
    if drafter.size < 2:
        raise ValueError(f"{drafter} has nothing to join with prompt lookup; leave +ngram out")
    lookup = PromptLookup(size=drafter.size, depth=min(drafter.size - 1, DEEPEST_MATCH))
    return Joined((drafter, lookup), drafter.size)


def change_drafter(
    loaded: LoadedDrafter, change: Callable[[LoadedDrafter], LoadedDrafter]
) -> LoadedDrafter:
    """change(loaded); of a drafter joined with prompt lookup, only the drafter is changed."""
    first, *others = loaded.drafter.parts
    if not others:
        return change(loaded)
    return with_lookup(change(LoadedDrafter(first, loaded.params[0])))


def with_survival(loaded: LoadedDrafter) -> LoadedDrafter:
    """The drafter with chains scored by its confidence head, if it has one.

    Trees keep the drafter's own probabilities, which rank their nodes better (docs/results.md).
    """

    def change(loaded):
        drafter, config = loaded.drafter, loaded.drafter.head_config
        if config is None or config.confidence is None:
            return loaded
        if drafter.tree.kind == "chain":
            drafter = dataclasses.replace(drafter, survival_scores=True)
        return dataclasses.replace(loaded, drafter=drafter)

    return change_drafter(loaded, change)
