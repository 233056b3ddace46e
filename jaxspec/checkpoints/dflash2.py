"""DFlash2's additions to DFlash's `config.json` and tensors: convolutions, a selector, scales.

As in z-lab's programs, a key is looked up in `dflash_config` first, then at the top.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxspec.checkpoints.fuse import Part, linear, same
from jaxspec.checkpoints.json_config import JsonConfig
from jaxspec.config import DrafterConfig

# Our fields and their keys.
SCALES = {
    "logit_scale": "output_multiplier",
    "embedding_scale": "input_embedding_scale",
    "logit_softcap": "final_logit_softcapping",
}
CONVOLUTION = {"conv_taps": "conv_kernel_size", "conv_group": "conv_group_size"}
SELECTOR = {"rank": "selector_rank", "candidates": "selector_top_k"}


def from_json(whole: JsonConfig, own: JsonConfig) -> dict[str, Any]:
    """Fields of `DrafterConfig`.

    Raises:
      ValueError: one key of a pair is missing, or a value is not a size or a scale.
    """

    def place(key: str) -> JsonConfig:
        return whole.within(own, key)

    fields: dict[str, Any] = {}
    for name, key in SCALES.items():
        if place(key).get(key, 0) != 0:  # 0 is no cap; a scale of 0 is refused
            fields[name] = place(key).number(key)
        elif name != "logit_softcap" and place(key).has(key):
            raise place(key).refusal(key, "a positive number")
    for pair in (CONVOLUTION, SELECTOR):
        given = [key for key in pair.values() if place(key).has(key)]
        if given:
            fields |= {name: place(key).integer(key) for name, key in pair.items()}
    if "candidates" in fields:
        fields["sequential"] = "bilinear"
    return fields


def to_json(c: DrafterConfig) -> dict[str, Any]:
    """Keys of `dflash_config`, without those that have no effect."""
    keys = {
        key: getattr(c, name)
        for name, key in SCALES.items()
        if getattr(c, name) != getattr(DrafterConfig, name)  # the default
    }
    for pair, given in ((CONVOLUTION, c.conv_taps), (SELECTOR, c.candidates)):
        if given:
            keys |= {key: getattr(c, name) for name, key in pair.items()}
    return keys


def convolutions(c: DrafterConfig, layer: str) -> dict[tuple[str, str], tuple[Part, ...]]:
    """The tensors of a layer's two convolutions, by their path in it.

    Rows of the projection are (side, tap, group).
    """
    if not c.conv_taps:
        return {}
    width, taps = c.hidden_size, c.conv_taps
    rows = 2 * taps * (width // c.conv_group)
    table = {}
    for name in ("attention_conv", "mlp_conv"):
        theirs = f"{layer}{name}."
        table[name, "base"] = same(f"{theirs}base_kernel", 2, taps, width)
        # [M, 2, K, G]
        table[name, "projection"] = (
            Part(f"{theirs}kernel_projection.weight", (rows, width), np.s_[...], (1, 2, 3, 0)),
        )
    return table


def selector(c: DrafterConfig) -> dict[str, tuple[Part, ...]]:
    """The tensors of the selector, by their path in the sequential head."""
    book, prefix = (c.vocab_size, c.rank), "candidate_selector."
    return {
        "previous": same(f"{prefix}predecessor_codebook", *book),
        "output": same(f"{prefix}successor_codebook", *book),
        "hidden": linear(f"{prefix}hidden_projection.weight", c.rank, c.hidden_size),
    }


def renamed(name: str) -> str:
    """A tensor's name as z-lab writes it, where codebooks are embedding modules."""
    if name.startswith("candidate_selector.") and name.endswith("codebook.weight"):
        return name.removesuffix(".weight")
    return name
