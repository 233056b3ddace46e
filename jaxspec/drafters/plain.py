"""No drafter: every round commits one token, which is plain decoding."""

from __future__ import annotations

import dataclasses

from jaxspec.drafters.base import Committed, Drafter, LoadedDrafter
from jaxspec.trees.tree import root_only


@dataclasses.dataclass(frozen=True)
class Plain(Drafter):
    """Drafts nothing.

    Attributes:
      size: nodes verified, one real and the rest padding. XLA:CPU multiplies one row by a
        matrix more slowly than two in some shapes and dtypes; benchmarks try both.
    """

    size: int = 1
    depth: int = 0

    def init(self, params, batch, capacity):
        return ()

    def observe(self, params, state, committed: Committed):
        return state

    def draft(self, params, state, anchor, position, budget, noise=None):
        return root_only(anchor, size=self.size), state

    def with_tree(self, tree):
        return self


PLAIN = LoadedDrafter(Plain())
