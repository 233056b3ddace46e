"""The initial weights of a run's drafter, and its draft vocabulary."""

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


def drafted_tokens(
    config: TrainConfig,
    target: Target,
    examples: Sequence[Example],
    known: np.ndarray | None,
) -> jax.Array | None:
    """The run's draft vocabulary [V']; None for all tokens.

    Args:
      known: draft vocabulary from the run's folder or the initial drafter.

    Raises:
      ValueError: the examples give another vocabulary than `known`.
    """
    vocab, kept = config.drafter.vocab_size, known
    if config.draft_vocab:
        kept = draft_vocabulary.most_frequent(
            examples, config.draft_vocab, vocab=vocab, always=target.config.eos_token_ids
        )
        if known is not None and not np.array_equal(kept, known):
            raise ValueError(
                f"the run's {DRAFT_VOCABULARY} differs from the most frequent tokens of these "
                "examples; resume with the original data"
            )
    return None if kept is None else jnp.asarray(kept)


def save_drafted_tokens(
    folder: Path, config: TrainConfig, examples: Sequence[Example], kept: jax.Array | None
) -> None:
    """Writes and prints a run's draft vocabulary; removes one of a run that never began."""
    path, vocab = folder / DRAFT_VOCABULARY, config.drafter.vocab_size
    if kept is None:
        path.unlink(missing_ok=True)
        return
    tokens = np.asarray(kept)
    covered = draft_vocabulary.coverage(examples, tokens, vocab=vocab)
    draft_vocabulary.save_tokens(path, tokens, covered)
    print(
        f"draft vocabulary: {len(tokens)} of {vocab} tokens, {covered:.2%} of those that the "
        "target wrote",
        file=sys.stderr,
    )
