"""From checkpoint tensors, named as Hugging Face names them, to the fused layout.

`destinations` is the table: for every array of `TargetParams` the tensors it is made of, where
each goes, and in which order of axes. Arrays are built one at a time, tensor by tensor.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxspec.config import TargetConfig
from jaxspec.models.params import (
    AttentionParams,
    LayerParams,
    MlpParams,
    MoeParams,
    TargetParams,
    abstract_params,
)

ALIGNMENT = 64  # bytes; JAX on the CPU adopts an aligned buffer instead of copying it
LARGE = 1_000_000_000  # bytes; loading more shows progress


class Tensors(Protocol):
    """A checkpoint's tensors by Hugging Face name: shapes up front, values on demand.

    Attributes:
      origin: the file or folder, for messages.
      shapes: of every tensor, as stored; a linear map is [out, in].
    """

    origin: str
    shapes: Mapping[str, tuple[int, ...]]

    def read(self, name: str) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Part:
    """One tensor's place in an array.

    Attributes:
      name: of the tensor.
      shape: that the tensor must have.
      index: where it goes in the array.
      axes: the axes of `array[index]` in the tensor's order; adjacent ones may be merged in
        the tensor, as [K * D] for [K, D].
    """

    name: str
    shape: tuple[int, ...]
    index: Any
    axes: tuple[int, ...]

    @property
    def size(self) -> int:
        """Values in the tensor."""
        return math.prod(self.shape)


def load(config: TargetConfig, tensors: Tensors, dtype) -> TargetParams:
    """Builds the weights of a target.

    Names and shapes are checked before a value is read, values while they stream. Host memory
    peaks at the result plus the largest tensor; of the result, an accelerator leaves one array
    on the host at a time.

    Raises:
      ValueError: a tensor is missing, is not part of the model, has another shape than
        `config` says, or holds a value that is not finite in `dtype`.
    """
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype is {dtype}; weights need float32, bfloat16 or float16")
    table = destinations(config, tensors.shapes)
    parts = jax.tree.leaves(table, is_leaf=lambda x: isinstance(x, Part))
    _check(config, tensors, parts)
    total = sum(part.size for part in parts) * dtype.itemsize
    with tqdm(
        total=total, desc="weights", unit="B", unit_scale=True, disable=total < LARGE
    ) as progress:

        def build(spec, parts):
            array = _aligned_empty(spec.shape, dtype)
            for part in parts:
                _place(tensors, part, array)
                progress.update(part.size * dtype.itemsize)
            return jax.block_until_ready(jax.device_put(array, may_alias=True))

        return jax.tree.map(build, abstract_params(config, dtype), table)


def destinations(config: TargetConfig, names: Mapping[str, Any]) -> TargetParams:
    """`TargetParams` with, in place of every array, the tuple of `Part`s that make it.

    Args:
      names: of the checkpoint's tensors; tells whether a mixture's experts are stored one
        tensor each, as published, or stacked, as transformers 5 holds them in memory.
    """
    c = config
    return TargetParams(
        embed=(_same("model.embed_tokens.weight", c.vocab_size, c.hidden_size),),
        layers=tuple(
            LayerParams(
                _attention(c, f"model.layers.{i}."),
                _moe(c, f"model.layers.{i}.", names)
                if i in c.sparse_layers
                else _mlp(c, f"model.layers.{i}."),
            )
            for i in range(c.num_layers)
        ),
        final_norm=(_same("model.norm.weight", c.hidden_size),),
        lm_head=(
            None
            if c.tie_embeddings
            else (_same("lm_head.weight", c.vocab_size, c.hidden_size),)
        ),
    )


def _attention(c: TargetConfig, layer: str) -> AttentionParams:
    group, width = c.group_size, c.hidden_size
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    a = f"{layer}self_attn."
    return AttentionParams(
        norm=(_same(f"{layer}input_layernorm.weight", width),),
        qkv=(  # [M, K, G + 2, D]
            Part(f"{a}q_proj.weight", (queries, width), np.s_[:, :, :group], (1, 2, 3, 0)),
            Part(f"{a}k_proj.weight", (keys, width), np.s_[:, :, group], (1, 2, 0)),
            Part(f"{a}v_proj.weight", (keys, width), np.s_[:, :, group + 1], (1, 2, 0)),
        ),
        qkv_bias=(  # [K, G + 2, D]
            (
                Part(f"{a}q_proj.bias", (queries,), np.s_[:, :group], (0, 1, 2)),
                Part(f"{a}k_proj.bias", (keys,), np.s_[:, group], (0, 1)),
                Part(f"{a}v_proj.bias", (keys,), np.s_[:, group + 1], (0, 1)),
            )
            if c.attention_bias
            else None
        ),
        q_norm=(_same(f"{a}q_norm.weight", c.head_dim),) if c.qk_norm else None,
        k_norm=(_same(f"{a}k_norm.weight", c.head_dim),) if c.qk_norm else None,
        # [K, G, D, M]
        out=(Part(f"{a}o_proj.weight", (width, queries), np.s_[...], (3, 0, 1, 2)),),
    )


def _mlp(c: TargetConfig, layer: str) -> MlpParams:
    up, down = (c.intermediate_size, c.hidden_size), (c.hidden_size, c.intermediate_size)
    return MlpParams(
        norm=(_same(f"{layer}post_attention_layernorm.weight", c.hidden_size),),
        gate_up=(  # [M, 2, F]
            Part(f"{layer}mlp.gate_proj.weight", up, np.s_[:, 0], (1, 0)),
            Part(f"{layer}mlp.up_proj.weight", up, np.s_[:, 1], (1, 0)),
        ),
        down=(Part(f"{layer}mlp.down_proj.weight", down, np.s_[...], (1, 0)),),
    )


def _moe(c: TargetConfig, layer: str, names: Mapping[str, Any]) -> MoeParams:
    experts, width, inner = c.num_experts, c.hidden_size, c.moe_intermediate_size
    e = f"{layer}mlp.experts."
    if f"{e}gate_up_proj" in names:
        stacked = (experts, 2 * inner, width)
        gate_up = (Part(f"{e}gate_up_proj", stacked, np.s_[...], (0, 2, 3, 1)),)
        down = (Part(f"{e}down_proj", (experts, width, inner), np.s_[...], (0, 2, 1)),)
    else:
        gate_up = tuple(  # [E, M, 2, F]
            Part(f"{e}{i}.{name}_proj.weight", (inner, width), np.s_[i, :, half], (1, 0))
            for i in range(experts)
            for half, name in enumerate(("gate", "up"))
        )
        down = tuple(  # [E, F, M]
            Part(f"{e}{i}.down_proj.weight", (width, inner), np.s_[i], (1, 0))
            for i in range(experts)
        )
    return MoeParams(
        norm=(_same(f"{layer}post_attention_layernorm.weight", width),),
        router=(Part(f"{layer}mlp.gate.weight", (experts, width), np.s_[...], (1, 0)),),
        gate_up=gate_up,
        down=down,
    )


def _same(name: str, *shape: int) -> Part:
    """A tensor that is the array."""
    return Part(name, shape, np.s_[...], tuple(range(len(shape))))


def _check(config: TargetConfig, tensors: Tensors, parts: list[Part]) -> None:
    expected = {part.name: part.shape for part in parts}
    missing = [name for name in expected if name not in tensors.shapes]
    if missing:
        raise ValueError(
            f"{tensors.origin} has no tensor '{missing[0]}'{_more(missing)}; its configuration "
            f"asks for {len(expected)} tensors: the checkpoint is incomplete, or its "
            "configuration is another model's"
        )
    for name, shape in expected.items():
        if tensors.shapes[name] != shape:
            raise ValueError(
                f"{tensors.origin}: tensor '{name}' has shape {tensors.shapes[name]}; its "
                f"configuration says {shape}"
            )
    unknown = [name for name in tensors.shapes if name not in expected]
    unknown = [name for name in unknown if not _redundant(config, name)]
    if unknown:
        raise ValueError(
            f"{tensors.origin}: tensor '{unknown[0]}'{_more(unknown)} has no place in the "
            "model its configuration describes; leaving it out would change the output"
        )


def _redundant(config: TargetConfig, name: str) -> bool:
    """Tensors that repeat what is known: a tied head, precomputed rotary frequencies."""
    tied = config.tie_embeddings and name == "lm_head.weight"
    return tied or name.endswith("rotary_emb.inv_freq")


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _place(tensors: Tensors, part: Part, array: np.ndarray) -> None:
    view = array[part.index].transpose(part.axes)
    with np.errstate(over="ignore"):  # found below, with the tensor's name
        view[...] = tensors.read(part.name).reshape(view.shape)
    if not np.isfinite(view).all():
        raise ValueError(
            f"{tensors.origin}: tensor '{part.name}' holds NaN or infinity as {array.dtype}; "
            "the checkpoint is damaged, or its values need a wider dtype"
        )


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)
