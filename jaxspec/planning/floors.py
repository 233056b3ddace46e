"""Lower bounds on a step's time: every byte read once, all arithmetic at peak rate."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxspec.config import DrafterConfig, TargetConfig
from jaxspec.drafters.eagle import EagleDrafter
from jaxspec.drafters.eagle_head import EagleConfig
from jaxspec.drafters.mtp import MtpConfig
from jaxspec.drafters.weights import abstract_weights
from jaxspec.models.params import DeltaNetParams, LayerParams, MoeParams
from jaxspec.models.scaled import is_scaled
from jaxspec.models.state import init_states
from jaxspec.planning.setup import DTYPE, Setup
from pallas_kernels.h100.target import BYTES_PER_SECOND, FLOPS_PER_SECOND


@dataclasses.dataclass(frozen=True)
class Floor:
    """Work of one device that a step cannot avoid.

    Attributes:
      bytes: bytes of weights and layer states read, each once.
      flops: multiplications and additions of its matrix products.
    """

    bytes: float
    flops: float

    @property
    def milliseconds(self) -> float:
        """The larger of memory and arithmetic time; an estimate from datasheet numbers."""
        return 1e3 * max(self.bytes / BYTES_PER_SECOND, self.flops / FLOPS_PER_SECOND)


def target_floor(setup: Setup, tokens: int, *, predicted: int | None = None) -> Floor:
    """Floor of one forward of the target at full context.

    Args:
      tokens: tokens of all rows.
      predicted: number of tokens whose logits are computed; all by default.
    """
    c, params = setup.target, setup.target_params
    vocabulary = math.prod(params.unembed.shape)
    size, values = _bytes(params.unembed), 0.0
    for layer in params.layers:
        read, multiplied = _layer_work(c, layer, tokens)
        size, values = size + read, values + multiplied
    size += sum(state_bytes(setup))
    layers = len(c.attention_layers)
    attention = 4 * tokens * c.num_heads * c.head_dim * setup.context * layers
    if c.delta_net is not None:  # each token reads a state with its key and with its query
        d = c.delta_net
        attention += 4 * tokens * len(d.layers) * d.value_heads * d.key_dim * d.value_dim
    products = 2 * (tokens * values + (predicted or tokens) * vocabulary)
    return Floor(size / setup.devices, (products + attention) / setup.devices)


def _layer_work(c: TargetConfig, layer: LayerParams, tokens: int) -> tuple[float, float]:
    """Bytes of a layer's weights that `tokens` tokens read, and values per token multiplied."""
    attention, mlp = layer.attention, layer.mlp
    size = _bytes(attention)
    if isinstance(attention, DeltaNetParams):
        values = _values((attention.inputs, attention.output))
    else:
        values = _values((attention.qkv, attention.out))
    if not isinstance(mlp, MoeParams):
        return size + _bytes(mlp), values + _values((mlp.gate_up, mlp.down))
    experts, always = (mlp.gate_up, mlp.down), (mlp.router, mlp.shared)
    reached = min(1.0, tokens * c.experts_per_token / c.num_experts)
    size += _bytes((mlp.norm, always)) + reached * _bytes(experts)
    values += _values(always) + _values(experts) * c.experts_per_token / c.num_experts
    return size, values


def draft_floor(setup: Setup) -> Floor:
    """Floor of the drafter's passes; zero for a drafter without weights."""
    block = setup.block
    eagle = next((x for x in setup.drafter.parts if isinstance(x, EagleDrafter)), None)
    if eagle is not None:
        return _eagle_floor(setup, eagle)
    if block is None:
        return Floor(0.0, 0.0)
    weights = abstract_weights(block, DTYPE)
    vocabulary = block.vocab_size * block.hidden_size
    slots = setup.batch * block.block_size
    size = _bytes(weights) + _bytes(setup.target_params.unembed)
    size += setup.batch * _row_bytes(block) * setup.context
    flops = 2 * slots * (_values(weights) + vocabulary)
    return Floor(size / setup.devices, flops / setup.devices)


def _eagle_floor(setup: Setup, drafter: EagleDrafter) -> Floor:
    """Floor of EAGLE's passes, each of which reads the layer, the LM head and the cache."""
    c, rows = drafter.config, setup.batch * drafter.pass_tokens
    weights = drafter.abstract_params(setup.target_params).head
    if isinstance(c, MtpConfig):
        read, multiplied = _layer_work(c.layer, weights.layer, rows)
        read, multiplied = read + _bytes(weights.fc), multiplied + _values(weights.fc)
    else:
        read, multiplied = _bytes(weights), _values(weights)
    head = c.vocab_size * c.hidden_size
    size = read + _bytes(setup.target_params.unembed)
    size += setup.batch * _row_bytes(c) * setup.context
    flops = 2 * rows * (multiplied + head)
    passes = drafter.passes / setup.devices
    return Floor(passes * size, passes * flops)


def program_floor(setup: Setup, program: str) -> Floor:
    """Floor of one step of a program of `programs.PROGRAMS`: a round, chunk or draft."""
    if program == "draft":
        return draft_floor(setup)
    if program == "prefill":
        return target_floor(setup, setup.batch * setup.chunk, predicted=setup.batch)
    draft, verify = draft_floor(setup), target_floor(setup, setup.batch * setup.drafter.size)
    return Floor(draft.bytes + verify.bytes, draft.flops + verify.flops)


def state_bytes(setup: Setup) -> list[int]:
    """Bytes, on all devices, of every array that layers keep between forwards: keys and values,
    and the states of gated delta nets, which are independent of the context."""
    make = functools.partial(init_states, setup.target, setup.batch, setup.context, DTYPE)
    return [_bytes(x) for x in jax.tree.leaves(jax.eval_shape(make))]


def _row_bytes(c: DrafterConfig | EagleConfig | MtpConfig) -> int:
    """Bytes of the keys and values of one token."""
    return 2 * c.num_layers * c.num_kv_heads * c.head_dim * jnp.dtype(DTYPE).itemsize


def _values(tree: Any) -> int:
    """Number of values of matrices, without the scales of 8-bit ones."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree, is_leaf=is_scaled))


def _bytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
