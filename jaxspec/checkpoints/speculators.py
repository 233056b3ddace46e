"""The format of vLLM's `speculators`: DFlash, DFlash2 and DSpark heads.

The drafter's own layers are described by a nested `transformer_layer_config`, everything else
by flat keys. What differs from z-lab's files:

- layer ids count streams that *enter* a layer, so that they are one more than ours;
- the number of the target's layers is nowhere, its name is in `speculators_config`;
- with a reduced vocabulary the file has its own LM head; `d2t` holds offsets (target id = draft
  id + offset) and `t2d` which target ids have a draft id.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jaxspec.checkpoints import dflash2, visibility
from jaxspec.checkpoints.json_config import REQUIRED, JsonConfig
from jaxspec.checkpoints.known_keys import HARMLESS, NEUTRAL
from jaxspec.config import DrafterConfig

KEY = "speculators_model_type"
TYPES = ("dflash", "dflash2", "dspark")
CLASSES = {"dflash": "DFlash", "dflash2": "DFlash2", "dspark": "DSpark"}
VERSION = "0.9.0"
HEAD, OFFSETS, MEMBERS = "lm_head.weight", "d2t", "t2d"
# Copies of the target's arrays that older versions wrote; so is a head of a full vocabulary.
COPIES = ("embed_tokens.weight", "verifier_lm_head.weight", "verifier_norm.weight")
DEFAULTS = {
    "conv_kernel_size": 2,
    "conv_group_size": 16,
    "selector_rank": 256,
    "selector_top_k": 16,
}
OWN_HARMLESS = HARMLESS | {
    *("speculators_config", "speculators_version", "tie_word_embeddings", "eos_token_id"),
}


def layer_section(whole: JsonConfig) -> JsonConfig:
    """The nested configuration of the drafter's layers."""
    return whole.section("transformer_layer_config")


def fields(whole: JsonConfig, layer: JsonConfig) -> dict[str, Any]:
    """Fields of `DrafterConfig` beyond the layers' shape; the target's depth is not known.

    Raises:
      ValueError: another kind of drafter, or a key asks for what is not implemented.
    """
    kind = whole.one_of(KEY, TYPES, REQUIRED)
    window = visibility.windows(layer)
    both_ways = whole.flag("sliding_window_non_causal", kind == "dflash2")
    hidden, vocab = layer.integer("hidden_size"), layer.integer("vocab_size")
    whole.one_of("target_hidden_size", (hidden,), hidden)
    reduced = whole.integer("draft_vocab_size", vocab) != vocab
    if reduced and kind == "dflash2":
        raise whole.refusal(
            "draft_vocab_size", f"the target's {vocab}: selectors have no other"
        )
    found = {
        "taps": tuple(i - 1 for i in whole.items("aux_hidden_state_layer_ids", int)),
        "block_size": whole.integer("block_size", 8),
        "mask_token_id": whole.integer("mask_token_id", least=0),
        "predict_next": whole.flag("sample_from_anchor", kind == "dspark"),
        "window": window,
        "causal": tuple(w is not None and not both_ways for w in window),
    }
    if kind == "dflash2":
        pairs = (dflash2.CONVOLUTION, dflash2.SELECTOR)
        found |= {
            name: whole.integer(key, DEFAULTS[key])
            for pair in pairs
            for name, key in pair.items()
        }
        found["sequential"] = "bilinear"
    return found


def to_json(c: DrafterConfig, layer: dict[str, Any], kept: int | None) -> dict[str, Any]:
    """The flat keys around a configuration of the layers, which is nested.

    Args:
      kept: size of the draft vocabulary, None for the whole one.

    Raises:
      ValueError: the format cannot express the configuration.
    """
    kind = "dflash2" if c.sequential == "bilinear" else "dspark" if c.sequential else "dflash"
    _check_expressible(c, kind, kept)
    raw = {
        KEY: kind,
        "speculators_version": VERSION,
        "architectures": [f"{CLASSES[kind]}DraftModel"],
        "aux_hidden_state_layer_ids": [tap + 1 for tap in c.taps],
        "block_size": c.block_size,
        "draft_vocab_size": c.vocab_size if kept is None else kept,
        "dtype": layer.pop("dtype"),
        "mask_token_id": c.mask_token_id,
        "sample_from_anchor": c.predict_next,
        "sliding_window_non_causal": any(c.window) and not any(c.causal),
        "target_hidden_size": None,
        "tie_word_embeddings": False,
        "transformer_layer_config": layer,
    }
    if kind == "dflash2":
        keys = dflash2.CONVOLUTION | dflash2.SELECTOR
        raw |= {key: getattr(c, name) for name, key in keys.items()}
    return raw


def proposal(kind: str, depth: int, verifier: str | None) -> dict[str, Any]:
    """`speculators_config`, by which programs find the target and how much to draft."""
    greedy = {
        "proposal_type": "greedy",
        "speculative_tokens": depth,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    return {
        "algorithm": kind,
        "default_proposal_method": "greedy",
        "proposal_methods": [greedy],
        "verifier": {"name_or_path": verifier, "architectures": []},
    }


def verifier(raw: dict[str, Any], folder: Path) -> str | None:
    """The target a configuration names: a hub name, or a path from the drafter's folder."""
    name: Any = raw
    for key in ("speculators_config", "verifier", "name_or_path"):
        name = name.get(key) if isinstance(name, dict) else None
    if not isinstance(name, str):
        return None
    beside = folder / name
    return str(beside.resolve()) if beside.exists() else name


def draft_tokens(tensors, vocab: int) -> np.ndarray | None:
    """The draft vocabulary, ascending ids [V'], of a file with `d2t`; None for the whole one.

    Raises:
      ValueError: `d2t` and `t2d` disagree, or name tokens that the target lacks.
    """
    if OFFSETS not in tensors.shapes:
        return None
    offsets = tensors.read(OFFSETS)
    ids = np.arange(len(offsets)) + offsets
    good = np.all(np.diff(ids) > 0) and 0 <= ids[0] and ids[-1] < vocab
    if not good:
        raise ValueError(
            f"{tensors.origin}: tensor 'd2t' does not lead to different token ids, 0 … "
            f"{vocab - 1}, in ascending order; expected offsets, target id - draft id"
        )
    if MEMBERS in tensors.shapes:
        members = np.flatnonzero(tensors.read(MEMBERS))
        if not np.array_equal(members, ids):
            raise ValueError(
                f"{tensors.origin}: tensors 'd2t' and 't2d' name {len(ids)} and "
                f"{len(members)} tokens, not the same; the file is of two conversions"
            )
    return ids.astype(np.int32)


def vocabulary_tensors(kept: np.ndarray, head: np.ndarray, vocab: int) -> dict[str, np.ndarray]:
    """What a file with a reduced vocabulary holds of it."""
    members = np.zeros(vocab, bool)
    members[kept] = True
    return {OFFSETS: kept.astype(np.int64) - np.arange(len(kept)), MEMBERS: members, HEAD: head}


def finish(whole: JsonConfig) -> None:
    """Accounts for keys that nothing has read."""
    whole.finish(OWN_HARMLESS, NEUTRAL)


def _check_expressible(c: DrafterConfig, kind: str, kept: int | None) -> None:
    scaled = c.logit_scale != 1 or c.logit_softcap is not None or c.embedding_scale != 1
    layers = list(zip(c.window, c.causal, strict=True))
    sliding = {causal for window, causal in layers if window is not None}
    missing = {
        "sequential 'mlp'": c.sequential == "mlp",
        "scaled logits or embeddings": scaled,
        "causal layers without a window": (None, True) in layers,
        "sliding layers of both kinds of causality": len(sliding) > 1,
        "convolutions without a selector": c.conv_taps > 0 and kind != "dflash2",
        "a selector without convolutions": kind == "dflash2" and not c.conv_taps,
        "a confidence head without a sequential one": c.confidence and kind != "dspark",
        "a selector with a draft vocabulary": kind == "dflash2" and kept is not None,
        "a tap of the last layer after the final norm": c.target_layers - 1 in c.taps,
    }
    for what, wanted in missing.items():
        if wanted:
            raise ValueError(
                f"format 'speculators' has no key for {what}, so that other programs would run "
                "the drafter differently; choose another format"
            )


def head(tensors, kept: np.ndarray, width: int, dtype) -> np.ndarray:
    """The file's own LM head, [V', M].

    Raises:
      ValueError: it is missing, or of another shape.
    """
    found = tensors.shapes.get(HEAD)
    if found != (len(kept), width):
        raise ValueError(
            f"{tensors.origin}: tensor '{HEAD}' "
            + (f"has shape {found}" if found else "is missing")
            + f"; a draft vocabulary of {len(kept)} tokens asks for {(len(kept), width)}"
        )
    return tensors.read(HEAD).astype(dtype)
