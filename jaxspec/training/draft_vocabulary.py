"""The draft vocabulary of a run (`drafters.head.Vocabulary`)."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxspec.checkpoints.tensors import read_json
from jaxspec.data.conversations import Example
from jaxspec.whole_files import replace_text

FILE = "draft_vocabulary.json"


def most_frequent(
    examples: Sequence[Example], size: int, *, vocab: int, always: Sequence[int] = ()
) -> np.ndarray:
    """The tokens that the target wrote most often: ascending ids, int32 [size].

    Ties, tokens never written included, go to the lowest ids.

    Args:
      always: ids to include at any frequency.

    Raises:
      ValueError: `always` has more than `size` ids.
    """
    if len(set(always)) > size:
        raise ValueError(
            f"a draft vocabulary of {size} tokens has no room for the {len(set(always))} stop "
            "ids; make it larger"
        )
    counts = _counts(examples, vocab)
    counts[list(always)] = counts.sum() + 1
    return np.sort(np.argsort(-counts, kind="stable")[:size]).astype(np.int32)


def coverage(examples: Sequence[Example], kept: np.ndarray, *, vocab: int) -> float:
    """Share of the tokens written by the target that are in the draft vocabulary."""
    counts = _counts(examples, vocab)
    return float(counts[kept].sum() / max(counts.sum(), 1))


def save_tokens(
    folder: Path, kept: np.ndarray | None, examples: Sequence[Example], *, vocab: int
) -> None:
    """Writes and prints a run's draft vocabulary; removes one of a run that never began.

    Args: kept: None for all tokens.
    """
    path = folder / FILE
    if kept is None:
        path.unlink(missing_ok=True)
        return
    covered = coverage(examples, kept, vocab=vocab)
    fields = {"size": len(kept), "coverage": covered, "token_ids": kept.tolist()}
    replace_text(path, json.dumps(fields) + "\n")
    print(
        f"draft vocabulary: {len(kept)} of {vocab} tokens, {covered:.2%} of those that the "
        "target wrote",
        file=sys.stderr,
    )


def load_tokens(folder: Path) -> np.ndarray | None:
    """The tokens that `save_tokens` wrote; None without a file."""
    path = folder / FILE
    return np.array(read_json(path)["token_ids"], np.int32) if path.exists() else None


def _counts(examples: Sequence[Example], vocab: int) -> np.ndarray:
    counts = np.zeros(vocab, np.int64)
    for example in examples:
        counts += np.bincount(example.tokens[example.supervised], minlength=vocab)
    return counts
