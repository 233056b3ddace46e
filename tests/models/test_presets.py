"""Presets against published values: config.json as others repeat it, and the cards' counts.

The hub could not be reached where this was written. Sources, all read in November 2026:
  maxtext   AI-Hypercomputer/maxtext, src/MaxText/utils/ckpt_conversion/utils/
            hf_model_configs.py at 02b47fd: config.json key by key
  slime     zyzshishui/slime, scripts/models/qwen3-*.sh: the training arguments of these models
  hexo      a page that prints config.json of Qwen3-0.6B and 1.7B ("Qwen3 架构深度拆解")
  reports   pages that print config.json of Qwen3-235B-A22B-Instruct-2507 and of
            Qwen3-4B-Instruct-2507
  pruning   a test of a pruning library that pins Qwen3.5-0.8B's config.json and its revision
  table     tables of config.json values of Qwen3.5-4B in two repositories; its value heads are
            of a test of a third
  t         the defaults of transformers 5.24's Qwen3_5TextConfig, which are Qwen3.5-9B's
  config    a report that prints Qwen3.6-27B's config.json
  audit     an inventory of the config.json of Qwen3.5-35B-A3B and Qwen3.6-35B-A3B
  fixture   config.json of Qwen3.8-27B in another engine's tests
  slime     THUDM/slime, scripts/models/qwen3.5-*.sh; value heads of 397B are of its card
  shapes    a table of config.json values of the released hybrids, and a check of them that
            names the revision of Qwen3.5-122B-A10B's; its value heads follow from the 122.1
            billion parameters that a third table counts (32 in place of 64 would make 120.8)
For Qwen3-4B-2507 a yml of maxtext says rope_theta 1e6; slime and the page say 5e6.
"""

import json
import math

import jax
import pytest

from jaxspec.checkpoints.catalog import HUB
from jaxspec.checkpoints.huggingface import read_config
from jaxspec.models.params import MoeParams, abstract_params
from jaxspec.models.presets import PRESETS

COMMON = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "attention_bias": False,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
    "eos_token_id": 151645,
}
SPARSE = COMMON | {
    "model_type": "qwen3_moe",
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}


def shape(hidden, intermediate, layers, heads, **more):
    return dict(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        **more,
    )


TIED = {"tie_word_embeddings": True}
LONG = {"max_position_embeddings": 262144}
SMALL_MIXTURE = SPARSE | shape(2048, 6144, 48, 32, moe_intermediate_size=768)
LARGE_MIXTURE = SPARSE | shape(4096, 12288, 94, 64, moe_intermediate_size=1536)
PUBLISHED = {
    "qwen3-0.6b": COMMON | TIED | shape(1024, 3072, 28, 16),  # maxtext, hexo
    "qwen3-1.7b": COMMON | TIED | shape(2048, 6144, 28, 16),  # hexo, slime
    "qwen3-4b": COMMON | TIED | shape(2560, 9728, 36, 32),  # maxtext, slime
    "qwen3-8b": COMMON | shape(4096, 12288, 36, 32),  # maxtext
    "qwen3-14b": COMMON | shape(5120, 17408, 40, 40),  # maxtext
    "qwen3-32b": COMMON | shape(5120, 25600, 64, 64),  # maxtext
    "qwen3-30b-a3b": SMALL_MIXTURE,  # maxtext (2507), slime (rope_theta)
    "qwen3-235b-a22b": LARGE_MIXTURE,  # maxtext (2507), slime (rope_theta)
    # slime, reports
    "qwen3-4b-2507": COMMON | TIED | LONG | shape(2560, 9728, 36, 32, rope_theta=5000000),
    "qwen3-30b-a3b-2507": SMALL_MIXTURE | LONG | {"rope_theta": 10000000},  # maxtext
    "qwen3-235b-a22b-2507": LARGE_MIXTURE | LONG | {"rope_theta": 5000000},  # maxtext, reports
}

ROPE = {
    "mrope_interleaved": True,
    "mrope_section": [11, 11, 10],
    "partial_rotary_factor": 0.25,
    "rope_theta": 10000000,
    "rope_type": "default",
}


def hybrid(hidden, layers, heads, kv_heads, value_heads, *, tied=False, **more):
    kind = "qwen3_5_moe" if "num_experts" in more else "qwen3_5"
    text = {
        "attention_bias": False,
        "attn_output_gate": True,
        "eos_token_id": 248044,
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": value_heads,
        "linear_value_head_dim": 128,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 262144,
        "model_type": f"{kind}_text",
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "partial_rotary_factor": 0.25,
        "rms_norm_eps": 1e-06,
        "rope_parameters": ROPE,
        "tie_word_embeddings": tied,
        "vocab_size": 248320,
    }
    outer = {"model_type": kind, "image_token_id": 248056, "vision_config": {"depth": 27}}
    return outer | {"tie_word_embeddings": tied, "text_config": text | more}


def experts(count, per_token, width):
    return dict(
        num_experts=count,
        num_experts_per_tok=per_token,
        moe_intermediate_size=width,
        shared_expert_intermediate_size=width,
    )


SWISH = {"output_gate_type": "swish"}
PUBLISHED |= {
    # pruning, slime
    "qwen3.5-0.8b": hybrid(1024, 24, 8, 2, 16, tied=True, intermediate_size=3584),
    "qwen3.5-4b": hybrid(2560, 32, 16, 4, 32, tied=True, intermediate_size=9216),  # table
    "qwen3.5-9b": hybrid(4096, 32, 16, 4, 32, intermediate_size=12288),  # t
    "qwen3.5-27b": hybrid(5120, 64, 24, 4, 48, intermediate_size=17408),  # slime
    "qwen3.5-35b-a3b": hybrid(2048, 40, 16, 2, 32, **experts(256, 8, 512)),  # slime, audit
    "qwen3.5-122b-a10b": hybrid(3072, 48, 32, 2, 64, **experts(256, 8, 1024)),  # shapes
    "qwen3.5-397b-a17b": hybrid(4096, 60, 32, 2, 64, **experts(512, 10, 1024)),  # slime
    "qwen3.6-27b": hybrid(5120, 64, 24, 4, 48, intermediate_size=17408, **SWISH),  # config
    "qwen3.6-35b-a3b": hybrid(2048, 40, 16, 2, 32, **experts(256, 8, 512)),  # audit
    # fixture
    "qwen3.8-27b": hybrid(5120, 64, 24, 4, 48, intermediate_size=17408, **SWISH),
}

# Billions of parameters, and of those without the embedding (and activated ones), as the model
# cards round them.
CARDS = {
    "qwen3-0.6b": ("0.6", "0.44"),
    "qwen3-1.7b": ("1.7", "1.4"),
    "qwen3-4b": ("4.0", "3.6"),
    "qwen3-8b": ("8.2", "6.95"),
    "qwen3-14b": ("14.8", "13.2"),
    "qwen3-32b": ("32.8", "31.2"),
    "qwen3-30b-a3b": ("30.5", "29.9"),
    "qwen3-235b-a22b": ("235", "234"),
}
ACTIVATED = {"qwen3-30b-a3b": "3.3", "qwen3-235b-a22b": "22"}


def test_every_preset_is_checked_and_has_a_name_on_the_hub():
    assert set(PRESETS) == set(PUBLISHED) == set(HUB)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    if "text_config" not in PUBLISHED[name]:
        (tmp_path / "generation_config.json").write_text('{"eos_token_id": [151645, 151643]}')
    assert read_config(tmp_path) == PRESETS[name]


def count(tree) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def is_about(value: int, text: str) -> bool:
    """Whether a count is `text` billions, rounded or cut to the digits given."""
    digits = len(text.partition(".")[2])
    return -0.5 * 10**-digits <= value / 1e9 - float(text) < 10**-digits


@pytest.mark.parametrize(
    "name, least, most",
    [  # billions of parameters of the text model; names count the vision tower in
        ("qwen3.5-0.8b", 0.74, 0.8),
        ("qwen3.5-4b", 4.0, 4.4),
        ("qwen3.5-9b", 8.8, 9.2),  # llama.cpp, which reads the text model alone: 8.95
        ("qwen3.5-27b", 26.5, 27.4),
        ("qwen3.5-35b-a3b", 34.0, 35.5),
        ("qwen3.5-122b-a10b", 122.05, 122.15),
        ("qwen3.5-397b-a17b", 394, 398),
    ],
)
def test_parameter_counts_are_those_of_the_names(name, least, most):
    assert least <= count(abstract_params(PRESETS[name])) / 1e9 <= most


@pytest.mark.parametrize("name", CARDS)
def test_parameter_counts_of_the_model_cards(name):
    config, params = PRESETS[name], abstract_params(PRESETS[name])
    total, rest = CARDS[name]
    vocabulary = count((params.embed, params.lm_head))
    assert is_about(count(params), total)
    assert is_about(count(params) - vocabulary, rest)
    if name in ACTIVATED:
        experts = sum(
            count((layer.mlp.gate_up, layer.mlp.down))
            for layer in params.layers
            if isinstance(layer.mlp, MoeParams)
        )
        idle = experts * (config.num_experts - config.experts_per_token) // config.num_experts
        assert is_about(count(params) - idle, ACTIVATED[name])
