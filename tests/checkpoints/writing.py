"""Small checkpoints for tests, written without torch."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jaxspec.tokenizer import Tokenizer

DENSE = {
    "model_type": "qwen3",
    "vocab_size": 11,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"},
}
MIXTURE = DENSE | {
    "model_type": "qwen3_moe",
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 5,
    "norm_topk_prob": True,
    "mlp_only_layers": [1],
}
LLAMA = DENSE | {"model_type": "llama", "tie_word_embeddings": True}
QWEN2 = DENSE | {"model_type": "qwen2", "tie_word_embeddings": True}


def random_tensors(raw: dict, *, stacked_experts: bool = False) -> dict[str, np.ndarray]:
    """Every tensor that Hugging Face saves for such a configuration."""
    rng = np.random.default_rng(0)
    shapes = tensor_shapes(raw, stacked_experts=stacked_experts)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def tensor_shapes(raw: dict, *, stacked_experts: bool = False) -> dict[str, tuple[int, ...]]:
    """Of every tensor that Hugging Face saves for such a configuration."""
    width, dim = raw["hidden_size"], raw["head_dim"]
    queries, keys = raw["num_attention_heads"] * dim, raw["num_key_value_heads"] * dim
    inner, vocab = raw["intermediate_size"], raw["vocab_size"]
    shapes = {"model.embed_tokens.weight": (vocab, width), "model.norm.weight": (width,)}
    if not raw.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (vocab, width)
    for i in range(raw["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (width,),
            f"{layer}.post_attention_layernorm.weight": (width,),
            f"{layer}.self_attn.q_proj.weight": (queries, width),
            f"{layer}.self_attn.k_proj.weight": (keys, width),
            f"{layer}.self_attn.v_proj.weight": (keys, width),
            f"{layer}.self_attn.o_proj.weight": (width, queries),
        }
        if raw["model_type"] == "qwen2":
            shapes |= {
                f"{layer}.self_attn.q_proj.bias": (queries,),
                f"{layer}.self_attn.k_proj.bias": (keys,),
                f"{layer}.self_attn.v_proj.bias": (keys,),
            }
        if raw["model_type"].startswith("qwen3"):
            shapes |= {
                f"{layer}.self_attn.q_norm.weight": (dim,),
                f"{layer}.self_attn.k_norm.weight": (dim,),
            }
        sparse = raw["model_type"] == "qwen3_moe" and i not in raw["mlp_only_layers"]
        if not sparse:
            shapes |= {
                f"{layer}.mlp.gate_proj.weight": (inner, width),
                f"{layer}.mlp.up_proj.weight": (inner, width),
                f"{layer}.mlp.down_proj.weight": (width, inner),
            }
            continue
        experts, narrow = raw["num_experts"], raw["moe_intermediate_size"]
        shapes[f"{layer}.mlp.gate.weight"] = (experts, width)
        if stacked_experts:
            shapes[f"{layer}.mlp.experts.gate_up_proj"] = (experts, 2 * narrow, width)
            shapes[f"{layer}.mlp.experts.down_proj"] = (experts, width, narrow)
            continue
        for e in range(experts):
            shapes |= {
                f"{layer}.mlp.experts.{e}.gate_proj.weight": (narrow, width),
                f"{layer}.mlp.experts.{e}.up_proj.weight": (narrow, width),
                f"{layer}.mlp.experts.{e}.down_proj.weight": (width, narrow),
            }
    return shapes


def write_large_folder(folder: Path, raw: dict, *, shards: int) -> int:
    """A checkpoint of random bfloat16 written shard by shard; returns its bytes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    rng = np.random.default_rng(0)
    shapes = tensor_shapes(raw)
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    weight_map = {name: files[i % shards] for i, name in enumerate(sorted(shapes))}
    for file in files:
        tensors = {}
        for name, shape in shapes.items():
            if weight_map[name] == file:
                bits = rng.integers(0, 2**16, shape, np.uint16)
                bits = bits & 0x83FF | 0x3C00  # below 2 ** -6, of either sign
                tensors[name] = bits.view(ml_dtypes.bfloat16)
        save_file(tensors, folder / file)
    write_index(folder, weight_map)
    return 2 * sum(int(np.prod(shape)) for shape in shapes.values())


def write_folder(
    folder: Path, raw: dict, tensors: dict[str, np.ndarray], *, shards: int = 1
) -> Path:
    """A checkpoint folder; with several shards, tensors are dealt to them in turn."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    weight_map = {name: files[i % shards] for i, name in enumerate(sorted(tensors))}
    for file in files:
        held = {name: tensors[name] for name, place in weight_map.items() if place == file}
        save_file(held, folder / file)
    write_index(folder, weight_map)
    return folder


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> Path:
    """The files of a Hugging Face tokenizer."""
    from transformers import PreTrainedTokenizerFast

    (eos,) = tokenizer.eos_token_ids
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.fast,
        eos_token=tokenizer.fast.id_to_token(eos),
        chat_template=tokenizer.chat_template,
    ).save_pretrained(folder)
    return folder


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def read_index(folder: Path) -> dict[str, str]:
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
