"""TreeFlash's format: z-lab's keys, and those of its MLP in `treeflash_config`.

The backbone's tensors are under `model.`, the MLP's under `ar_approximation.`.
"""

from __future__ import annotations

from jaxspec.checkpoints import zlab
from jaxspec.checkpoints.block_format import (
    DRAFTER_HARMLESS,
    BlockFormat,
    layers_to_json,
    newer_needs,
)
from jaxspec.checkpoints.known_keys import NEUTRAL
from jaxspec.config import DrafterConfig

SECTION = "treeflash_config"


class TreeFlash(BlockFormat):
    """See the module."""

    name = "treeflash"
    normed_last = True

    def recognises(self, raw):
        return SECTION in raw

    def from_json(self, whole, target):
        fields = zlab.section_fields(whole, whole.section(zlab.SECTION), predict_next=False)
        own = whole.section(SECTION)
        corrects = own.one_of("ar_approximation", ("swiglu", None), None)
        sequential = "mlp" if corrects else None
        config = whole.make(DrafterConfig, **fields, sequential=sequential)
        whole.finish(DRAFTER_HARMLESS, NEUTRAL)
        return config

    def to_json(self, c, dtype, *, kept, verifier):
        correction = "swiglu" if c.sequential else None
        return layers_to_json(c, dtype) | {
            "architectures": ["TreeFlashDraftModel"],
            zlab.SECTION: {
                "mask_token_id": c.mask_token_id,
                "target_layer_ids": list(c.taps),
            },
            SECTION: {"ar_approximation": correction, "candidate_tokens": 16},
        }

    def written_name(self, name):
        backbone = name.startswith(("fc.", "hidden_norm.", "norm.", "layers."))
        return f"model.{name}" if backbone else name

    def missing(self, c, kept):
        return {
            "causal blocks": any(c.causal),
            **newer_needs(c),
            "predict_next": c.predict_next,
            f"sequential {c.sequential!r}": c.sequential not in ("mlp", None),
            "a confidence head": c.confidence is not None,
        }
