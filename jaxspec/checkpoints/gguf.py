"""GGUF checkpoints of Llama-shaped models: configuration, weights, tokenizer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxspec.checkpoints import target_weights
from jaxspec.checkpoints.gguf_file import GgufFile, open_gguf
from jaxspec.checkpoints.json_config import JsonConfig
from jaxspec.checkpoints.tensors import Box, cut
from jaxspec.config import TargetConfig
from jaxspec.models.params import TargetParams
from jaxspec.tokenizer import Tokenizer

# GGUF name (regular expression) -> Hugging Face name
NAMES = {
    r"token_embd\.weight": r"model.embed_tokens.weight",
    r"output_norm\.weight": r"model.norm.weight",
    r"output\.weight": r"lm_head.weight",
    r"blk\.(\d+)\.attn_norm\.weight": r"model.layers.\1.input_layernorm.weight",
    r"blk\.(\d+)\.attn_([qkv])\.weight": r"model.layers.\1.self_attn.\2_proj.weight",
    r"blk\.(\d+)\.attn_output\.weight": r"model.layers.\1.self_attn.o_proj.weight",
    r"blk\.(\d+)\.ffn_norm\.weight": r"model.layers.\1.post_attention_layernorm.weight",
    r"blk\.(\d+)\.ffn_(gate|up|down)\.weight": r"model.layers.\1.mlp.\2_proj.weight",
}
SPECIAL = 3  # tokenizer.ggml.token_type of control tokens
# Ids that end a generation: of a text, of a turn, of a message.
ENDS = tuple(f"tokenizer.ggml.{end}_token_id" for end in ("eos", "eot", "eom"))
# As in `known_keys`.
HARMLESS = frozenset({"llama.tensor_data_layout", "llama.rope.scaling.original_context_length"})
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "llama.attention.causal": (True,),
    "llama.attention.clamp_kqv": (0,),
    "llama.attention.max_alibi_bias": (0,),
    "llama.attention.scale": (),
    "llama.attention.sliding_window": (0,),
    "llama.embedding_scale": (1,),
    "llama.expert_count": (0,),
    "llama.expert_used_count": (0,),
    "llama.logit_scale": (1,),
    "llama.residual_scale": (1,),
    "llama.rope.scale_linear": (1,),
    "llama.rope.scaling.attn_factor": (1,),
    "llama.rope.scaling.factor": (1,),
    "llama.rope.scaling.type": ("none",),
    "llama.use_parallel_residual": (False,),
}


def read_config(path: str | Path) -> TargetConfig:
    """The model that the metadata describes.

    Warns of keys that are not known (`JsonConfig.finish`).

    Raises:
      ValueError: the file is damaged, or describes a model this decoder does not implement.
    """
    file, whole = open_gguf(path), _metadata(path)
    _expect(whole, "general.architecture", "llama")
    own = {k: x for k, x in whole.values.items() if k.startswith("llama.") or k in ENDS}
    raw = JsonConfig(own, path, whole.owner)
    heads = raw.integer("llama.attention.head_count")
    hidden = raw.integer("llama.embedding_length")
    head_dim = raw.integer("llama.rope.dimension_count", hidden // heads)
    config = raw.make(
        TargetConfig,
        vocab_size=raw.integer("llama.vocab_size"),
        hidden_size=hidden,
        intermediate_size=raw.integer("llama.feed_forward_length"),
        num_layers=raw.integer("llama.block_count"),
        num_heads=heads,
        num_kv_heads=raw.integer("llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        rope_theta=raw.number("llama.rope.freq_base", 10_000.0),
        rms_norm_eps=raw.number("llama.attention.layer_norm_rms_epsilon"),
        max_positions=raw.integer("llama.context_length"),
        tie_embeddings="output.weight" not in file.shapes,
        qk_norm=False,
        eos_token_ids=tuple(dict.fromkeys(raw.integer(k, least=0) for k in ENDS if raw.has(k))),
    )
    for key in ("llama.attention.key_length", "llama.attention.value_length"):
        raw.one_of(key, (head_dim,), head_dim)
    raw.finish(HARMLESS, NEUTRAL)
    return config


def load_params(
    path: str | Path,
    config: TargetConfig,
    dtype=jnp.float32,
    mesh: Mesh | None = None,
    *,
    stored: bool = False,
) -> TargetParams:
    """The weights, dequantised one tensor at a time, see `target_weights.load`."""
    if stored:
        raise ValueError(
            f"{path} is a GGUF file; weights 'stored' is for fp8 checkpoints: leave it out"
        )
    return target_weights.load(config, _LlamaTensors(open_gguf(path), config), dtype, mesh)


def load_tokenizer(path: str | Path) -> Tokenizer | None:
    """The tokenizer in the metadata, byte-level BPE as SmolLM2's; None if there is none.

    Raises:
      ValueError: the tokenizer is of another kind.
    """
    raw = _metadata(path)
    if not raw.has("tokenizer.ggml.model"):
        return None
    _expect(raw, "tokenizer.ggml.model", "gpt2")
    _expect(raw, "tokenizer.ggml.pre", "smollm")
    types = raw.items("tokenizer.ggml.token_type", int)
    tokens, merges = (raw.items(f"tokenizer.ggml.{x}", str) for x in ("tokens", "merges"))
    eos = raw.integer("tokenizer.ggml.eos_token_id", least=0)
    try:
        return Tokenizer.from_bpe(
            tokens,
            merges,
            special=[i for i, kind in enumerate(types) if kind == SPECIAL],
            eos=eos,
            chat_template=raw.get("tokenizer.chat_template", None),
        )
    except Exception as error:  # of many kinds: ids past the end, merges of unknown tokens
        raise ValueError(
            f"the tokenizer in {path} is damaged ({error}); download it again"
        ) from error


class _LlamaTensors:
    """The file's tensors under Hugging Face names and in its row order."""

    def __init__(self, file: GgufFile, config: TargetConfig):
        self.origin = str(file.path)
        self._file = file
        self._heads = {"q": config.num_heads, "k": config.num_kv_heads}
        self._names = {_rename(name): name for name in file.shapes}
        self.shapes = {name: file.shapes[source] for name, source in self._names.items()}

    def pieces(self, name: str, shape: tuple[int, ...], box: Box, skip: int = 0):
        """The whole box at once: quantised blocks are not cut."""
        tensor = self._file.read(self._names[name])
        projection = re.search(r"self_attn\.([qk])_proj", name)
        if projection is not None:
            tensor = _unpermute(tensor, self._heads[projection[1]])
        yield box, cut(tensor, shape, box, skip)


def _rename(name: str) -> str:
    """The Hugging Face name; an unknown name stays as it is, and `fuse` refuses it."""
    for pattern, replacement in NAMES.items():
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    return name


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection, from rotating neighbours to rotating halves.

    GGUF orders each head's rows 0, D/2, 1, D/2 + 1, …; the decoder rotates row i with i + D/2.
    """
    rows, width = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, width)
    return pairs.swapaxes(1, 2).reshape(rows, width)


def _metadata(path: str | Path) -> JsonConfig:
    return JsonConfig(open_gguf(path).metadata, path, "a Llama model")


def _expect(raw: JsonConfig, key: str, value: str) -> None:
    if raw.get(key) != value:
        raise raw.refusal(key, f"{value!r}: use the model's safetensors checkpoint")
