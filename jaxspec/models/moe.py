"""Mixture of experts as Qwen3-MoE routes it, with one grouped matrix product per projection."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxspec.config import TargetConfig
from jaxspec.models.layers import project, project_swiglu, swiglu
from jaxspec.models.params import Matrix, MoeParams, SharedExpertParams
from jaxspec.models.scaled import is_scaled
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.grouped_scaled_matmul import grouped_scaled_matmul
from pallas_kernels.mesh import batch_axis, cut_axes, devices_along


def mixture_of_experts(
    params: MoeParams, config: TargetConfig, x: Float[Array, "T M"]
) -> Float[Array, "T M"]:
    """The top k experts of every token, weighed by the router: normed [T, M] -> [T, M].

    A shared expert, if there is one, is added, times a gate.

    Under a mesh with axes "model" or "rest" (`jax.set_mesh`) experts are sharded over both.
    Every device runs all tokens through its own experts; one sum over the devices joins the
    results, and no expert's weights move. An axis "data" shards tokens, if it divides them.

    Raises:
      ValueError: the mesh does not divide the experts evenly.
    """
    routed = _routed(params, config, x)
    return routed if params.shared is None else routed + _shared(params.shared, x)


def _shared(params: SharedExpertParams, x: jax.Array) -> jax.Array:
    gate = jax.nn.sigmoid(project("tm,mg->tg", x, params.gate[:, None]))
    hidden = project_swiglu(x, params.gate_up)
    return gate * project("tf,fm->tm", hidden, params.down)


def _routed(params: MoeParams, config: TargetConfig, x: jax.Array) -> jax.Array:
    weight, expert = route(params, config, x)
    axes, rows = cut_axes(), batch_axis(len(x))
    if rows is None and not axes:
        return _weigh(_apply(x, params.gate_up, params.down, expert), weight)
    experts, devices = params.down.shape[0], math.prod(map(devices_along, axes))
    if experts % devices:
        raise ValueError(
            f"{experts} experts cannot be sharded over {devices} devices; give the mesh's axes "
            f"{axes} sizes whose product divides their number"
        )

    def of_this_device(x, gate_up, down, expert, weight):
        own = expert - jax.lax.axis_index(axes) * gate_up.shape[0]
        here = (own >= 0) & (own < gate_up.shape[0])
        out = _apply(x, gate_up, down, jnp.where(here, own, gate_up.shape[0]))
        return jax.lax.psum(_weigh(jnp.where(here[..., None], out, 0), weight), axes)

    tokens, cut = PartitionSpec(rows), PartitionSpec(axes)
    return jax.shard_map(
        of_this_device,
        in_specs=(tokens, cut, cut, tokens, tokens),
        out_specs=tokens,
        check_vma=False,
    )(x, params.gate_up, params.down, expert, weight)


def route(
    params: MoeParams, config: TargetConfig, x: Float[Array, "T M"]
) -> tuple[Float[Array, "T k"], Int[Array, "T k"]]:
    """Softmax over all experts, then the top k: weights and experts, both [T, k]."""
    probability = jax.nn.softmax(project("tm,me->te", x, params.router), axis=-1)
    weight, expert = jax.lax.top_k(probability, config.experts_per_token)
    if config.norm_topk_prob:
        weight = weight / weight.sum(axis=-1, keepdims=True)
    return weight, expert


def _apply(x: jax.Array, gate_up: Matrix, down: Matrix, expert: jax.Array) -> jax.Array:
    """Outputs of each token's experts: [T, M], experts [T, k] -> [T, k, M].

    The T·k (token, expert) pairs are sorted by expert, so that each expert's rows are
    contiguous and a grouped product multiplies each group by its own matrix. Pairs whose
    expert is E, one past the last, come after all groups and out of it undefined.
    """
    experts, k = down.shape[0], expert.shape[1]
    order = jnp.argsort(expert.reshape(-1), stable=True)  # pairs by expert: [T * k]
    group_sizes = jnp.bincount(expert.reshape(-1), length=experts + 1)[:experts]
    hidden = _grouped(x[order // k], gate_up, group_sizes)
    hidden = swiglu(hidden.reshape(-1, 2, down.shape[1]))
    out = _grouped(hidden, down, group_sizes)[jnp.argsort(order)]  # back to token order
    return out.reshape(*expert.shape, -1)


def _weigh(out: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.einsum("tkm,tk->tm", out, weight)


def _grouped(rows: jax.Array, weights: Matrix, group_sizes: jax.Array) -> jax.Array:
    """Rows sorted by group times each group's matrix: [R, M], [E, M, ...] -> [R, prod(...)]."""
    if is_scaled(weights):
        values, scale = (
            x.reshape(len(x), -1, x.shape[-1]) for x in (weights.values, weights.scale)
        )
        return grouped_scaled_matmul(rows.astype(weights.dtype), values, scale, group_sizes)
    matrices = weights.reshape(*weights.shape[:2], -1)
    return grouped_matmul(rows.astype(weights.dtype), matrices, group_sizes)
