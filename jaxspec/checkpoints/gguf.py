"""GGUF checkpoints of Llama-shaped models: configuration, weights, tokenizer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxspec.checkpoints import fuse
from jaxspec.checkpoints.gguf_file import GgufFile
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


def read_config(path: str | Path) -> TargetConfig:
    """The model that the metadata describes.

    Raises:
      ValueError: the file is damaged, or describes a model this decoder does not implement.
    """
    file = GgufFile(path)
    _expect(file, "general.architecture", "llama")
    for key in ("llama.rope.scaling.type", "llama.expert_count"):
        if file.metadata.get(key) not in (None, "none", 0):
            raise ValueError(f"{path}: '{key}' is {file.metadata[key]!r}; expected none")
    heads = _get(file, "llama.attention.head_count", int)
    hidden = _get(file, "llama.embedding_length", int)
    eos = _get(file, "tokenizer.ggml.eos_token_id", int, -1)
    return TargetConfig(
        vocab_size=_get(file, "llama.vocab_size", int),
        hidden_size=hidden,
        intermediate_size=_get(file, "llama.feed_forward_length", int),
        num_layers=_get(file, "llama.block_count", int),
        num_heads=heads,
        num_kv_heads=_get(file, "llama.attention.head_count_kv", int, heads),
        head_dim=_get(file, "llama.rope.dimension_count", int, hidden // max(1, heads)),
        rope_theta=_get(file, "llama.rope.freq_base", float, 10_000.0),
        rms_norm_eps=_get(file, "llama.attention.layer_norm_rms_epsilon", float),
        max_positions=_get(file, "llama.context_length", int),
        tie_embeddings="output.weight" not in file.shapes,
        qk_norm=False,
        eos_token_ids=() if eos < 0 else (eos,),
    )


def load_params(
    path: str | Path, config: TargetConfig, dtype=jnp.float32, mesh: Mesh | None = None
) -> TargetParams:
    """The weights, dequantised one tensor at a time, in the fused layout; see `fuse.load`."""
    return fuse.load(config, _LlamaTensors(GgufFile(path), config), dtype, mesh)


def load_tokenizer(path: str | Path) -> Tokenizer | None:
    """The tokenizer in the metadata, None if it has none: byte-level BPE as SmolLM2's.

    Raises:
      ValueError: it is of another kind.
    """
    file = GgufFile(path)
    if "tokenizer.ggml.model" not in file.metadata:
        return None
    _expect(file, "tokenizer.ggml.model", "gpt2")
    _expect(file, "tokenizer.ggml.pre", "smollm")
    types = _get(file, "tokenizer.ggml.token_type", list)
    tokens = _get(file, "tokenizer.ggml.tokens", list)
    merges = _get(file, "tokenizer.ggml.merges", list)
    eos = _get(file, "tokenizer.ggml.eos_token_id", int)
    try:
        return Tokenizer.from_bpe(
            tokens,
            merges,
            special=[i for i, kind in enumerate(types) if kind == SPECIAL],
            eos=eos,
            chat_template=file.metadata.get("tokenizer.chat_template"),
        )
    except Exception as error:  # of many kinds: ids past the end, merges of unknown tokens
        raise ValueError(
            f"the tokenizer in {path} cannot be made ({error}); download it again"
        ) from error


class _LlamaTensors:
    """The file's tensors as Hugging Face names and orders them."""

    def __init__(self, file: GgufFile, config: TargetConfig):
        self.origin = str(file.path)
        self._file = file
        self._heads = {"q": config.num_heads, "k": config.num_kv_heads}
        self._names = {_rename(name): name for name in file.shapes}
        self.shapes = {name: file.shapes[source] for name, source in self._names.items()}

    def pieces(self, name: str, shape: tuple[int, ...], box: fuse.Box):
        """The whole box at once: quantised blocks are not cut."""
        tensor = self._file.read(self._names[name])
        projection = re.search(r"self_attn\.([qk])_proj", name)
        if projection is not None:
            tensor = _unpermute(tensor, self._heads[projection[1]])
        yield box, tensor.reshape(shape)[tuple(slice(*ends) for ends in box)]


def _rename(name: str) -> str:
    """A name without a counterpart stays, for `fuse` to refuse."""
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


def _get(file: GgufFile, key: str, kind: type, default: Any = None) -> Any:
    value = file.metadata.get(key, default)
    if value is None:
        raise ValueError(f"{file.path} has no '{key}' in its metadata; expected a Llama model")
    if type(value) is not kind:
        raise ValueError(f"{file.path}: '{key}' is {value!r}; expected {kind.__name__}")
    return value


def _expect(file: GgufFile, key: str, value: str) -> None:
    found = _get(file, key, str)
    if found != value:
        raise ValueError(
            f"{file.path}: '{key}' is {found!r}, which is not supported; expected {value!r}: "
            "use the model's safetensors checkpoint"
        )
