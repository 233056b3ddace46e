"""The drafter that a run starts from."""

from __future__ import annotations

import dataclasses

import numpy as np
from flax import nnx

from jaxspec.checkpoints.drafters import load_drafter
from jaxspec.config import TreeConfig
from jaxspec.models.target import Target
from jaxspec.training.recipe import TrainConfig


def initial_drafter(config: TrainConfig, target: Target) -> tuple[nnx.State, np.ndarray | None]:
    """The drafter that `config.initial` names: weights in float32, and its draft vocabulary.

    Raises:
      ValueError: it cannot be loaded, differs from `config.drafter`, or has a draft vocabulary
        and `config` asks for another.
    """
    drafter, params = load_drafter(config.initial, target.config, target.params, TreeConfig())
    found, wanted = (dataclasses.asdict(c) for c in (drafter.config, config.drafter))
    other = [f"{x} {found[x]}, expected {wanted[x]}" for x in found if found[x] != wanted[x]]
    if other:
        raise ValueError(
            f"the drafter in {config.initial} is not the one to train ({'; '.join(other)})"
        )
    kept = params.vocabulary.kept
    own = {
        "an LM head": params.vocabulary.judge is not None,
        "an embedding": params.vocabulary.own_embed,
    }
    for what, given in own.items():
        if given:
            raise ValueError(
                f"the drafter in {config.initial} has its own {what}, but training uses the "
                "target's; start from another drafter"
            )
    if kept is not None and config.draft_vocab:
        raise ValueError(
            f"draft_vocab is {config.draft_vocab}, but the drafter in {config.initial} keeps "
            f"its draft vocabulary of {len(kept)} tokens; leave draft_vocab 0"
        )
    return params.whole_head, None if kept is None else np.asarray(kept)
