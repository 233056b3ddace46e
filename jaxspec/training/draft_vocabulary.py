"""The draft vocabulary of a run (`drafters.head.Vocabulary`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxspec.data.conversations import Example


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


def save_tokens(path: Path, kept: np.ndarray, covered: float) -> None:
    """Writes the draft vocabulary of a run, atomically."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(
        json.dumps({"size": len(kept), "coverage": covered, "token_ids": kept.tolist()}) + "\n"
    )
    fresh.replace(path)


def load_tokens(path: Path) -> np.ndarray | None:
    """The tokens that `save_tokens` wrote; None without a file."""
    if not path.exists():
        return None
    return np.array(json.loads(path.read_text())["token_ids"], np.int32)


def _counts(examples: Sequence[Example], vocab: int) -> np.ndarray:
    counts = np.zeros(vocab, np.int64)
    for example in examples:
        counts += np.bincount(example.tokens[example.supervised], minlength=vocab)
    return counts
