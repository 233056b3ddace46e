"""Published shapes of the Qwen3 family, from each model's `config.json`."""

from __future__ import annotations

from jaxspec.config import TargetConfig

VOCAB_SIZE = 151_936
END_OF_TURN, END_OF_TEXT = 151_645, 151_643


def _qwen3(
    hidden, intermediate, layers, heads, *, kv_heads=8, tied=False, **moe
) -> TargetConfig:
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


PRESETS = {
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, tied=True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, tied=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, tied=True),
    "qwen3-8b": _qwen3(4096, 12_288, 36, 32),
    "qwen3-14b": _qwen3(5120, 17_408, 40, 40),
    "qwen3-32b": _qwen3(5120, 25_600, 64, 64),
    "qwen3-30b-a3b": _qwen3(
        2048,
        6144,
        48,
        32,
        kv_heads=4,
        num_experts=128,
        experts_per_token=8,
        moe_intermediate_size=768,
        norm_topk_prob=True,
        sparse_layers=tuple(range(48)),
    ),
}
