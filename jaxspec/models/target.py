"""A target in memory, as loaded from a checkpoint and passed to everything else."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax

from jaxspec.config import TargetConfig
from jaxspec.models.params import TargetParams

if TYPE_CHECKING:
    from jaxspec.tokenizer import Tokenizer


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("params",),
    meta_fields=("name", "config", "tokenizer"),
)
@dataclasses.dataclass(frozen=True)
class Target:
    """A loaded language model; a pytree of its weights, for `jax.jit` and `jax.grad`.

    Attributes:
      name: the name or path it was loaded from.
      config: static configuration; its stop ids are those of config.json, of
        generation_config.json and of the tokenizer.
      params: weights in the fused layout.
      tokenizer: None for a model without one, whose prompts must be token ids.
    """

    name: str
    config: TargetConfig
    params: TargetParams = dataclasses.field(repr=False)
    tokenizer: Tokenizer | None = None


def check_target(target: Any) -> None:
    """Raises ValueError unless it is a loaded target."""
    if not isinstance(target, Target):
        raise ValueError(
            f"target is {target!r}; expected a loaded target: load it with jaxspec.load_target"
        )
