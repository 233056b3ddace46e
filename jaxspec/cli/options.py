"""Options that several commands share."""

from __future__ import annotations

import dataclasses
from typing import Literal

TreeKind = Literal["chain", "best_first", "top_budget", "path_conditioned", "transitions"]


@dataclasses.dataclass(frozen=True)
class DrafterOptions:
    """The drafter, which proposes tokens, and the shape of its trees."""

    drafter: str | None = None
    """none (plain decoding) | ngram (prompt lookup) | small:NAME (a small model with the same
    vocabulary) | shipped | folder or hub name of a trained drafter (repo::subfolder too). The
    last three may be joined with prompt lookup: shipped+ngram, which with the tree
    path_conditioned is the default for the default target; for others it is ngram."""
    tree: TreeKind | None = None
    """How a tree is grown from the drafter's scores; by default as the drafter prefers."""
    width: int = 4
    """Children per expanded node (best_first) or per tabulated parent (transitions)."""
    budget: int = 8
    """Nodes verified per round, root included."""
    candidates: int = 16
    """Parents scored per depth (path_conditioned, transitions)."""
    threshold: float = 0.0
    """End a chain before the first token whose confidence is below this."""
    survival: float = 0.0
    """End a chain where the product of its confidences falls below this."""

    def load(self, target):
        from jaxspec.api import load_drafter
        from jaxspec.checkpoints.catalog import DEFAULT
        from jaxspec.config import TreeConfig

        name = self.drafter
        if name is None:
            name = "shipped+ngram" if target.name == DEFAULT else "ngram"
        if name == "none":
            return load_drafter("none", target)
        if self.budget < 1:
            raise ValueError(f"--budget is {self.budget}; expected at least 1 (the root)")
        if self.tree and name == "ngram":
            raise ValueError(
                f"--tree {self.tree} needs a drafter with scores; ngram merges its matches "
                "into a tree of its own: leave --tree out"
            )
        # The verified size is static, a power of two; the budget within it is not.
        size = 1 << (self.budget - 1).bit_length()
        kind = self.tree or ("path_conditioned" if self.drafter is None else "chain")
        tree = TreeConfig(kind, size=size, width=self.width, candidates=self.candidates)
        rules = dict(threshold=self.threshold, survival=self.survival)
        return load_drafter(name, target, tree=tree, **rules)
