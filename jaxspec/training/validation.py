"""Validation by the acceptance length of real decoding."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tqdm import tqdm

from jaxspec.api import generate
from jaxspec.decoding.stats import pooled_tau
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.models.target import Target
from jaxspec.prompts import Prompt


def walked_tau(
    target: Target,
    drafter: LoadedDrafter,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    thinking: bool | None = None,
    shown: bool = False,
) -> float:
    """Tokens per round of real greedy decoding, pooled over prompts.

    Averaging over all positions as anchors would overstate it by a fifth: an easy run of eight
    tokens would count eight times, although it is one round.

    Args:
      shown: show a progress bar of tokens on standard error.
    """
    total = len(prompts) * max_new_tokens
    with tqdm(
        total=total,
        desc="validation",
        unit="token",
        file=sys.stderr,
        position=1,
        leave=False,
        disable=not shown,
    ) as bar:
        completions = generate(
            target,
            prompts,
            drafter=drafter,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            thinking=thinking,
            progress=bar.update,
        )
    return pooled_tau([completion.stats for completion in completions])
