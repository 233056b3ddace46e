"""The target's forward. Every forward is a tree: plain decoding is a tree of one node, a
prompt chunk is a chain."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxspec.config import TargetConfig
from jaxspec.models.cache import KVCache, KVRows
from jaxspec.models.layers import lookup, project, rms_norm, rotary_angles, rotate, swiglu
from jaxspec.models.moe import mixture_of_experts
from jaxspec.models.params import AttentionParams, MlpParams, MoeParams, TargetParams
from jaxspec.trees.packing import Packing
from pallas_kernels.tree_attention import tree_attention


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ForwardOutput:
    """What the target computed for N nodes.

    Attributes:
      hidden: [B, N, M] float32, after the final norm; `unembed` turns it into logits.
      taps: [B, N, len(taps) * M] float32, outputs of the tapped layers side by side.
      rows: keys and values of the nodes, for `KVCache.write`.
      experts: [B * N, k], those that the nodes chose in every layer that mixes some, for
        `moe.expert_load`.
    """

    hidden: jax.Array
    taps: jax.Array
    rows: KVRows
    experts: tuple[jax.Array, ...]


def forward(
    params: TargetParams,
    config: TargetConfig,
    tokens: jax.Array,
    depths: jax.Array,
    ancestors: jax.Array,
    cache: KVCache,
    lengths: jax.Array,
    *,
    taps: tuple[int, ...] = (),
    packing: Packing | None = None,
    implementation: str | None = None,
) -> ForwardOutput:
    """Runs the target on N nodes that see the committed prefix and their ancestors.

    The cache is only read; `ForwardOutput.rows` holds what to write once nodes are accepted.

    Args:
      tokens: [B, N] int32.
      depths: [B, N] int32; a node stands at position `lengths + depths`.
      ancestors: uint32 bits [B, N, ceil(N / 32)], ancestor-or-self (`trees.ancestors`).
      cache: keys and values of the prefix.
      lengths: [B] int32, rows of the cache that are committed.
      taps: layers whose outputs to return, 0-based; -1 is the embedding, and the last layer
        is tapped after the final norm (as Hugging Face's `hidden_states[-1]`).
      packing: runs on the nodes it packs alone: `hidden` and `taps` come packed, [1, T, .], and
        rows of other nodes are meaningless.
      implementation: of tree attention, see `pallas_kernels.tree_attention`.
    """
    check_taps(taps, config)
    positions = lengths[:, None] + depths
    if packing is not None:
        tokens, positions = packing.gather(tokens), packing.gather(positions)
    angles = rotary_angles(positions, config.head_dim, config.rope_theta)
    x = lookup(params.embed, tokens)  # [B, N, M]
    outputs, keys, values, experts = {-1: x}, [], [], []
    for i, layer in enumerate(params.layers):
        q, k, v = _qkv(layer.attention, config, x, angles)
        # Rounded here and kept: XLA would rather keep every layer's whole projection until the
        # rows are committed, and take them from it then.
        k, v = jax.lax.optimization_barrier(
            (k.astype(cache.keys[i].dtype), v.astype(cache.values[i].dtype))
        )
        if packing is not None:
            q, k, v = (packing.spread(x) for x in (q, k, v))
        attended = tree_attention(
            q,
            cache.keys[i],
            cache.values[i],
            lengths,
            k,
            v,
            ancestors,
            scale=config.head_dim**-0.5,
            implementation=implementation,
        )
        if packing is not None:
            attended = packing.gather(attended)
        x = x + _project_out(layer.attention, attended)
        out, chosen = _mlp(layer.mlp, config, x)
        x = x + out
        outputs[i] = x
        experts += chosen
        keys.append(k)
        values.append(v)
    hidden = rms_norm(x, params.final_norm, config.rms_norm_eps)
    outputs[config.num_layers - 1] = hidden
    tapped = [outputs[i] for i in taps]
    return ForwardOutput(
        hidden=hidden,
        taps=jnp.concatenate(tapped, axis=-1) if tapped else x[..., :0],
        rows=KVRows(tuple(keys), tuple(values)),
        experts=tuple(experts),
    )


def unembed(params: TargetParams, hidden: jax.Array) -> jax.Array:
    """Logits float32 [..., V] of hidden states [..., M] that passed the final norm."""
    return project("...m,vm->...v", hidden, params.unembed)


def check_taps(taps: tuple[int, ...], config: TargetConfig) -> None:
    """Raises ValueError when a tap is not a layer of the target."""
    bad = [tap for tap in taps if not -1 <= tap < config.num_layers]
    if bad:
        raise ValueError(
            f"taps {bad} are out of range: the target has layers 0 … {config.num_layers - 1} "
            "(-1 is the embedding); was the drafter trained for another target?"
        )


def _qkv(params: AttentionParams, config: TargetConfig, x: jax.Array, angles):
    """Rotated queries [B, N, H, D], rotated keys and values [B, N, K, D]."""
    normed = rms_norm(x, params.norm, config.rms_norm_eps)
    qkv = project("bnm,mkgd->bnkgd", normed, params.qkv)
    if params.qkv_bias is not None:
        qkv = qkv + params.qkv_bias
    q, k, v = qkv[..., :-2, :], qkv[..., -2, :], qkv[..., -1, :]
    q = q.reshape(*x.shape[:2], config.num_heads, config.head_dim)
    if params.q_norm is not None:
        q = rms_norm(q, params.q_norm, config.rms_norm_eps)
        k = rms_norm(k, params.k_norm, config.rms_norm_eps)
    return rotate(q, *angles), rotate(k, *angles), v


def _project_out(params: AttentionParams, attended: jax.Array) -> jax.Array:
    """[B, N, H, D] -> [B, N, M]. One contracted axis: with three, XLA transposes the weight."""
    batch, n = attended.shape[:2]
    weight = params.out.reshape(-1, params.out.shape[-1])
    return project("bnh,hm->bnm", attended.reshape(batch, n, -1), weight)


def _mlp(
    params: MlpParams | MoeParams, config: TargetConfig, x: jax.Array
) -> tuple[jax.Array, list[jax.Array]]:
    """What it adds to x, and the experts that were chosen, if it mixes some."""
    normed = rms_norm(x, params.norm, config.rms_norm_eps)
    if isinstance(params, MoeParams):
        flat = normed.reshape(-1, config.hidden_size)
        out, expert = mixture_of_experts(params, config, flat)
        return out.reshape(x.shape), [expert]
    hidden = swiglu(project("bnm,mcf->bncf", normed, params.gate_up))
    return project("bnf,fm->bnm", hidden, params.down), []
