"""Options that several commands share."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from jaxspec.config import TREE_OPTIONS, TreeConfig, TreeKind, tree_size

Dtype = Literal["auto", "float32", "bfloat16"]

TargetName = Annotated[
    str | None,
    arg(
        help="Name in the catalog, GGUF file, Hugging Face folder, or hub name. Default: the "
        "target that the drafters' files name (speculators' format), else smollm2-135m."
    ),
]
NewTokens = Annotated[int, arg(help="Maximum tokens per answer.")]
Thinking = Annotated[bool | None, arg(help="Turn a Qwen3 chat template's thinking on or off.")]
PromptSets = Annotated[
    tuple[str, ...],
    arg(
        help="Prompt sets, in any format of docs/training.md; the first turn of every row is "
        "used."
    ),
]
Count = Annotated[int, arg(help="Prompts per set, evenly spaced; 0 takes all.")]
TopK = Annotated[int, arg(help="Sample among the k most likely tokens; 0 keeps all.")]
TopP = Annotated[
    float,
    arg(
        help="Sample among the most likely tokens that together reach this probability; 1 "
        "keeps all."
    ),
]
MinP = Annotated[
    float,
    arg(help="Drop tokens less likely than this fraction of the most likely one; 0 keeps all."),
]


def check_least(command: Any, **lows: int) -> None:
    """Raises ValueError if an option is given and below its lowest value."""
    for name, low in lows.items():
        value = getattr(command, name)
        if value is not None and value < low:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} is {value}; expected at least {low}")


def check_tree_options(drafter: str, kind: TreeKind | None, given: Sequence[str]) -> None:
    """Raises ValueError for options of trees that a drafter's tree does not use.

    Args:
      kind: None if the drafter decides.
      given: names of the options, "tree" among them if that is given.
    """
    from jaxspec.drafters.registry import UNSCORED

    if given and drafter in UNSCORED:
        options = ", ".join(f"--{name}" for name in given)
        raise ValueError(
            f"drafter {drafter} does not use {options}, which a drafter with scores needs: "
            "leave that out"
        )
    shape = [name for name in given if name != "tree"]
    if shape and kind is None:
        raise ValueError(f"--{shape[0]} is for one kind of tree; give --tree too")
    unused = ", ".join(f"--{name}" for name in shape if name not in TREE_OPTIONS[kind])
    if unused:
        raise ValueError(f"a {kind} tree does not use {unused}: leave that out")


def check_writable(option: str, path: Path | None) -> None:
    """Raises ValueError if an option names a file that cannot be written; None is no file."""
    if path is None:
        return
    folder, there = path.parent, os.path.exists(path)
    good = os.access(path, os.W_OK) if there else os.access(folder, os.W_OK | os.X_OK)
    if os.path.isdir(path) or not os.path.isdir(folder) or not good:
        raise ValueError(
            f"--{option} {path} cannot be written; expected a path in a folder that exists and "
            "is writable"
        )


def chosen_dtype(dtype: Dtype) -> str:
    """The dtype that an option means; prints the choice of "auto" to standard error."""
    if dtype != "auto":
        return dtype
    from jaxspec.dtypes import fastest

    found = fastest()
    if found.dtype == "float32":
        exact = "equals plain decoding token for token"
    else:
        exact = "near-ties may flip; --dtype float32 equals plain decoding token for token"
    print(f"dtype {found.dtype}: {found.reason}; {exact}", file=sys.stderr)
    return found.dtype


def target_name(target: str | None, *drafters: str | None) -> str:
    """The target of --target; without it the one that the drafters' files name, or the default.

    Raises:
      ValueError: a drafter cannot be found, or two name different targets, or one that cannot
        be found.
    """
    from jaxspec.checkpoints.catalog import DEFAULT
    from jaxspec.loading import named_target, trained_folder

    given = [drafter for drafter in drafters if drafter is not None]
    if target is not None:
        for drafter in given:
            trained_folder(drafter)
        return target
    names = {drafter: named_target(drafter) for drafter in given}
    named = {drafter: name for drafter, name in names.items() if name is not None}
    if len(set(named.values())) > 1:
        each = ", ".join(f"{drafter} {name!r}" for drafter, name in named.items())
        raise ValueError(f"the drafters name different targets ({each}); give --target")
    return next(iter(named.values()), DEFAULT)


@dataclasses.dataclass(frozen=True)
class DrafterOptions:
    """The drafter, which proposes tokens, and the shape of its trees."""

    drafter: str | None = None
    """none (plain decoding) | ngram (prompt lookup) | mtp (the multi-token-prediction layer in
    the target's checkpoint) | mtp:NAME (that layer in another folder or hub repository) |
    small:NAME (a small model with the same vocabulary) |
    python:MODULE:FUNCTION (your own, of the current folder or an installed package) | shipped |
    folder or hub name of a trained drafter (repo::subfolder too). NAME+ngram adds prompt lookup
    to any but none and ngram. Default: shipped+ngram for the default target, ngram for
    others."""
    tree: TreeKind | None = None
    """How a tree grows from the drafter's scores. Default: path_conditioned for drafters with a
    sequential head, chain for others."""
    width: int | None = None
    """Children per expanded node (best_first, path_conditioned of EAGLE-3) or per scored parent
    (transitions). Default: 4."""
    budget: int = 8
    """Nodes verified per round, root included."""
    candidates: int | None = None
    """Parents scored per depth (path_conditioned, transitions). Default: 16."""
    threshold: float = 0.0
    """End a chain before the first token whose confidence is below this; 0 keeps all."""
    survival: float = 0.0
    """End a chain where the product of its confidences falls below this; 0 keeps all."""

    def check(self, target: str, *, rejection: bool) -> None:
        """Raises ValueError for options that `load` cannot use, before anything is loaded.

        Args:
          target: its name.
          rejection: whether drafts are verified by rejection sampling.
        """
        from jaxspec.drafters.registry import LOOKUP_TOO, UNSCORED

        check_least(self, budget=1, width=1, candidates=1)
        for rule in ("threshold", "survival"):
            if not 0 <= getattr(self, rule) <= 1:
                raise ValueError(
                    f"--{rule} is {getattr(self, rule)}; expected a probability, 0 … 1"
                )
        name, shape = self._name(target), self._shape()
        given = ["tree"] * bool(self.tree) + list(shape)
        check_tree_options(name, self._kind(chain=rejection), given)
        if rejection and (name in UNSCORED or name.endswith(LOOKUP_TOO)):
            raise ValueError(
                f"--rejection needs a trained drafter without lookup; --drafter is {name}"
            )
        if rejection and self.tree not in (None, "chain"):
            raise ValueError(f"--rejection needs a chain; --tree is {self.tree}: leave it out")

    def _name(self, target: str) -> str:
        from jaxspec.checkpoints.catalog import DEFAULT

        if self.drafter is not None:
            return self.drafter
        return "shipped+ngram" if target == DEFAULT else "ngram"

    def load(self, target, *, chain: bool = False):
        """Loads the drafter. Args: chain: draft a chain where --tree is not given."""
        from jaxspec.loading import load_drafter

        name = self._name(target.name)
        size = tree_size(self.budget)
        rules = dict(threshold=self.threshold, survival=self.survival)
        kind = self._kind(chain=chain)
        if kind is None:
            return load_drafter(name, target, nodes=size)
        shape = {name: value for name, value in self._shape().items() if name not in rules}
        return load_drafter(name, target, tree=TreeConfig(kind, size, **shape), **rules)

    def _kind(self, *, chain: bool) -> TreeKind | None:
        """The kind of tree; None if the drafter decides."""
        return self.tree or ("chain" if chain or self.threshold or self.survival else None)

    def _shape(self) -> dict[str, float]:
        """The options given that only some kinds of trees use."""
        names = ("width", "candidates", "threshold", "survival")
        return {name: value for name in names if (value := getattr(self, name))}
