"""Draft vocabularies, embeddings and LM heads in speculators' and EAGLE-3's files.

`d2t` holds offsets (target id = draft id + offset), `t2d` tells which target ids have a draft
id, and `lm_head` has a row per draft id.
"""

from __future__ import annotations

import warnings
from typing import Any

import jax
import numpy as np

from jaxspec.checkpoints.drafter_files import DrafterTensors, equal_as_stored
from jaxspec.checkpoints.fuse import check_weights

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
OFFSETS, MEMBERS = "d2t", "t2d"


def draft_tokens(tensors: DrafterTensors, raw: dict[str, Any], vocab: int) -> np.ndarray | None:
    """The draft vocabulary, ascending ids [V']; None for the whole vocabulary.

    Args:
      raw: the file's `config.json`, whose `draft_vocab_size` is V'; without it V.

    Raises:
      ValueError: `d2t`, `t2d` and `draft_vocab_size` disagree, or name tokens that the target
        lacks.
    """
    kept, wanted = named_tokens(tensors, vocab), raw.get("draft_vocab_size") or vocab
    found = vocab if kept is None else len(kept)
    if found != wanted:
        holds = f"names {found} tokens" if kept is not None else "is missing"
        raise ValueError(
            f"{tensors.origin}: 'draft_vocab_size' is {wanted}, but tensor '{OFFSETS}' {holds};"
            " expected equal numbers"
        )
    if kept is None or found == vocab:
        return None
    if kept[-1] == found - 1:
        warnings.warn(
            f"{tensors.origin}: tensor '{OFFSETS}' is all zeros, so only the first {found} "
            "tokens are drafted; SpecForge writes this if no vocabulary was given",
            stacklevel=2,
        )
    return kept


def named_tokens(tensors: DrafterTensors, vocab: int) -> np.ndarray | None:
    """The tokens that `d2t` names, ascending ids; None without it.

    Raises:
      ValueError: it and `t2d` disagree, or name tokens that the target lacks.
    """
    if OFFSETS not in tensors.shapes:
        return None
    shape = tensors.shapes[OFFSETS]
    if len(shape) != 1 or not 1 <= shape[0] <= vocab:
        raise ValueError(
            f"{tensors.origin}: tensor '{OFFSETS}' has shape {shape}; expected one offset for "
            f"each of 1 … {vocab} draft ids"
        )
    offsets = tensors.read(OFFSETS)
    ids = np.arange(len(offsets)) + offsets
    if not (np.all(np.diff(ids) > 0) and 0 <= ids[0] and ids[-1] < vocab):
        raise ValueError(
            f"{tensors.origin}: tensor '{OFFSETS}' does not give distinct token ids, 0 … "
            f"{vocab - 1}, in ascending order; expected offsets, target id - draft id"
        )
    if MEMBERS in tensors.shapes:
        members = np.flatnonzero(tensors.read(MEMBERS))
        if not np.array_equal(members, ids):
            raise ValueError(
                f"{tensors.origin}: tensors '{OFFSETS}' and '{MEMBERS}' name {len(ids)} and "
                f"{len(members)} tokens, not the same; the file is of two conversions"
            )
    return ids.astype(np.int32)


def vocabulary_tensors(kept: np.ndarray, vocab: int) -> dict[str, np.ndarray]:
    """`d2t` and `t2d` of a draft vocabulary."""
    members = np.zeros(vocab, bool)
    members[kept] = True
    return {OFFSETS: kept.astype(np.int64) - np.arange(len(kept)), MEMBERS: members}


def own_table(
    tensors: DrafterTensors,
    name: str,
    theirs: jax.Array,
    width: int,
    dtype,
    kept: np.ndarray | None = None,
) -> np.ndarray | None:
    """The file's own embedding or LM head; None if it equals the target's, which is not copied.

    Args:
      theirs: the target's [V, M].
      width: the drafter's M.
      kept: ids [V'] of the tokens that it has rows for; None for all.

    Raises:
      ValueError: it is damaged or has another shape; or it is missing and the target's has
        another shape.
    """
    shape = (theirs.shape[0] if kept is None else len(kept), width)
    found = tensors.shapes.get(name)
    if found is None and theirs.shape == shape:
        return None
    if found != shape:
        missing = f"is missing, and the target's has shape {theirs.shape}"
        holds = missing if found is None else f"has shape {found}"
        raise ValueError(
            f"{tensors.origin}: tensor '{name}' {holds}; its configuration asks for {shape}"
        )
    stored = tensors.read(name)
    if equal_as_stored(stored, theirs if kept is None else theirs[kept]):
        return None
    with np.errstate(over="ignore"):  # overflow is reported below, with the tensor's name
        stored = stored.astype(dtype)
    check_weights(stored, name, tensors.origin)
    return stored
