"""Common parts of the formats of block drafters."""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np

from jaxspec.checkpoints import dflash2, layer_sizes, visibility
from jaxspec.checkpoints.drafter_files import DrafterTensors
from jaxspec.checkpoints.drafter_format import DrafterFormat
from jaxspec.checkpoints.head_tensors import block_parts
from jaxspec.checkpoints.json_config import JsonConfig
from jaxspec.checkpoints.known_keys import HARMLESS
from jaxspec.checkpoints.rope import read_rope
from jaxspec.config import DrafterConfig

TEMPERATURES = "sts_temperatures"  # key of config.json; one per slot
DRAFT_TOKENS = "draft_token_ids"  # a tensor, int32 [V']
PREFIXES = r"^(draft_model\.|model\.|logit_head\.)"  # prefixes that some programs write
# Harmless keys besides those of any model: training, the target's vocabulary, default trees.
DRAFTER_HARMLESS = HARMLESS | {
    *("num_anchors", "candidate_tokens", "eos_token_id", "tie_word_embeddings"),
    TEMPERATURES,
}
PREDICT_NEXT = ("sample_from_anchor", "query_zero_predicts_next")
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
HEAD_TYPES = {"vanilla": "markov", "gated": "gated", "rnn": "rnn"}  # theirs to ours


class BlockFormat(DrafterFormat):
    """A format of block drafters. By default a draft vocabulary is a tensor of ids; a program
    that ignores it drafts from the whole vocabulary.
    """

    kind = DrafterConfig
    extra = frozenset({DRAFT_TOKENS})

    def parts(self, c):
        return block_parts(c)

    def todays_name(self, name):
        return dflash2.renamed(re.sub(PREFIXES, "", name))

    def read_vocabulary(self, tensors, raw, c, target, dtype):
        return {"kept": draft_tokens(tensors, c.vocab_size)}

    def vocabulary_tensors(self, vocabulary, c, dtype):
        if vocabulary.kept is None:
            return {}
        if vocabulary.judge is not None:
            raise ValueError(
                f"the drafter has its own LM head, for which format {self.name!r} has no "
                "tensor; save it as 'speculators'"
            )
        return {DRAFT_TOKENS: np.asarray(vocabulary.kept)}


def layers_from_json(raw: JsonConfig, window: tuple[int | None, ...]) -> dict[str, Any]:
    """Fields of the drafter's layers, from the keys of a Qwen3."""
    raw.one_of("model_type", ("qwen3",), "qwen3")
    raw.one_of("hidden_act", ("silu",), "silu")
    raw.one_of("attention_bias", (False,), False)
    raw.one_of("use_qk_norm", (True,), True)
    return dict(
        num_layers=raw.count("num_hidden_layers"),
        head_dim=raw.integer("head_dim"),
        **layer_sizes.from_json(raw),
        **rope_of(raw, window),
    )


def rope_of(whole: JsonConfig, window: tuple[int | None, ...]) -> dict[str, Any]:
    """Rotary positions of the layers, which must be the same for all."""
    kinds = {"full_attention" if w is None else "sliding_attention" for w in window}
    found = {read_rope(whole, kind, full_rotary=True) for kind in kinds}
    if len(found) > 1:
        raise whole.refusal("rope_parameters", "one rule for all layers of a drafter")
    ((theta, scaling),) = found
    return {"rope_theta": theta, "rope_scaling": scaling}


def layers_to_json(c: DrafterConfig, dtype: str) -> dict[str, Any]:
    """The keys of a Qwen3 for the drafter's layers."""
    raw = layer_sizes.to_json(c) | {
        "attention_bias": False,
        "block_size": c.block_size,
        "dtype": dtype,
        "max_window_layers": c.num_layers,
        "model_type": "qwen3",
        "num_target_layers": c.target_layers,
        "tie_word_embeddings": False,
        **dict.fromkeys(IDS),
    }
    raw |= visibility.to_json(c.window)
    causal = visibility.switch(c)
    if c.causal != visibility.causality(None, c.window):
        raw["is_causal"] = causal
    return raw


def block_size(whole: JsonConfig, own: JsonConfig) -> int:
    """The block size, given at the top or inside; without either 16, as in z-lab's programs."""
    places = [section for section in (own, whole) if section.has("block_size")]
    sizes = sorted({section.integer("block_size") for section in places})
    if not sizes and own is not whole:
        return 16
    if len(sizes) != 1:
        raise ValueError(
            f"{whole.origin}: expected one 'block_size' in the drafter's configuration, found "
            f"{sizes}"
        )
    return sizes[0]


def agreed(whole: JsonConfig, own: JsonConfig, keys: tuple[str, ...], default: bool) -> bool:
    """A switch under any of its names in different programs, at the top or inside."""
    found = {
        f"'{key}' of {section.origin}": section.flag(key)
        for section in (whole, own)
        for key in keys
        if section.has(key)
    }
    if len(set(found.values())) > 1:
        said = " but ".join(f"{name} is {value}" for name, value in found.items())
        raise ValueError(
            f"{whole.origin}: {said}; these keys mean the same: keep the one that training used"
        )
    return next(iter(found.values()), default)


def heads_from_json(own: JsonConfig, fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of DSpark's heads, added to those of a selector (`dflash2.from_json`) if any."""
    rank = own.integer("markov_rank", 0, least=0)
    head = own.one_of("markov_head_type", tuple(HEAD_TYPES), "vanilla")
    confidence = None
    if own.flag("enable_confidence_head"):
        with_previous = own.flag("confidence_head_with_markov", rank > 0)
        confidence = "hidden_and_previous" if with_previous else "hidden"
    if "candidates" not in fields:
        fields |= {"sequential": HEAD_TYPES[head] if rank else None, "rank": rank}
    elif rank or confidence:
        raise ValueError(
            f"{own.origin}: 'selector_rank' asks for DFlash2's selector and "
            f"{'markov_rank' if rank else 'enable_confidence_head'!r} for a head of DSpark's; "
            "expected one of them"
        )
    return fields | {"confidence": confidence}


def heads_to_json(c: DrafterConfig) -> dict[str, Any]:
    """The keys of DSpark's heads."""
    own: dict[str, Any] = {
        "markov_rank": c.rank,
        "enable_confidence_head": c.confidence is not None,
    }
    if c.sequential:
        theirs = {ours: theirs for theirs, ours in HEAD_TYPES.items()}
        own["markov_head_type"] = theirs[c.sequential]
    if c.confidence:
        own["confidence_head_with_markov"] = c.confidence == "hidden_and_previous"
    return own


def newer_needs(c: DrafterConfig) -> dict[str, bool]:
    """Features that formats before DFlash2 lack, and whether the drafter needs each."""
    return {
        "convolutions": c.conv_taps > 0,
        "scaled logits": c.logit_scale != 1 or c.logit_softcap is not None,
        "scaled embeddings": c.embedding_scale != 1,
    }


def draft_tokens(tensors: DrafterTensors, vocab: int) -> np.ndarray | None:
    """The draft vocabulary, ascending ids [V'], if there is one."""
    if DRAFT_TOKENS not in tensors.shapes:
        return None
    shape = tensors.shapes[DRAFT_TOKENS]

    def refuse(found: str) -> ValueError:
        return ValueError(
            f"{tensors.origin}: tensor '{DRAFT_TOKENS}' {found}; expected 2 … {vocab} token "
            f"ids, all different, 0 … {vocab - 1}, in ascending order"
        )

    if len(shape) != 1 or not 2 <= shape[0] <= vocab:
        raise refuse(f"has shape {shape}")
    ids = tensors.read(DRAFT_TOKENS)
    outside = ids[(ids < 0) | (ids >= vocab)]
    if outside.size:
        raise refuse(f"names token {outside[0]}")
    for before, token in itertools.pairwise(ids.tolist()):
        if token == before:
            raise refuse(f"names token {token} twice")
        if token < before:
            raise refuse(f"has {before} before {token}")
    return ids
