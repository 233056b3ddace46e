"""The format of vLLM's `speculators`: DFlash, DFlash2 and DSpark heads.

A nested `transformer_layer_config` describes the drafter's layers, flat keys everything else.
Differences from z-lab's files:

- layer ids name the streams that *enter* a layer, so they are one more than ours;
- the number of the target's layers is missing; its name is in `speculators_config`;
- with a draft vocabulary the file has its own LM head (`draft_vocabulary`), and a Markov head's
  output table has only the rows of the drafted tokens.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from jaxspec.checkpoints import dflash2, draft_vocabulary, visibility
from jaxspec.checkpoints.block_format import (
    BlockFormat,
    heads_from_json,
    heads_to_json,
    layers_from_json,
    layers_to_json,
)
from jaxspec.checkpoints.draft_vocabulary import EMBEDDING, HEAD, MEMBERS, OFFSETS
from jaxspec.checkpoints.json_config import REQUIRED, JsonConfig
from jaxspec.checkpoints.known_keys import HARMLESS, NEUTRAL
from jaxspec.config import DrafterConfig, TargetConfig
from jaxspec.models.scaled import by_value

KEY = "speculators_model_type"
# Kinds that are not implemented, and why.
MISSING = {
    "xpress": "XPress refines what it drafts by a network of its own",
    "mtp": "layers of the target's own checkpoint are drafter 'mtp'",
}
CLASSES = {"dflash": "DFlash", "dflash2": "DFlash2", "dspark": "DSpark"}  # by kind
VERSION = "0.9.0"
MARKOV_OUTPUT = "markov_head.markov_w2.weight"
# Copies of the target's arrays that older versions wrote, as is an LM head of full vocabulary.
COPIES = (EMBEDDING, "verifier_lm_head.weight", "verifier_norm.weight")
# Else the recurrence would begin at a slot that predicts nothing.
RECURRENT = "a recurrent head ('markov_head_type': 'rnn')"
DEFAULTS = {
    "conv_kernel_size": 2,
    "conv_group_size": 16,
    "selector_rank": 256,
    "selector_top_k": 16,
}
OWN_HARMLESS = HARMLESS | {
    *("speculators_config", "speculators_version", "tie_word_embeddings", "eos_token_id"),
}


def taps_from_json(whole: JsonConfig, key: str, target: TargetConfig | None) -> tuple[int, ...]:
    """The taps, from a key that names streams entering a layer; without it, the programs'
    default, which depends on the target's depth."""
    if whole.has(key):
        return tuple(i - 1 for i in whole.items(key, int))
    if target is None:
        raise ValueError(
            f"{whole.origin} has no '{key}', so the drafter's taps depend on its target's "
            "depth, which is unknown here; load it together with its target"
        )
    return (1, target.num_layers // 2 - 1, target.num_layers - 4)


def _fields(
    whole: JsonConfig, layer: JsonConfig, target: TargetConfig | None
) -> dict[str, Any]:
    """Fields of `DrafterConfig` besides the layers' sizes; the target's depth is unknown.

    Raises:
      ValueError: the drafter is of another kind, or a key is not implemented.
    """
    kind = whole.get(KEY)
    if isinstance(kind, str) and kind in MISSING:
        raise whole.refusal(KEY, f"another kind: {MISSING[kind]}")
    whole.one_of(KEY, (*CLASSES, "eagle3", "peagle"), REQUIRED)  # the last two: elsewhere
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
        "taps": taps_from_json(whole, "aux_hidden_state_layer_ids", target),
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


def _around(c: DrafterConfig, layer: dict[str, Any], kept: int | None) -> dict[str, Any]:
    """The flat keys, with the layers' configuration nested."""
    kind = _kind(c)
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
    """`speculators_config`, which names the target and the number of tokens to draft."""
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
    if not isinstance(name, str) or not name:
        return None
    beside = folder / name
    return str(beside.resolve()) if beside.exists() else name


def verifier_name(target: str, folder: Path) -> str:
    """What a drafter's configuration calls its target: the inverse of `verifier`."""
    return os.path.relpath(target, folder) if Path(target).exists() else target


def _kind(c: DrafterConfig) -> str:
    return "dflash2" if c.sequential == "bilinear" else "dspark" if c.sequential else "dflash"


class Speculators(BlockFormat):
    """See the module."""

    name = "speculators"
    extra = frozenset({OFFSETS, MEMBERS, HEAD, *COPIES})

    def recognises(self, raw):
        return KEY in raw

    def from_json(self, whole, target):
        layer = whole.section("transformer_layer_config")
        fields = _fields(whole, layer, target)
        heads = heads_from_json(whole, {}) if "sequential" not in fields else {}
        if heads.get("sequential") == "rnn" and not fields["predict_next"]:
            raise whole.refusal("sample_from_anchor", f"true with {RECURRENT}")
        shape = layers_from_json(layer, fields["window"])
        config = whole.make(DrafterConfig, target_layers=None, **shape, **fields, **heads)
        whole.finish(OWN_HARMLESS, NEUTRAL)
        return config

    def to_json(self, c, dtype, *, kept, verifier):
        layer = layers_to_json(c, dtype)
        for key in ("block_size", "num_target_layers", "is_causal"):
            layer.pop(key, None)
        raw = _around(c, layer, kept)
        raw["speculators_config"] = proposal(raw[KEY], c.depth, verifier)
        return raw | (heads_to_json(c) if raw[KEY] == "dspark" else {})

    def missing(self, c, kept):
        kind = _kind(c)
        scaled = c.logit_scale != 1 or c.logit_softcap is not None or c.embedding_scale != 1
        layers = list(zip(c.window, c.causal, strict=True))
        sliding = {causal for window, causal in layers if window is not None}
        return {
            "sequential 'mlp'": c.sequential == "mlp",
            "scaled logits or embeddings": scaled,
            "causal layers without a window": (None, True) in layers,
            "sliding layers of both kinds of causality": len(sliding) > 1,
            f"slots that predict their own position, with {RECURRENT}": c.sequential == "rnn"
            and not c.predict_next,
            "convolutions without a selector": c.conv_taps > 0 and kind != "dflash2",
            "a selector without convolutions": kind == "dflash2" and not c.conv_taps,
            "a confidence head without a sequential one": c.confidence and kind != "dspark",
            "a selector with a draft vocabulary": kind == "dflash2" and kept is not None,
        }

    def prepare(self, tensors, c):
        kept = draft_vocabulary.named_tokens(tensors, c.vocab_size)
        if kept is not None and MARKOV_OUTPUT in tensors.shapes:
            tensors.spread(MARKOV_OUTPUT, kept, c.vocab_size)

    def arranged(self, tensors, kept):
        if kept is None or MARKOV_OUTPUT not in tensors:
            return tensors
        return tensors | {MARKOV_OUTPUT: tensors[MARKOV_OUTPUT][kept]}

    def read_vocabulary(self, tensors, raw, c, target, dtype):
        kept = draft_vocabulary.draft_tokens(tensors, raw, c.vocab_size)
        if kept is None:
            return {}
        own = draft_vocabulary.own_table(
            tensors, HEAD, target.unembed, c.hidden_size, dtype, kept
        )
        return {"kept": kept, "unembed": own}

    def vocabulary_tensors(self, vocabulary, c, dtype):
        if vocabulary.kept is None:
            return {}
        kept = np.asarray(vocabulary.kept)
        own = draft_vocabulary.vocabulary_tensors(kept, c.vocab_size)
        return own | {HEAD: np.asarray(by_value(vocabulary.unembed)).astype(dtype)}
