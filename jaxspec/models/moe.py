"""Mixture of experts as Qwen3-MoE routes it, with one grouped matrix product per projection."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxspec.config import TargetConfig
from jaxspec.models.layers import project, swiglu
from jaxspec.models.params import MoeParams
from pallas_kernels.grouped_matmul import grouped_matmul


def mixture_of_experts(params: MoeParams, config: TargetConfig, x: jax.Array) -> jax.Array:
    """Softmax over all experts, then the top k of them; x is [T, M], normed.

    The T·k (token, expert) pairs are sorted by expert, so that each expert's rows are
    contiguous and `ragged_dot` multiplies every group by its own matrix.
    """
    k = config.experts_per_token
    probability = jax.nn.softmax(project("tm,me->te", x, params.router), axis=-1)
    weight, expert = jax.lax.top_k(probability, k)  # [T, k]
    if config.norm_topk_prob:
        weight = weight / weight.sum(axis=-1, keepdims=True)

    order = jnp.argsort(expert.reshape(-1), stable=True)  # pairs by expert: [T * k]
    group_sizes = jnp.bincount(expert.reshape(-1), length=config.num_experts)
    hidden = _grouped(x[order // k], params.gate_up, group_sizes)
    hidden = swiglu(hidden.reshape(-1, 2, params.down.shape[1]))
    out = _grouped(hidden, params.down, group_sizes)[jnp.argsort(order)]  # back to token order
    return jnp.einsum("tkm,tk->tm", out.reshape(*expert.shape, -1), weight)


def _grouped(rows: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Rows sorted by group times each group's matrix: [R, M], [E, M, ...] -> [R, prod(...)]."""
    matrices = weights.reshape(*weights.shape[:2], -1)
    return grouped_matmul(rows.astype(weights.dtype), matrices, group_sizes)
