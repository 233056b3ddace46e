"""Validation: the acceptance length that decoding sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
    progress: Callable[[int], object] | None = None,
) -> float:
    """Tokens per round of real greedy decoding, pooled over prompts.

    Averaging over all positions as anchors would overstate it by a fifth: an easy stretch of
    eight tokens would count eight times although it is one round.

    Args:
      progress: called with the number of prompts after each batch of them.
    """
    completions = generate(
        target,
        prompts,
        drafter=drafter,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        thinking=thinking,
        progress=progress,
    )
    return pooled_tau([completion.stats for completion in completions])
