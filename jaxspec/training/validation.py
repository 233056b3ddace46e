"""Validation by the acceptance length of real decoding."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from jaxspec.api import generate
from jaxspec.data.conversations import Example
from jaxspec.decoding.requests import check_positions
from jaxspec.decoding.stats import pooled_tau
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.models.target import Target
from jaxspec.prompts import Prompt, as_token_ids

NEW_TOKENS = 64  # per prompt


def thinking_of(examples: Sequence[Example]) -> bool | None:
    """The thinking mode of all examples; None, the template's default, if they differ."""
    modes = {example.thinking for example in examples}
    return modes.pop() if len(modes) == 1 else None


def prompt_rows(
    target: Target, prompts: Sequence[Prompt], examples: Sequence[Example]
) -> list[list[int]]:
    """Prompts for validation as token ids, in the thinking mode of the training data.

    Warns of prompts that the data answers too.

    Raises:
      ValueError: the target cannot answer one of them.
    """
    rows = as_token_ids(target, prompts, raw=False, thinking=thinking_of(examples))
    for row in rows:
        check_positions(target.config, len(row), NEW_TOKENS)
    _warn_of_trained(rows, examples)
    return rows


def _warn_of_trained(prompts: Sequence[Sequence[int]], examples: Sequence[Example]) -> None:
    starts = (x.tokens[: np.argmax(x.supervised)] for x in examples)
    answered = {np.asarray(start, np.int32).tobytes() for start in starts}
    found = sum(np.asarray(row, np.int32).tobytes() in answered for row in prompts)
    if found:
        warnings.warn(
            f"{found} of {len(prompts)} validation prompts are answered in the data, so that "
            "their tau is that of text trained on; `jaxspec overlap --clean` removes such rows",
            stacklevel=3,
        )


def walked_tau(
    target: Target,
    drafter: LoadedDrafter,
    prompts: Sequence[Sequence[int]],
    *,
    shown: bool = False,
) -> float:
    """Tokens per round of real greedy decoding, pooled over prompts.

    Averaging over all positions as anchors would overstate it by a fifth: an easy run of eight
    tokens would count eight times, although it is one round.

    Args:
      shown: show a progress bar of tokens on standard error.
    """
    total = len(prompts) * NEW_TOKENS
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
            max_new_tokens=NEW_TOKENS,
            progress=bar.update,
        )
    return pooled_tau([completion.stats for completion in completions])
