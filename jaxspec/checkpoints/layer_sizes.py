"""Sizes of layers in the `config.json` of a Llama or a Qwen3, target or drafter."""

from __future__ import annotations

from typing import Any

from jaxspec.checkpoints.json_config import JsonConfig
from jaxspec.checkpoints.rope import rope_to_json
from jaxspec.config import DrafterConfig, TargetConfig
from jaxspec.drafters.eagle_head import EagleConfig

MAX_POSITIONS = 40_960  # default for drafters


def from_json(raw: JsonConfig) -> dict[str, Any]:
    """Size fields of a drafter's configuration, except number of layers and head dimension."""
    heads = raw.integer("num_attention_heads")
    return dict(
        vocab_size=raw.integer("vocab_size"),
        hidden_size=raw.integer("hidden_size"),
        intermediate_size=raw.integer("intermediate_size"),
        num_heads=heads,
        num_kv_heads=raw.integer("num_key_value_heads", heads),
        rms_norm_eps=raw.number("rms_norm_eps", 1e-6),
        max_positions=raw.integer("max_position_embeddings", MAX_POSITIONS),
    )


def to_json(c: TargetConfig | DrafterConfig | EagleConfig) -> dict[str, Any]:
    """The keys of sizes and rotary positions, and those with one value in all models here."""
    return {
        "attention_dropout": 0.0,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "hidden_size": c.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": c.intermediate_size,
        "max_position_embeddings": c.max_positions,
        "num_attention_heads": c.num_heads,
        "num_hidden_layers": c.num_layers,
        "num_key_value_heads": c.num_kv_heads,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_parameters": rope_to_json(c.rope_theta, c.rope_scaling),
        "use_cache": True,
        "vocab_size": c.vocab_size,
    }
