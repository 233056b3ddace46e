"""Drafters by name.

A spec is a name of `NAMES` ("ngram"), a name with an argument ("small:NAME"), or else the
folder or hub name of a trained drafter. `register` adds names; "+ngram" after a spec joins
prompt lookup.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from typing import Any, Protocol

from flax import nnx

from jaxspec.config import DrafterConfig, TreeConfig
from jaxspec.drafters.base import Drafter, LoadedDrafter
from jaxspec.drafters.block import BlockDrafter, block_params
from jaxspec.drafters.eagle import EagleDrafter, eagle_params
from jaxspec.drafters.eagle_head import EagleConfig, ParallelEagleConfig
from jaxspec.drafters.joined import with_lookup
from jaxspec.drafters.mtp import MtpConfig, MtpDrafter, MtpWeights
from jaxspec.drafters.ngram import PromptLookup
from jaxspec.drafters.parallel_eagle import ParallelEagleDrafter
from jaxspec.drafters.plain import PLAIN
from jaxspec.models.params import TargetParams
from jaxspec.models.target import Target

LOOKUP_TOO = "+ngram"
UNSCORED = ("none", "ngram")  # names of drafters whose trees do not grow from scores


class Factory(Protocol):
    """Makes the drafter of a registered name."""

    def __call__(
        self, argument: str, target: Target, *, tree: TreeConfig, dtype: str
    ) -> LoadedDrafter:
        """A drafter for a target.

        Args:
          argument: the part of the spec after the name; "" for names without a colon.
          tree: tree to draft; a chain where the caller leaves the kind to the drafter.
          dtype: of its weights.

        Raises:
          ValueError: the drafter cannot be made, or does not fit the target.
        """


def none(argument, target, *, tree, dtype):
    """Plain decoding."""
    return PLAIN


def ngram(argument, target, *, tree, dtype):
    """Prompt lookup."""
    return LoadedDrafter(PromptLookup(size=tree.size))


def python(argument, target, *, tree, dtype):
    """A user's factory, "MODULE:FUNCTION", of the current folder or an installed package."""
    module, _, name = argument.partition(":")
    if "" not in sys.path:  # as `python -m` has it, unlike an installed command
        sys.path.insert(0, "")
    try:
        factory = vars(importlib.import_module(module))[name]
    except (ModuleNotFoundError, ValueError, KeyError) as error:
        raise ValueError(
            f"drafter 'python:{argument}' cannot be imported ({error}); expected "
            "python:MODULE:FUNCTION, a `jaxspec.drafters.registry.Factory` in a module of the "
            "current folder or of an installed package"
        ) from error
    return factory("", target, tree=tree, dtype=dtype)


# By type of configuration: a trained drafter, and the function that joins its weights with a
# target.
TRAINED = {
    DrafterConfig: (BlockDrafter, block_params),
    EagleConfig: (EagleDrafter, eagle_params),
    ParallelEagleConfig: (ParallelEagleDrafter, eagle_params),
    MtpConfig: (MtpDrafter, eagle_params),
}
NAMES: dict[str, Factory] = {"none": none, "ngram": ngram, "python:": python}


def of_config(config: DrafterConfig | EagleConfig | MtpConfig, tree: TreeConfig) -> Drafter:
    """The drafter of a trained drafter's configuration."""
    return TRAINED[type(config)][0](config, tree)


def trained(
    config: DrafterConfig | EagleConfig | MtpConfig,
    weights: nnx.State | MtpWeights,
    target: TargetParams,
    tree: TreeConfig,
    **own: Any,
) -> LoadedDrafter:
    """Joins a trained drafter's weights with the embedding and LM head of its target.

    Args:
      own: options of `block_params` or `eagle_params`.
    """
    _, join = TRAINED[type(config)]
    return LoadedDrafter(of_config(config, tree), join(weights, target, **own))


def register(name: str, factory: Factory) -> None:
    """Adds a name; one that ends in a colon takes an argument.

    Raises:
      ValueError: the name is taken.
    """
    if NAMES.get(name, factory) is not factory:
        raise ValueError(f"a drafter {name!r} is registered already; choose another name")
    NAMES[name] = factory


def make(
    spec: str, target: Target, *, tree: TreeConfig, dtype: str, trained: Factory
) -> LoadedDrafter:
    """The drafter of a spec.

    Args:
      trained: factory of specs that are not registered names.

    Raises:
      ValueError: the factory raises it, the drafter's `draft` takes other arguments than the
        protocol's, or it cannot be joined with prompt lookup.
    """
    if spec.endswith(LOOKUP_TOO):
        alone = spec.removesuffix(LOOKUP_TOO)
        if alone in UNSCORED:
            raise ValueError(
                f"drafter {alone!r} has nothing to join with prompt lookup; leave +ngram out"
            )
        return with_lookup(make(alone, target, tree=tree, dtype=dtype, trained=trained))
    name, colon, argument = spec.partition(":")
    if spec in NAMES:
        name, colon, argument = spec, "", ""
    if name + colon in NAMES:
        loaded = NAMES[name + colon](argument, target, tree=tree, dtype=dtype)
        _check_draft(loaded.drafter, spec)
        return loaded
    return trained(spec, target, tree=tree, dtype=dtype)


def _check_draft(drafter: Drafter, spec: str) -> None:
    """Raises ValueError unless `draft` takes the protocol's arguments."""
    _, *names = inspect.signature(Drafter.draft).parameters
    try:
        inspect.signature(drafter.draft).bind(*names)
    except TypeError as error:
        raise ValueError(
            f"drafter {spec!r}: {type(drafter).__name__}.draft cannot be called ({error}); "
            f"expected the arguments {', '.join(names)} of jaxspec.drafters.base.Drafter.draft"
        ) from error
