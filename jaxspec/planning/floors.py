"""Lower bounds of a step's time: every byte read once, every product at the full rate."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxspec.config import DrafterConfig, TargetConfig
from jaxspec.drafters.head import abstract_weights
from jaxspec.models.params import MoeParams, abstract_params
from jaxspec.planning.setup import DTYPE, Setup
from pallas_kernels.h100.target import BYTES_PER_SECOND, FLOPS_PER_SECOND


@dataclasses.dataclass(frozen=True)
class Floor:
    """Work of one device that a step cannot avoid.

    Attributes:
      bytes: weights and cache rows that it reads, each once.
      flops: multiplications and additions of its matrix products.
    """

    bytes: float
    flops: float

    @property
    def milliseconds(self) -> float:
        """An estimate from datasheet numbers, never a timing: the larger of the two."""
        return 1e3 * max(self.bytes / BYTES_PER_SECOND, self.flops / FLOPS_PER_SECOND)


def target_floor(setup: Setup, tokens: int, *, predicted: int | None = None) -> Floor:
    """Of one forward of the target at full context.

    Args:
      tokens: of all rows.
      predicted: those of them that are unembedded; all if left out.
    """
    c, params = setup.target, abstract_params(setup.target, DTYPE)
    vocabulary = math.prod(params.unembed.shape)
    size, values = _bytes(params.unembed), 0.0
    for layer in params.layers:
        size += _bytes(layer.attention)
        values += _values((layer.attention.qkv, layer.attention.out))
        if isinstance(layer.mlp, MoeParams):
            experts = (layer.mlp.gate_up, layer.mlp.down)
            reached = min(1.0, tokens * c.experts_per_token / c.num_experts)
            size += _bytes((layer.mlp.norm, layer.mlp.router)) + reached * _bytes(experts)
            values += _values(layer.mlp.router)
            values += _values(experts) * c.experts_per_token / c.num_experts
        else:
            size += _bytes(layer.mlp)
            values += _values((layer.mlp.gate_up, layer.mlp.down))
    size += setup.batch * _row_bytes(c) * setup.context
    attention = 4 * tokens * c.num_heads * c.head_dim * setup.context * c.num_layers
    products = 2 * (tokens * values + (predicted or tokens) * vocabulary)
    return Floor(size / setup.devices, (products + attention) / setup.devices)


def draft_floor(setup: Setup) -> Floor:
    """Of the drafter's pass; nothing where it has no weights."""
    block = setup.block
    if block is None:
        return Floor(0.0, 0.0)
    weights = abstract_weights(block, DTYPE)
    vocabulary = block.vocab_size * block.hidden_size
    slots = setup.batch * block.block_size
    size = _bytes(weights) + vocabulary * jnp.dtype(DTYPE).itemsize
    size += setup.batch * _row_bytes(block) * setup.context
    flops = 2 * slots * (_values(weights) + vocabulary)
    return Floor(size / setup.devices, flops / setup.devices)


def program_floor(setup: Setup, program: str) -> Floor:
    """Of one step of a compiled program (`programs.PROGRAMS`): a round, a chunk, a draft."""
    if program == "draft":
        return draft_floor(setup)
    if program == "prefill":
        return target_floor(setup, setup.batch * setup.chunk, predicted=setup.batch)
    draft, verify = draft_floor(setup), target_floor(setup, setup.batch * setup.drafter.size)
    return Floor(draft.bytes + verify.bytes, draft.flops + verify.flops)


def cache_bytes(setup: Setup) -> int:
    """Of the keys (or the values) of one layer of the target, on all devices."""
    return (
        setup.batch * _row_bytes(setup.target) * setup.context // 2 // setup.target.num_layers
    )


def _row_bytes(c: TargetConfig | DrafterConfig) -> int:
    """Of keys and values of one token."""
    return 2 * c.num_layers * c.num_kv_heads * c.head_dim * jnp.dtype(DTYPE).itemsize


def _values(tree: Any) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def _bytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
