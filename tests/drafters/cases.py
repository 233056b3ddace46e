"""Small random drafters of every kind for the tiny target of `tests.tiny`."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.config import DrafterConfig, TreeConfig
from jaxspec.drafters.base import Committed, Drafter, LoadedDrafter
from jaxspec.drafters.block import BlockDrafter, BlockParams, block_params
from jaxspec.drafters.head import Vocabulary
from jaxspec.drafters.weights import random_weights
from jaxspec.models.cache import KVCache
from jaxspec.trees.tree import DraftTree
from tests import tiny

SHAPE = dict(
    vocab_size=tiny.QWEN3.vocab_size,
    hidden_size=tiny.QWEN3.hidden_size,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    target_layers=tiny.QWEN3.num_layers,
    mask_token_id=10,
)
LOW_RANK = dict(predict_next=True, rank=6, confidence="hidden_and_previous")

KINDS = {
    "dflash": DrafterConfig(taps=(0, 1), block_size=5, **SHAPE),
    "jetspec": DrafterConfig(taps=(-1, 1), block_size=5, causal=True, **SHAPE),
    "dspark": DrafterConfig(
        taps=(0, 1), block_size=4, sequential="markov", **LOW_RANK, **SHAPE
    ),
    "gated": DrafterConfig(taps=(1,), block_size=4, sequential="gated", **LOW_RANK, **SHAPE),
    "rnn": DrafterConfig(
        taps=(0, 1), block_size=4, causal=True, sequential="rnn", **LOW_RANK, **SHAPE
    ),
    "treeflash": DrafterConfig(
        taps=(0, 2), block_size=5, sequential="mlp", confidence="hidden", **SHAPE
    ),
    "window": DrafterConfig(taps=(0, 1), block_size=5, window=4, **SHAPE),
    "dflash2": DrafterConfig(
        taps=(0, 1),
        block_size=5,
        causal=(True, False),
        window=(3, None),
        sequential="bilinear",
        rank=6,
        candidates=4,
        conv_taps=3,
        conv_group=8,
        logit_scale=0.7,
        logit_softcap=9.0,
        embedding_scale=1.3,
        **SHAPE,
    ),
}


@functools.cache
def params(kind: str) -> BlockParams:
    """Weights large enough for every part to matter; none is left at zero or one."""
    with (
        jax.ensure_compile_time_eval()
    ):  # what is kept are numbers, also when first asked in jit
        weights = random_weights(KINDS[kind], jax.random.key(1))
        leaves, tree = jax.tree.flatten(weights)
        random = np.random.default_rng(2)
        leaves = [x + 0.3 * random.standard_normal(x.shape).astype(np.float32) for x in leaves]
        return block_params(jax.tree.unflatten(tree, leaves), tiny.target().params)


def loaded(kind: str, tree: TreeConfig) -> LoadedDrafter:
    return LoadedDrafter(BlockDrafter(KINDS[kind], tree), params(kind))


def vocabulary() -> Vocabulary:
    return params("dflash").vocabulary


def features(kind: str, batch: int, length: int, seed: int = 0) -> jax.Array:
    """Random outputs of the tapped layers; a drafter is a function of any."""
    width = len(KINDS[kind].taps) * SHAPE["hidden_size"]
    random = np.random.default_rng(seed)
    return jnp.asarray(random.standard_normal((batch, length, width)), jnp.float32)


@functools.partial(jax.jit, static_argnames="kind")
def observed(kind: str, features: jax.Array) -> KVCache:
    """The state after tokens 0 … T - 1 with features [B, T, .] were committed."""
    batch, length = features.shape[:2]
    drafter = BlockDrafter(KINDS[kind], TreeConfig())
    state = drafter.init(params(kind), batch, length)
    zeros = jnp.zeros((batch, length), jnp.int32)
    committed = Committed(zeros, features, zeros[:, 0], zeros[:, 0] + length)
    return drafter.observe(params(kind), state, committed)


@functools.partial(jax.jit, static_argnames="drafter")
def draft(drafter: Drafter, params, state, anchor, position, budget) -> DraftTree:
    """The tree it drafts, compiled: step by step it would be hundreds of small programs."""
    return drafter.draft(params, state, anchor, position, budget)[0]


@functools.partial(jax.jit, static_argnames="drafter")
def draft_sampled(drafter: Drafter, params, state, anchor, position, temperature, keys):
    """The chain it draws, compiled."""
    return drafter.draft_sampled(params, state, anchor, position, temperature, keys)[0]
