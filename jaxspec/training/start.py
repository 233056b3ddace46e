"""The drafter that a run starts from."""

from __future__ import annotations

import dataclasses

import numpy as np
from flax import nnx

from jaxspec.checkpoints.drafters import load_drafter
from jaxspec.models.target import Target
from jaxspec.training.recipe import TrainConfig


def initial_drafter(config: TrainConfig, target: Target) -> tuple[nnx.State, np.ndarray | None]:
    """The drafter that `config.initial` names: weights in float32, and its draft vocabulary.

    Raises:
      ValueError: it cannot be loaded, differs from `config.drafter`, or has a draft vocabulary
        and `config` asks for another.
    """
    loaded = load_drafter(config.initial, target)
    found, wanted = (dataclasses.asdict(c) for c in (loaded.drafter.config, config.drafter))
    other = [f"{x} {found[x]}, expected {wanted[x]}" for x in found if found[x] != wanted[x]]
    if other:
        raise ValueError(
            f"the drafter in {config.initial} is not the one to train ({'; '.join(other)})"
        )
    vocabulary = loaded.params.vocabulary
    own = {
        "an LM head": vocabulary.judge is not None,
        "an embedding": vocabulary.own_embed,
    }
    for what, given in own.items():
        if given:
            raise ValueError(
                f"the drafter in {config.initial} has its own {what}, but training uses the "
                "target's; start from another drafter"
            )
    kept = vocabulary.kept
    if kept is not None and config.draft_vocab:
        raise ValueError(
            f"draft_vocab is {config.draft_vocab}, but the drafter in {config.initial} keeps "
            f"its draft vocabulary of {len(kept)} tokens; leave draft_vocab 0"
        )
    return loaded.params.whole_head, None if kept is None else np.asarray(kept)
