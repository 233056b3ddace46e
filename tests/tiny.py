"""Tiny random models and drafters for tests; no file is read.

A decoding program takes five seconds to trace and compile. Tests that decode in batches of four
rows, with less than 256 tokens, share those of equal targets and drafters.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.config import DeltaNetConfig, TargetConfig
from jaxspec.drafters.base import Drafter, LoadedDrafter
from jaxspec.models.decoder import forward_chain, unembed
from jaxspec.models.params import random_params
from jaxspec.models.state import init_states
from jaxspec.models.target import Target
from jaxspec.trees.tree import NO_PARENT, DraftTree

QWEN3 = TargetConfig(
    vocab_size=11,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_positions=512,
)
LLAMA = dataclasses.replace(QWEN3, qk_norm=False, tie_embeddings=True)
MOE = dataclasses.replace(
    QWEN3,
    num_experts=4,
    experts_per_token=2,
    moe_intermediate_size=16,
    norm_topk_prob=True,
    sparse_layers=(0, 2),
)
HYBRID = dataclasses.replace(
    QWEN3,
    delta_net=DeltaNetConfig(
        layers=(0, 2), key_heads=2, value_heads=4, key_dim=8, value_dim=12
    ),
    rotary_dim=4,
    attention_gate=True,
    zero_centered_norms=True,
)
HYBRID_MOE = dataclasses.replace(
    HYBRID,
    num_experts=4,
    experts_per_token=2,
    moe_intermediate_size=16,
    norm_topk_prob=True,
    shared_expert_size=24,
    sparse_layers=(0, 1, 2),
)


@functools.cache
def target(config: TargetConfig = QWEN3, seed: int = 0, scale: float = 0.3) -> Target:
    return Target("tiny", config, random_params(config, jax.random.key(seed), scale=scale))


def prompts(*lengths: int, seed: int = 0, vocab: int = QWEN3.vocab_size) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, n).tolist() for n in lengths]


@dataclasses.dataclass(frozen=True)
class RandomTrees(Drafter):
    """A different random tree of random tokens every round: lossless all the same."""

    size: int = 16
    depth: int = 5
    vocab: int = QWEN3.vocab_size

    def init(self, params, batch, capacity):
        return jax.random.key(7)

    def observe(self, params, state, committed):
        return state

    def draft(self, params, state, anchor, position, budget, noise=None):
        state, key = jax.random.split(state)
        draw = jax.vmap(functools.partial(random_tree, self.size, self.depth, self.vocab))
        return draw(jax.random.split(key, anchor.shape[0]), anchor, budget), state


def random_tree(size: int, max_depth: int, vocab: int, key, root, budget) -> DraftTree:
    """One tree (no batch axis): every node hangs from an earlier one that has room below."""
    token_key, parent_key = jax.random.split(key)
    tokens = jax.random.randint(token_key, (size,), 0, vocab).at[0].set(root)
    wish = jax.random.randint(parent_key, (size,), 0, jnp.maximum(jnp.arange(size), 1))

    def attach(node, carry):
        parents, depths = carry
        # Too deep a parent hands its child to the root.
        parent = jnp.where(depths[wish[node]] < max_depth, wish[node], 0)
        return parents.at[node].set(parent), depths.at[node].set(depths[parent] + 1)

    parents = jnp.full(size, NO_PARENT, jnp.int32)
    parents, depths = jax.lax.fori_loop(1, size, attach, (parents, jnp.zeros(size, jnp.int32)))
    valid = jnp.arange(size) < budget
    return DraftTree(
        tokens=jnp.where(valid, tokens, 0).astype(jnp.int32),
        parents=jnp.where(valid, parents, NO_PARENT),
        depths=jnp.where(valid, depths, 0),
        scores=jnp.where(valid, 0.0, -jnp.inf),
        valid=valid,
    )


RANDOM = LoadedDrafter(RandomTrees())


@functools.partial(jax.jit, static_argnames="config")
def _all_logits(params, config, tokens):
    states = init_states(config, 1, 1, jnp.float32)
    out = forward_chain(params, config, tokens, states, jnp.zeros(1, int))
    return unembed(params, out.hidden)[0]


def logits(target: Target, tokens: list[int]) -> np.ndarray:
    """Logits [T, V] after every token of a sequence, from one forward without a cache.

    Sequences are padded to 32 tokens, 64, 128 and so on: a program serves many lengths.
    """
    padded = np.zeros((1, max(32, 1 << (len(tokens) - 1).bit_length())), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(_all_logits(target.params, target.config, padded))[: len(tokens)]
