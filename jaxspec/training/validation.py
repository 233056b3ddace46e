"""Validation: the acceptance length that decoding sees."""

from __future__ import annotations

from collections.abc import Sequence

from flax import nnx
from jax.typing import ArrayLike

from jaxspec.api import generate
from jaxspec.config import DrafterConfig, TreeConfig
from jaxspec.decoding.stats import pooled_tau
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.drafters.block import BlockDrafter, block_params
from jaxspec.models.target import Target
from jaxspec.prompts import Prompt


def trained_drafter(
    config: DrafterConfig,
    weights: nnx.State,
    target: Target,
    tree: TreeConfig | None = None,
    kept: ArrayLike | None = None,
) -> LoadedDrafter:
    """A head's weights as a drafter for `jaxspec.generate`.

    Args:
      tree: what it drafts; the whole chain by default.
      kept: the tokens it drafts (`block_params`).
    """
    if tree is None:
        tree = TreeConfig("chain", size=1 << config.depth.bit_length())
    params = block_params(weights, target.params, kept=kept)
    return LoadedDrafter(BlockDrafter(config, tree), params)


def walked_tau(
    target: Target,
    drafter: LoadedDrafter,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    thinking: bool | None = None,
) -> float:
    """Tokens per round of real greedy decoding, pooled over prompts.

    Averaging over all positions as anchors would overstate it by a fifth: an easy stretch of
    eight tokens would count eight times although it is one round.
    """
    completions = generate(
        target,
        prompts,
        drafter=drafter,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        thinking=thinking,
    )
    return pooled_tau([completion.stats for completion in completions])
