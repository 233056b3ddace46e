"""The decoders of a comparison: drafter, tree, budget and dtype."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from flax import nnx

from jaxspec.config import TREE_KINDS, TREE_OPTIONS, TreeConfig, tree_size
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.drafters.joined import change_drafter
from jaxspec.drafters.ngram import PromptLookup
from jaxspec.drafters.registry import UNSCORED
from jaxspec.drafters.weights import abstract_weights
from jaxspec.loading import load_drafter, load_target
from jaxspec.models.target import Target

SHAPE = ("width", "candidates")  # options of a tree, besides its size
EXAMPLE = "ours=run/drafter,tree=path_conditioned,budget=16"


@dataclasses.dataclass(frozen=True)
class Contender:
    """One line of a comparison.

    Attributes:
      name: as tables show it.
      drafter: as for `jaxspec.load_drafter`, "…+ngram" included.
      tree: one of `config.TREE_KINDS`; None for "ngram" and "none", which have their own, and
        for the kind that suits the drafter best, which `load_entries` decides.
      head: "own", or "none" to drop a block drafter's sequential head, so that every depth is
        scored independently, as in DFlash, DDTree and JetSpec.
      scores: of a tree's nodes: "own", the drafter's probabilities, or "confidence", the
        survival probabilities of its confidence head, as a server scores chains.
      width, candidates: see `TreeConfig`; None for its defaults.
      budget: nodes verified per round, root included; `measure.tau` takes several budgets.
      dtype: of the target and the drafter.
    """

    name: str
    drafter: str
    tree: str | None = None
    head: str = "own"
    scores: str = "own"
    width: int | None = None
    candidates: int | None = None
    budget: int = 8
    dtype: str = "float32"

    def __post_init__(self):
        def check(name, good, expected):
            if not good:
                raise ValueError(
                    f"decoder {self.name!r}: {name} is {getattr(self, name)!r}; "
                    f"expected {expected}"
                )

        given = [name for name in ("tree", *SHAPE) if getattr(self, name) is not None]
        for name in given:
            check(
                name,
                self.drafter not in UNSCORED,
                f"it left out: {self.drafter!r} has a fixed tree",
            )
        if self.tree is not None:
            check("tree", self.tree in TREE_KINDS, f"one of {', '.join(TREE_KINDS)}")
            for name in given[1:]:
                used = name in TREE_OPTIONS[self.tree]
                check(name, used, f"it left out: a {self.tree} tree does not use it")
        check("head", self.head in ("own", "none"), "own or none")
        check("scores", self.scores in ("own", "confidence"), "own or confidence")
        check("dtype", self.dtype in ("float32", "bfloat16"), "float32 or bfloat16")
        for name in (*given[1:], "budget"):
            check(name, getattr(self, name) >= 1, "at least 1")

    @classmethod
    def parse(cls, text: str, *, dtype: str = "float32") -> Contender:
        """Parses `NAME=DRAFTER[,tree=KIND][,head=none][,scores=confidence][,budget=N]
        [,width=W][,candidates=C][,dtype=D]`.

        Without tree it is path_conditioned for drafters that it suits best, else a chain; the
        budget is 8. Options that a kind of tree does not use are refused.

        Args:
          dtype: the default dtype.

        >>> Contender.parse("ours=run/drafter,tree=path_conditioned,budget=16").budget
        16
        """
        first, *options = text.split(",")
        name, equals, drafter = first.partition("=")
        known = [field.name for field in dataclasses.fields(cls)[2:]]
        given: dict[str, str | int] = {"dtype": dtype}
        for option in options:
            key, _, value = option.partition("=")
            number = key in (*SHAPE, "budget")
            if key not in known or not value or (number and not value.isdigit()):
                raise ValueError(
                    f"decoder {text!r}: option {option!r} is not one of "
                    f"{', '.join(f'{k}=…' for k in known)}; for example {EXAMPLE}"
                )
            given[key] = int(value) if number else value
        if not (name and equals and drafter):
            raise ValueError(
                f"decoder {text!r}: expected NAME=DRAFTER,…; for example {EXAMPLE}"
            )
        return cls(name, drafter, **given)


@dataclasses.dataclass(frozen=True, eq=False)  # compared by identity: it holds arrays
class Entry:
    """A contender with its models loaded.

    Attributes:
      drafter: as loaded; `sized` returns it with the contender's tree.
    """

    contender: Contender
    target: Target
    drafter: LoadedDrafter

    def sized(self, budget: int | None = None, *, tree: str | None = None) -> LoadedDrafter:
        """The drafter with trees of `budget` nodes (the contender's by default)."""
        c, loaded = self.contender, self.drafter
        size = tree_size(max(budget or c.budget, 2))
        shape = {name: getattr(c, name) for name in SHAPE if getattr(c, name) is not None}
        config = TreeConfig(tree or c.tree or "chain", size, **shape)

        def change(loaded):
            loaded = without_head(loaded) if c.head == "none" else loaded
            loaded = dataclasses.replace(loaded, drafter=loaded.drafter.with_tree(config))
            return by_confidence(loaded) if c.scores == "confidence" else loaded

        return change_drafter(loaded, change)


def without_head(loaded: LoadedDrafter) -> LoadedDrafter:
    """Drops a block drafter's sequential and confidence head: depths are then independent.

    Raises:
      ValueError: it is not a block drafter.
    """
    drafter, params = loaded.drafter, loaded.params
    config = drafter.head_config
    if config is None:
        raise ValueError(f"head=none: {drafter} has no sequential head; leave the option out")
    none = dict(sequential=None, rank=0, candidates=0, confidence=None)
    config = dataclasses.replace(config, **none)
    kept = {name: params.head[name] for name in abstract_weights(config)}
    tree = TreeConfig()
    return LoadedDrafter(
        dataclasses.replace(drafter, config=config, tree=tree, survival_scores=False),
        dataclasses.replace(params, head=nnx.State(kept)),
    )


def by_confidence(loaded: LoadedDrafter) -> LoadedDrafter:
    """Scores a block drafter's nodes by its confidence head.

    Raises:
      ValueError: it has no such head, or its tree cannot be scored so.
    """
    if loaded.drafter.head_config is None:
        raise ValueError("scores=confidence: the drafter has no confidence head; leave it out")
    try:
        drafter = dataclasses.replace(loaded.drafter, survival_scores=True)
    except ValueError as error:
        raise ValueError(f"scores=confidence: {error}; leave the option out") from error
    return dataclasses.replace(loaded, drafter=drafter)


def entry_of(name: str, target: Target, loaded: LoadedDrafter) -> Entry:
    """An entry of a loaded drafter, whose whole tree is verified.

    Raises:
      ValueError: its tree cannot be resized (`Drafter.with_tree`), as replays need.
    """
    first, dtype = loaded.drafter.parts[0], str(target.params.embed.dtype)
    size = loaded.drafter.size
    if isinstance(first, PromptLookup):
        contender = Contender(name, "ngram", budget=size, dtype=dtype)
    else:
        tree = getattr(first, "tree", TreeConfig())
        shape = {x: getattr(tree, x) for x in SHAPE if x in TREE_OPTIONS[tree.kind]}
        contender = Contender(name, name, tree.kind, budget=size, dtype=dtype, **shape)
    entry = Entry(contender, target, loaded)
    entry.sized()
    return entry


def load_entries(
    target: Target | str, contenders: Iterable[Contender], *, weights: str = "dequantised"
) -> list[Entry]:
    """Loads each target and drafter once per dtype; a loaded target has only its own dtype.

    Args:
      weights: how to hold an fp8 target's weights, see `load_target`.

    Raises:
      ValueError: two contenders have equal names, a model cannot be loaded or does not fit, or
        a contender asks for another dtype than the loaded target's.
    """
    targets: dict[str, Target] = {}
    if isinstance(target, Target):
        targets[str(target.params.embed.dtype)] = target
    contenders = list(contenders)
    names = [c.name for c in contenders]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"two decoders are called {twice!r}; give each its own name")
    drafters: dict[tuple[str, str], LoadedDrafter] = {}
    entries: list[Entry] = []
    for c in contenders:
        if c.dtype not in targets and isinstance(target, Target):
            raise ValueError(
                f"decoder {c.name!r} asks for {c.dtype}, but the target was loaded in "
                f"{', '.join(targets)}; leave dtype out, or give the target's name"
            )
        if c.dtype not in targets:
            targets[c.dtype] = load_target(target, dtype=c.dtype, weights=weights)
        key = c.drafter, c.dtype
        if key not in drafters:
            # `Entry.sized` makes its trees; this one is as deep as the drafter can draft.
            drafters[key] = load_drafter(
                c.drafter, targets[c.dtype], tree=TreeConfig(), dtype=c.dtype
            )
        suited = _suited(c, drafters[key])
        entries.append(Entry(suited, targets[c.dtype], drafters[key]))
        entries[-1].sized()  # raises if the drafter cannot draft the tree
    return entries


def _suited(contender: Contender, loaded: LoadedDrafter) -> Contender:
    """The contender with the kind of tree that suits its drafter best, if it names none."""
    if contender.tree is not None or contender.drafter in UNSCORED:
        return contender
    best = loaded.drafter.parts[0].best_tree
    return dataclasses.replace(contender, tree=best if contender.head == "own" else "chain")
