"""GGUF checkpoints of Qwen and Llama-shaped models: configuration, weights, tokenizer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxspec.checkpoints import target_weights
from jaxspec.checkpoints.gguf_file import GgufFile, open_gguf
from jaxspec.checkpoints.json_config import MOST, JsonConfig
from jaxspec.checkpoints.tensors import Box, cut
from jaxspec.config import RopeScaling, TargetConfig
from jaxspec.models.params import TargetParams
from jaxspec.tokenizer import PRE_TOKENIZERS, Tokenizer

ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen3moe")
# GGUF name (regular expression) -> Hugging Face name
NAMES = {
    r"token_embd\.weight": r"model.embed_tokens.weight",
    r"output_norm\.weight": r"model.norm.weight",
    r"output\.weight": r"lm_head.weight",
    r"blk\.(\d+)\.attn_norm\.weight": r"model.layers.\1.input_layernorm.weight",
    r"blk\.(\d+)\.attn_([qkv])\.(weight|bias)": r"model.layers.\1.self_attn.\2_proj.\3",
    r"blk\.(\d+)\.attn_([qk])_norm\.weight": r"model.layers.\1.self_attn.\2_norm.weight",
    r"blk\.(\d+)\.attn_output\.weight": r"model.layers.\1.self_attn.o_proj.weight",
    r"blk\.(\d+)\.ffn_norm\.weight": r"model.layers.\1.post_attention_layernorm.weight",
    r"blk\.(\d+)\.ffn_(gate|up|down)\.weight": r"model.layers.\1.mlp.\2_proj.weight",
    r"blk\.(\d+)\.ffn_gate_inp\.weight": r"model.layers.\1.mlp.gate.weight",
}
# Experts are stacked, and have a name each here.
STACKED = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)_exps\.weight")
SPECIAL, ADDED, UNUSED = 3, 4, 5  # tokenizer.ggml.token_type: control, user-defined, unused
# Ids that end a generation: of a text, of a turn, of a message.
ENDS = tuple(f"tokenizer.ggml.{end}_token_id" for end in ("eos", "eot", "eom"))
QWEN_ENDS = ("<|im_end|>", "<|endoftext|>")  # both end Qwen's; the metadata names one
# As in `known_keys`, without the architecture's prefix.
HARMLESS = (
    "tensor_data_layout",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
)
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (),
    "attention.sliding_window": (0,),
    "embedding_scale": (1,),
    "expert_count": (0,),
    "expert_gating_func": (1,),  # softmax
    "expert_used_count": (0,),
    "expert_weights_norm": (True,),
    "expert_weights_scale": (1,),
    "logit_scale": (1,),
    "residual_scale": (1,),
    "rope.scale_linear": (1,),
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.factor": (1,),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_ext_factor": (1,),
    "use_parallel_residual": (False,),
}


def read_config(path: str | Path) -> TargetConfig:
    """The model that the metadata describes.

    Warns of keys that are not known (`JsonConfig.finish`).

    Raises:
      ValueError: the file is damaged, one of several parts, or describes a model this decoder
        does not implement.
    """
    file, whole = open_gguf(path), _metadata(path)
    arch = _expect(whole, "general.architecture", *ARCHITECTURES)
    if whole.integer("split.count", 1, least=0) > 1:
        raise whole.refusal("split.count", "1: join its parts by `llama-gguf-split --merge`")
    at = f"{arch}.{{}}".format
    own = {k: x for k, x in whole.values.items() if k.startswith(at(""))}
    raw = JsonConfig(own, path, whole.owner)
    heads = raw.integer(at("attention.head_count"))
    hidden = raw.integer(at("embedding_length"))
    rotated = raw.integer(at("rope.dimension_count"), None)
    head_dim = raw.integer(at("attention.key_length"), rotated or hidden // heads)
    layers = raw.count(at("block_count"))
    config = raw.make(
        TargetConfig,
        vocab_size=raw.integer(at("vocab_size"), file.shapes.get("token_embd.weight", (0,))[0]),
        hidden_size=hidden,
        intermediate_size=raw.integer(at("feed_forward_length")),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=raw.integer(at("attention.head_count_kv"), heads),
        head_dim=head_dim,
        rope_theta=raw.number(at("rope.freq_base"), 10_000.0),
        rope_scaling=_rope_scaling(raw, at),
        rms_norm_eps=raw.number(at("attention.layer_norm_rms_epsilon")),
        max_positions=raw.integer(at("context_length")),
        tie_embeddings="output.weight" not in file.shapes,
        qk_norm=arch.startswith("qwen3"),
        attention_bias=arch == "qwen2",
        eos_token_ids=_ends(whole, arch),
        **(_mixture(raw, at, layers) if arch == "qwen3moe" else {}),
    )
    for key in ("rope.dimension_count", "attention.value_length"):
        raw.one_of(at(key), (head_dim,), head_dim)
    raw.finish(set(map(at, HARMLESS)), {at(key): x for key, x in NEUTRAL.items()})
    return config


def _rope_scaling(raw: JsonConfig, at: Callable[[str], str]) -> RopeScaling | None:
    kind = raw.one_of(at("rope.scaling.type"), ("none", "linear", "yarn"), "none")
    if kind == "none":
        return None
    fields: dict[str, Any] = {"factor": raw.number(at("rope.scaling.factor"))}
    if kind == "yarn":
        fields |= dict(
            original_positions=raw.integer(at("rope.scaling.original_context_length")),
            beta_fast=raw.number(at("rope.scaling.yarn_beta_fast"), RopeScaling.beta_fast),
            beta_slow=raw.number(at("rope.scaling.yarn_beta_slow"), RopeScaling.beta_slow),
        )
    return raw.make(RopeScaling, kind=kind, **fields)


def _ends(whole: JsonConfig, arch: str) -> tuple[int, ...]:
    """Ids that end a generation; of a Qwen also those that its published configuration has."""
    ends = [whole.integer(key, least=0) for key in ENDS if whole.has(key)]
    if arch.startswith("qwen") and whole.has("tokenizer.ggml.tokens"):
        tokens = whole.items("tokenizer.ggml.tokens", str)
        ends += [tokens.index(text) for text in QWEN_ENDS if text in tokens]
    return tuple(dict.fromkeys(ends))


def _mixture(raw: JsonConfig, at: Callable[[str], str], layers: int) -> dict[str, Any]:
    """Fields of `TargetConfig` for a mixture of experts."""
    return dict(
        num_experts=raw.count(at("expert_count")),
        experts_per_token=raw.integer(at("expert_used_count")),
        moe_intermediate_size=raw.integer(at("expert_feed_forward_length")),
        norm_topk_prob=True,
        sparse_layers=tuple(range(layers)),
    )


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
    file, whole = open_gguf(path), _metadata(path)
    neighbours = whole.get("general.architecture") == "llama"
    heads = {"q": config.num_heads, "k": config.num_kv_heads} if neighbours else {}
    return target_weights.load(config, _GgufTensors(file, heads), dtype, mesh)


def load_tokenizer(path: str | Path) -> Tokenizer | None:
    """The tokenizer in the metadata, byte-level BPE as Qwen's or SmolLM2's; None if there is
    none.

    Raises:
      ValueError: the tokenizer is of another kind.
    """
    raw = _metadata(path)
    if not raw.has("tokenizer.ggml.model"):
        return None
    _expect(raw, "tokenizer.ggml.model", "gpt2")
    pre = _expect(raw, "tokenizer.ggml.pre", *PRE_TOKENIZERS)
    for key in ("add_bos_token", "add_eos_token", "add_space_prefix"):
        raw.one_of(f"tokenizer.ggml.{key}", (False,), False)
    types = raw.items("tokenizer.ggml.token_type", int)
    tokens, merges = (raw.items(f"tokenizer.ggml.{x}", str) for x in ("tokens", "merges"))
    eos = raw.integer("tokenizer.ggml.eos_token_id", least=0)
    try:
        return Tokenizer.from_bpe(
            [None if x == UNUSED else token for token, x in zip(tokens, types, strict=True)],
            merges,
            pre=pre,
            special=[i for i, kind in enumerate(types) if kind == SPECIAL],
            added=[i for i, kind in enumerate(types) if kind == ADDED],
            eos=eos,
            chat_template=raw.get("tokenizer.chat_template", None),
        )
    except Exception as error:  # of many kinds: ids past the end, merges of unknown tokens
        raise ValueError(
            f"the tokenizer in {path} is damaged ({error}); download it again"
        ) from error


class _GgufTensors:
    """The file's tensors under Hugging Face names and in its row order.

    Args:
      heads: of the query and key projections, "q" and "k", whose rows rotate neighbours.
    """

    def __init__(self, file: GgufFile, heads: Mapping[str, int]):
        self.origin = str(file.path)
        self._file, self._heads = file, heads
        self._sources: dict[str, tuple[str, int | None]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for source, shape in file.shapes.items():
            stacked = STACKED.fullmatch(source)
            if stacked is None:
                name = _rename(source)
                self._sources[name], self.shapes[name] = (source, None), shape
                continue
            for expert in range(min(shape[0], MOST)):
                name = (
                    f"model.layers.{stacked[1]}.mlp.experts.{expert}.{stacked[2]}_proj.weight"
                )
                self._sources[name], self.shapes[name] = (source, expert), shape[1:]

    def pieces(self, name: str, shape: tuple[int, ...], box: Box, skip: int = 0):
        """The whole box at once: quantised blocks are not cut."""
        tensor = self._file.read(*self._sources[name])
        projection = re.search(r"self_attn\.([qk])_proj\.weight", name)
        if projection is not None and self._heads:
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
    return JsonConfig(open_gguf(path).metadata, path, "a target")


def _expect(raw: JsonConfig, key: str, *values: str) -> str:
    """The value of a key; raises ValueError for one of no kind that is read here."""
    if raw.get(key) not in values:
        known = " or ".join(map(repr, values))
        raise raw.refusal(key, f"{known}: use the model's safetensors checkpoint")
    return raw.get(key)
