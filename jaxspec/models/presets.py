"""Published shapes of the Qwen3 family and of its hybrid successors.

Checked in `tests/models/test_presets.py` against `config.json` values that third parties repeat
(named there) and against the parameter counts of the model cards. A checkpoint that is loaded
is always read by its own `config.json`.
"""

from __future__ import annotations

import dataclasses

from jaxspec.config import DeltaNetConfig, TargetConfig

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


def _hybrid(hidden, intermediate, layers, heads, kv_heads, value_heads, *, tied=False, **moe):
    """Qwen3.5 and its successors: every fourth layer is attention, heads of 256."""
    return TargetConfig(
        vocab_size=248_320,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=256,
        rope_theta=1e7,
        max_positions=262_144,
        tie_embeddings=tied,
        delta_net=DeltaNetConfig(
            layers=tuple(i for i in range(layers) if (i + 1) % 4),
            key_heads=16,
            value_heads=value_heads,
            key_dim=128,
            value_dim=128,
        ),
        rotary_dim=64,
        attention_gate=True,
        zero_centered_norms=True,
        eos_token_ids=(248_044,),
        **moe,
    )


def _hybrid_sparse(
    hidden, layers, heads, kv_heads, value_heads, *, experts, per_token, expert_width
):
    return _hybrid(
        hidden,
        hidden,  # of dense layers, which there are none of
        layers,
        heads,
        kv_heads,
        value_heads,
        num_experts=experts,
        experts_per_token=per_token,
        moe_intermediate_size=expert_width,
        shared_expert_size=expert_width,
        norm_topk_prob=True,
        sparse_layers=tuple(range(layers)),
    )


_HYBRID_27B = _hybrid(5120, 17_408, 64, 24, 4, 48)
_HYBRID_35B = _hybrid_sparse(2048, 40, 16, 2, 32, experts=256, per_token=8, expert_width=512)
PRESETS |= {
    "qwen3.5-0.8b": _hybrid(1024, 3584, 24, 8, 2, 16, tied=True),
    "qwen3.5-4b": _hybrid(2560, 9216, 32, 16, 4, 32, tied=True),
    "qwen3.5-9b": _hybrid(4096, 12_288, 32, 16, 4, 32),
    "qwen3.5-27b": _HYBRID_27B,
    "qwen3.5-35b-a3b": _HYBRID_35B,
    "qwen3.5-122b-a10b": _hybrid_sparse(
        3072, 48, 32, 2, 64, experts=256, per_token=8, expert_width=1024
    ),
    "qwen3.5-397b-a17b": _hybrid_sparse(
        4096, 60, 32, 2, 64, experts=512, per_token=10, expert_width=1024
    ),
    "qwen3.6-27b": _HYBRID_27B,
    "qwen3.6-35b-a3b": _HYBRID_35B,
    "qwen3.8-27b": _HYBRID_27B,
}
