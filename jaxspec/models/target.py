"""A target in memory: what a checkpoint becomes, and what everything else is given."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from jaxspec.config import TargetConfig
from jaxspec.models.params import TargetParams

if TYPE_CHECKING:
    from jaxspec.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Target:
    """A loaded language model.

    Attributes:
      name: what it was loaded from.
      config: static description; a text ends at the ids of the configuration, of the
        generation's configuration, and of the tokenizer.
      params: weights in the fused layout.
      tokenizer: None for a model that comes without one; its prompts are token ids.
    """

    name: str
    config: TargetConfig
    params: TargetParams
    tokenizer: Tokenizer | None = None
