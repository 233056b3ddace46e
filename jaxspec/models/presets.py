"""Published shapes of the Qwen3 family.

Checked in `tests/models/test_presets.py` against `config.json` values that third parties repeat
(named there) and against the parameter counts of the model cards. A checkpoint that is loaded
is always read by its own `config.json`.
"""

from __future__ import annotations

import dataclasses

from jaxspec.config import TargetConfig

VOCAB_SIZE = 151_936
END_OF_TURN, END_OF_TEXT = 151_645, 151_643


def _dense(hidden, intermediate, layers, heads, *, kv_heads=8, tied=False, **moe):
    return TargetConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=128,
        tie_embeddings=tied,
        eos_token_ids=(END_OF_TURN, END_OF_TEXT),
        **moe,
    )


def _sparse(hidden, intermediate, layers, heads, *, expert_width):
    return _dense(
        hidden,
        intermediate,
        layers,
        heads,
        kv_heads=4,
        num_experts=128,
        experts_per_token=8,
        moe_intermediate_size=expert_width,
        norm_topk_prob=True,
        sparse_layers=tuple(range(layers)),
    )


PRESETS: dict[str, TargetConfig] = {
    "qwen3-0.6b": _dense(1024, 3072, 28, 16, tied=True),
    "qwen3-1.7b": _dense(2048, 6144, 28, 16, tied=True),
    "qwen3-4b": _dense(2560, 9728, 36, 32, tied=True),
    "qwen3-8b": _dense(4096, 12_288, 36, 32),
    "qwen3-14b": _dense(5120, 17_408, 40, 40),
    "qwen3-32b": _dense(5120, 25_600, 64, 64),
    "qwen3-30b-a3b": _sparse(2048, 6144, 48, 32, expert_width=768),
    "qwen3-235b-a22b": _sparse(4096, 12_288, 94, 64, expert_width=1536),
}

# The releases of July 2025 (Instruct and Thinking alike): same shapes, longer context.
_THETA_2507 = {"4b": 5e6, "30b-a3b": 1e7, "235b-a22b": 5e6}
PRESETS |= {
    f"qwen3-{size}-2507": dataclasses.replace(
        PRESETS[f"qwen3-{size}"], rope_theta=theta, max_positions=262_144
    )
    for size, theta in _THETA_2507.items()
}
