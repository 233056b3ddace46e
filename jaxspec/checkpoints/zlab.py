"""z-lab's format: DFlash, DFlash2 and JetSpec, and DSpark as SpecForge writes it.

`dflash_config` has the keys that a drafter adds to a Qwen3's. Slots predict their own position,
unless `sample_from_anchor` is set; they are causal if it says so (JetSpec).
"""

from __future__ import annotations

from typing import Any

from jaxspec.checkpoints import dflash2, visibility
from jaxspec.checkpoints.block_format import (
    DRAFTER_HARMLESS,
    IDS,
    PREDICT_NEXT,
    BlockFormat,
    agreed,
    block_size,
    heads_from_json,
    heads_to_json,
    layers_from_json,
    layers_to_json,
)
from jaxspec.checkpoints.json_config import JsonConfig
from jaxspec.checkpoints.known_keys import NEUTRAL
from jaxspec.config import DrafterConfig

SECTION = "dflash_config"


def section_fields(whole: JsonConfig, own: JsonConfig, predict_next: bool) -> dict[str, Any]:
    """Fields of `DrafterConfig`, except the heads', of a file with its own keys in `own`."""
    own.one_of("projector_type", ("dspark",), "dspark")
    own.one_of("draft_shift", (False,), False)
    window, hidden = visibility.windows(whole), whole.integer("hidden_size")
    own.one_of("target_hidden_size", (hidden,), hidden)
    return layers_from_json(whole, window) | dict(
        target_layers=whole.integer("num_target_layers", None),
        taps=whole.within(own, "target_layer_ids").items("target_layer_ids", int),
        block_size=block_size(whole, own),
        mask_token_id=whole.within(own, "mask_token_id").integer("mask_token_id", least=0),
        causal=visibility.causality(agreed(whole, own, visibility.CAUSAL, None), window),
        predict_next=agreed(whole, own, PREDICT_NEXT, predict_next),
        window=window,
    )


class ZLab(BlockFormat):
    """See the module."""

    name = "dflash"
    normed_last = True

    def recognises(self, raw):
        return SECTION in raw

    def from_json(self, whole, target):
        own = whole.section(SECTION)
        fields = section_fields(whole, own, predict_next=False)
        heads = heads_from_json(own, dflash2.from_json(whole, own))
        config = whole.make(DrafterConfig, **fields, **heads)
        whole.finish(DRAFTER_HARMLESS, NEUTRAL)
        return config

    def to_json(self, c, dtype, *, kept, verifier):
        causal = visibility.switch(c)
        own: dict[str, Any] = {
            "mask_token_id": c.mask_token_id,
            "target_layer_ids": list(c.taps),
        }
        if causal:
            own["causal"] = True  # as vLLM reads it; the next key is JetSpec's
        if causal is not None:
            own["causal_head"] = causal
        if c.predict_next:
            own["sample_from_anchor"] = True
        if c.confidence or c.sequential not in (None, "bilinear"):
            own |= {"projector_type": "dspark"} | heads_to_json(c)
        raw = layers_to_json(c, dtype) | {SECTION: own | dflash2.to_json(c)}
        if c.candidates or c.conv_taps:
            return raw | {"architectures": ["DFlash2DraftModel"]}
        return _older(raw) | {"architectures": ["DFlashDraftModel"]}

    def missing(self, c, kept):
        return {
            "sequential 'mlp'": c.sequential == "mlp",
            "a selector with a confidence head": c.candidates and c.confidence,
        }


def _older(raw: dict[str, Any]) -> dict[str, Any]:
    """A configuration in the keys of transformers 4."""
    scaling = raw["rope_parameters"]
    theta = scaling.pop("rope_theta")
    plain = scaling == {"rope_type": "default"}
    rest = {key: x for key, x in raw.items() if key not in ("rope_parameters", *IDS)}
    return rest | {"rope_theta": theta, "rope_scaling": None if plain else scaling}
