"""DeepSpec's format of DSpark and, with rank 0, DFlash: all keys at the top.

Slots predict the next position. The file repeats the target's embedding and LM head.
"""

from __future__ import annotations

from jaxspec.checkpoints import zlab
from jaxspec.checkpoints.block_format import (
    DRAFTER_HARMLESS,
    BlockFormat,
    heads_from_json,
    heads_to_json,
    layers_to_json,
    newer_needs,
)
from jaxspec.checkpoints.known_keys import NEUTRAL
from jaxspec.config import DrafterConfig


class DeepSpec(BlockFormat):
    """See the module."""

    name = "deepspec"

    def recognises(self, raw):
        return "markov_rank" in raw and "target_layer_ids" in raw

    def from_json(self, whole, target):
        fields = zlab.section_fields(whole, whole, predict_next=True)
        config = whole.make(DrafterConfig, **fields, **heads_from_json(whole, {}))
        whole.finish(DRAFTER_HARMLESS, NEUTRAL)
        return config

    def to_json(self, c, dtype, *, kept, verifier):
        return (
            layers_to_json(c, dtype)
            | heads_to_json(c)
            | {
                "mask_token_id": c.mask_token_id,
                "target_layer_ids": list(c.taps),
                "architectures": ["Qwen3DSparkModel"],
                # Only training reads it; every published drafter has 512.
                "num_anchors": 512,
            }
        )

    def missing(self, c, kept):
        return {
            "causal blocks": any(c.causal),
            **newer_needs(c),
            "a selector": c.sequential == "bilinear",
            "predict_own": not c.predict_next,
            "sequential 'mlp'": c.sequential == "mlp",
        }

    def repeated(self, tables):
        return {"embed_tokens.weight": tables.embed, "lm_head.weight": tables.unembed}

    def vocabulary_tensors(self, vocabulary, c, dtype):
        if vocabulary.kept is None:
            return {}
        raise ValueError(
            "format 'deepspec' repeats the target's whole LM head, and a drafter with a draft "
            "vocabulary has only some of its rows; choose another format"
        )
