"""What a run starts from: the first weights of its drafter, and the tokens that it drafts."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxspec.checkpoints.drafters import load_drafter
from jaxspec.config import TreeConfig
from jaxspec.data.conversations import Example
from jaxspec.models.target import Target
from jaxspec.training import draft_vocabulary
from jaxspec.training.recipe import TrainConfig

DRAFT_VOCABULARY = "draft_vocabulary.json"


def initial_drafter(config: TrainConfig, target: Target) -> tuple[nnx.State, np.ndarray | None]:
    """The drafter that `config.initial` names: weights in float32, and the tokens it drafts.

    Raises:
      ValueError: it cannot be loaded, is not what `config.drafter` says, or has a draft
        vocabulary where `config` asks for another.
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
                f"the drafter in {config.initial} has {what} of its own; training is with the "
                "target's, which is shared: start from another"
            )
    if kept is not None and config.draft_vocab:
        raise ValueError(
            f"draft_vocab is {config.draft_vocab}, but the drafter in {config.initial} has a "
            f"draft vocabulary, of {len(kept)} tokens, and keeps it; leave draft_vocab 0"
        )
    return params.whole_head, None if kept is None else np.asarray(kept)


def drafted_tokens(
    config: TrainConfig,
    target: Target,
    examples: Sequence[Example],
    known: np.ndarray | None,
    folder: Path | None,
) -> jax.Array | None:
    """The tokens that the run drafts, [V'], written down and printed; None for all.

    Args:
      known: from the run's folder, or of the drafter to go on from.
      folder: of the run, in the process that leads.

    Raises:
      ValueError: the examples give others than those known.
    """
    vocab, kept = config.drafter.vocab_size, known
    if config.draft_vocab:
        kept = draft_vocabulary.most_frequent(
            examples, config.draft_vocab, vocab=vocab, always=target.config.eos_token_ids
        )
        if known is not None and not np.array_equal(kept, known):
            raise ValueError(
                f"{DRAFT_VOCABULARY} of the run holds other tokens than are most frequent in "
                "these examples; go on with the data that it began with"
            )
    if kept is None:
        return None
    if folder is not None:
        covered = draft_vocabulary.coverage(examples, kept, vocab=vocab)
        draft_vocabulary.save_tokens(folder / DRAFT_VOCABULARY, kept, covered)
        print(
            f"draft vocabulary: {len(kept)} of {vocab} tokens, {covered:.2%} of those that the "
            "target wrote",
            file=sys.stderr,
        )
    return jnp.asarray(kept)
