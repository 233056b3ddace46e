"""A target's weights from tensors, named as Hugging Face names them.

`target_parts` is the table: which tensors make up each array of `TargetParams`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxspec.checkpoints.fuse import (
    Part,
    Tensors,
    build,
    check_dtype,
    check_tensors,
    expected_shapes,
    linear,
    same,
    slices,
    swiglu,
)
from jaxspec.checkpoints.tensors import whole
from jaxspec.config import TargetConfig
from jaxspec.models.params import (
    AttentionParams,
    DeltaNetParams,
    LayerParams,
    MlpParams,
    MoeParams,
    SharedExpertParams,
    TargetParams,
    abstract_params,
)
from jaxspec.sharding import WIDE

EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"


def load(
    config: TargetConfig,
    tensors: Tensors,
    dtype,
    mesh: Mesh | None = None,
    *,
    keep: Callable | None = None,
) -> TargetParams:
    """Builds the weights of a target.

    Names and shapes are checked before values are read, and values while they stream. Host
    memory peaks at the result plus the largest piece of `tensors`; with an accelerator the host
    holds one array at a time.

    Args:
      mesh: see `fuse.build`.
      keep: maps shapes, parts, tensors and the number of devices that shard channels to those
        that hold some weights in 8 bits (`eight_bit.keep`).

    Raises:
      ValueError: a tensor is missing, is not part of the model, has another shape than
        `config` says, or holds a value that is not finite in `dtype`.
    """
    dtype = check_dtype(dtype)
    if config.num_layers > len(tensors.shapes):  # a damaged file's number may be huge
        raise ValueError(
            f"{tensors.origin} holds {len(tensors.shapes)} tensors, but its configuration asks "
            f"for {config.num_layers} layers: the checkpoint is incomplete or damaged"
        )
    table = target_parts(config, tensors.shapes)
    expected = expected_shapes(table)
    check_tensors(tensors, expected, optional=(LM_HEAD,) if config.tie_embeddings else ())
    if config.tie_embeddings and LM_HEAD in tensors.shapes:
        _check_tied(tensors)
    specs = abstract_params(config, dtype)
    if keep is not None:
        devices = 1 if mesh is None else math.prod(mesh.shape.get(name, 1) for name in WIDE)
        specs, table, tensors = keep(specs, table, tensors, devices)
    return build(tensors, table, specs, mesh)


def target_parts(config: TargetConfig, names: Mapping[str, Any]) -> TargetParams:
    """`TargetParams` with the tuple of `Part`s of every array in its place.

    Args:
      names: names of the checkpoint's tensors, which tell whether experts are stored as one
        tensor each, as published, or stacked, as in transformers 5.
    """
    c = config
    return TargetParams(
        embed=same(EMBEDDING, c.vocab_size, c.hidden_size),
        layers=tuple(
            layer_parts(c, i, f"model.layers.{i}.", names) for i in range(c.num_layers)
        ),
        final_norm=norm_parts(c, "model.norm.weight", c.hidden_size),
        lm_head=None if c.tie_embeddings else same(LM_HEAD, c.vocab_size, c.hidden_size),
    )


def layer_parts(c: TargetConfig, i: int, prefix: str, names: Mapping[str, Any]) -> LayerParams:
    """The parts of layer i, whose tensors' names begin with the prefix; see `target_parts`."""
    return LayerParams(
        _delta_net(c, prefix) if i in c.delta_layers else _attention(c, prefix),
        _moe(c, prefix, names) if i in c.sparse_layers else _mlp(c, prefix),
    )


def _attention(c: TargetConfig, layer: str) -> AttentionParams:
    width, heads = c.hidden_size, c.num_heads * c.head_dim
    keys = c.num_kv_heads * c.head_dim
    # With gates, a head's gate follows its query in the tensor.
    group = 2 * c.group_size if c.attention_gate else c.group_size
    queries = c.num_kv_heads * group * c.head_dim
    a = f"{layer}self_attn."
    return AttentionParams(
        norm=norm_parts(c, f"{layer}input_layernorm.weight", width),
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
        q_norm=norm_parts(c, f"{a}q_norm.weight", c.head_dim) if c.qk_norm else None,
        k_norm=norm_parts(c, f"{a}k_norm.weight", c.head_dim) if c.qk_norm else None,
        # [K, G, D, M]
        out=(Part(f"{a}o_proj.weight", (width, heads), np.s_[...], (3, 0, 1, 2)),),
    )


def _delta_net(c: TargetConfig, layer: str) -> DeltaNetParams:
    d, a, width = c.delta_net, f"{layer}linear_attn.", c.hidden_size
    keys, values = d.key_heads * d.key_dim, d.value_heads * d.value_dim
    heads, channels = d.value_heads, 2 * keys + values
    # Offsets of keys, values and output gates within one key head's rows.
    k, v, gate = d.key_dim, 2 * d.key_dim, d.channels
    rate = gate + d.group_size * d.value_dim
    step = rate + d.group_size
    if d.interleaved:  # by key head, as here
        inputs = (
            Part(
                f"{a}in_proj_qkvz.weight",
                (channels + values, width),
                np.s_[:, :, :rate],
                (1, 2, 0),
            ),
            Part(f"{a}in_proj_ba.weight", (2 * heads, width), np.s_[:, :, rate:], (1, 2, 0)),
        )
    else:
        qkv = f"{a}in_proj_qkv.weight", (channels, width)
        inputs = (  # [M, J, C + R dv + 2 R]
            Part(*qkv, np.s_[:, :, :k], (1, 2, 0), rows=(0, keys)),
            Part(*qkv, np.s_[:, :, k:v], (1, 2, 0), rows=(keys, 2 * keys)),
            Part(*qkv, np.s_[:, :, v:gate], (1, 2, 0), rows=(2 * keys, channels)),
            Part(f"{a}in_proj_z.weight", (values, width), np.s_[:, :, gate:rate], (1, 2, 0)),
            Part(f"{a}in_proj_b.weight", (heads, width), np.s_[:, :, rate:step], (1, 2, 0)),
            Part(f"{a}in_proj_a.weight", (heads, width), np.s_[:, :, step:], (1, 2, 0)),
        )
    taps = f"{a}conv1d.weight", (channels, 1, d.taps)
    return DeltaNetParams(
        norm=norm_parts(c, f"{layer}input_layernorm.weight", width),
        inputs=inputs,
        convolution=(  # [J, C, taps]
            Part(*taps, np.s_[:, :k], (0, 1, 2), rows=(0, keys)),
            Part(*taps, np.s_[:, k:v], (0, 1, 2), rows=(keys, 2 * keys)),
            Part(*taps, np.s_[:, v:], (0, 1, 2), rows=(2 * keys, channels)),
        ),
        log_rate=(Part(f"{a}A_log", (heads,), np.s_[...], (0, 1)),),
        step_bias=(Part(f"{a}dt_bias", (heads,), np.s_[...], (0, 1)),),
        head_norm=same(f"{a}norm.weight", d.value_dim),
        # [J, R, dv, M]
        output=(Part(f"{a}out_proj.weight", (width, values), np.s_[...], (3, 0, 1, 2)),),
    )


def _mlp(c: TargetConfig, layer: str) -> MlpParams:
    return MlpParams(
        norm=norm_parts(c, f"{layer}post_attention_layernorm.weight", c.hidden_size),
        **swiglu(f"{layer}mlp.", c.hidden_size, c.intermediate_size),
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
    shared = None
    if c.shared_expert_size:
        gate = Part(f"{layer}mlp.shared_expert_gate.weight", (1, width), np.s_[...], (0,))
        parts = swiglu(f"{layer}mlp.shared_expert.", width, c.shared_expert_size)
        shared = SharedExpertParams(gate=(gate,), **parts)
    return MoeParams(
        norm=norm_parts(c, f"{layer}post_attention_layernorm.weight", width),
        router=linear(f"{layer}mlp.gate.weight", experts, width),
        gate_up=gate_up,
        down=down,
        shared=shared,
    )


def norm_parts(c: TargetConfig, name: str, size: int) -> tuple[Part]:
    """A norm's weights, which some models store minus one."""
    return (Part(name, (size,), np.s_[...], (0,), offset=float(c.zero_centered_norms)),)


def _check_tied(tensors: Tensors) -> None:
    """Raises ValueError unless a stored LM head equals the embedding.

    They are compared in the narrower dtype, as either may have been rounded.
    """
    shape, shapes = tensors.shapes[EMBEDDING], tensors.shapes
    equal = shapes[LM_HEAD] == shape
    for box, head in tensors.pieces(LM_HEAD, shape, whole(shape)) if equal else ():
        for inner, rows in tensors.pieces(EMBEDDING, shape, box):
            narrow = min(head.dtype, rows.dtype, key=lambda dtype: dtype.itemsize)
            own = head[slices(inner, box)].astype(narrow)
            equal &= own.tobytes() == rows.astype(narrow).tobytes()
    if not equal:
        raise ValueError(
            f"{tensors.origin}: its configuration ties the LM head to the embedding "
            f"('tie_word_embeddings' is true), but tensor '{LM_HEAD}' differs from "
            f"'{EMBEDDING}'; set the key to false if the head was trained separately, or "
            "remove the tensor"
        )
