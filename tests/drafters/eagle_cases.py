"""Small random EAGLE-3 drafters for the tiny target of `tests.tiny`."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.config import TreeConfig
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.drafters.eagle import EagleDrafter, EagleParams, eagle_params
from jaxspec.drafters.eagle_head import EagleConfig
from jaxspec.drafters.weights import random_weights
from tests import tiny

PLAIN = EagleConfig(
    vocab_size=tiny.QWEN3.vocab_size,
    hidden_size=tiny.QWEN3.hidden_size,
    target_hidden_size=tiny.QWEN3.hidden_size,
    intermediate_size=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    target_layers=tiny.QWEN3.num_layers,
    taps=(-1, 0, 1),
    steps=4,
)
KEPT = (0, 2, 3, 5, 6, 7, 10)  # a draft vocabulary
KINDS = {
    "plain": PLAIN,
    "qwen": dataclasses.replace(PLAIN, qk_norm=True),
    "normed": dataclasses.replace(
        PLAIN, tap_norm="joined", residual_after_norm=True, feedback_after_norm=True
    ),
    "each tap": dataclasses.replace(PLAIN, tap_norm="each", feedback_after_norm=True),
    "window": dataclasses.replace(PLAIN, window=3),
    "two layers": dataclasses.replace(PLAIN, num_layers=2, window=(None, 3)),
    "raw logits": dataclasses.replace(PLAIN, logits_after_norm=False),
}


@functools.cache
def params(kind: str, reduced: bool = False) -> EagleParams:
    """Weights large enough for every part to matter; none is left at zero or one."""
    with jax.ensure_compile_time_eval():
        weights = random_weights(KINDS[kind], jax.random.key(1))
        leaves, tree = jax.tree.flatten(weights)
        random = np.random.default_rng(2)
        leaves = [x + 0.3 * random.standard_normal(x.shape).astype(np.float32) for x in leaves]
        head = random.standard_normal((len(KEPT), PLAIN.hidden_size)).astype(np.float32)
        own = dict(kept=KEPT, unembed=jnp.asarray(head)) if reduced else {}
        weights = jax.tree.unflatten(tree, leaves)
        return eagle_params(weights, tiny.target().params, **own)


def loaded(kind: str, tree: TreeConfig, reduced: bool = False) -> LoadedDrafter:
    return LoadedDrafter(EagleDrafter(KINDS[kind], tree), params(kind, reduced))
