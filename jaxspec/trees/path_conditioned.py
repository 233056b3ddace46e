"""Trees whose nodes know their whole path: each level is scored given the nodes it kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxspec.trees.candidates import top_logits
from jaxspec.trees.levels import grow_by_level
from jaxspec.trees.tree import DraftTree

# What a drafter's sequential head supplies, a pure function called inside a jit, n nodes at a
# time, all at one depth:
#
#   step(slot, state, tokens [B, n], candidates [B, C]) -> (logits [B, n, C], state)
#
#   slot: traced int32, 0 … P - 1, the drafted position.
#   state: pytree of [B, n, ...], what each node's path left behind before its own token.
#   tokens: int32, each node's token, at the position before the slot (slot 0: the anchor).
#   candidates: int32, the tokens that may follow, the same for every node of a row.
#   logits: float32, the candidates' corrected logits given the node, on the scale of the base
#     logits; without a head the base logits themselves.
#   the returned state: [B, n, ...], inherited by the node's children.
Step = Callable[[jax.Array, Any, jax.Array, jax.Array], tuple[jax.Array, Any]]

# confidence(slot, state, tokens [B, n]) -> logits [B, n] of the probability that the target
# follows the drafter's first choice after this node.
Confidence = Callable[[jax.Array, Any, jax.Array], jax.Array]


def path_conditioned(
    logits: jax.Array,
    root: jax.Array,
    step: Step,
    state: Any,
    *,
    candidates: int,
    budget: jax.Array,
    size: int,
    confidence: Confidence | None = None,
) -> DraftTree:
    """The best paths when a child's probability depends on all tokens above it.

    The children of every node of a level are the C likeliest tokens of the base logits,
    scored by `step` for that node and normalised together with what the base distribution
    leaves outside them, so that log-probs are exact when C = V. Work per level is nodes x C,
    never nodes x V. Node i is the i-th best path: an exact best-first search over these scores.

    With `confidence`, scores are the log of survival probabilities: the chance that the target
    accepts the whole path. Let q be the corrected distribution after a node and c its
    confidence. The drafter's first choice, argmax q, survives with probability c, as along
    DSpark's chains (spec/dspark.md §1.3). Any other child keeps q, scaled by (1 - c) / (1 -
    max q) where the children's total would exceed one. Where c = max q these are the log-probs.

    Args:
      logits: [B, P, V], base logits; row p is for the token at depth p + 1.
      root: [B] int32, the anchor.
      step: see `Step`.
      state: pytree of [B, 1, ...], the root's; () for heads that remember nothing.
      candidates: C, children considered per node; at most V.
      budget: [B] int32, nodes of each row, the root included.
      size: N, the budget's upper bound.
      confidence: see `Confidence`; calibrated if scores are to be compared between requests.
    """
    batch, depth, vocab = logits.shape
    frontier, width = size - 1, candidates
    likely, base, log_total = top_logits(logits, width)  # [B, P, C], [B, P, C], [B, P]
    if width == vocab:
        outside = jnp.full_like(log_total, -jnp.inf)
    else:
        inside = jax.nn.logsumexp(base - log_total[..., None], axis=-1)
        outside = log_total + _log1mexp(inside)

    def expand(slot, scores, nodes):
        tokens, state = nodes
        options = likely[:, slot]  # [B, C]
        corrected, inherited = step(slot, state, tokens, options)
        inside = jax.nn.logsumexp(corrected, axis=-1)
        total = jnp.logaddexp(inside, outside[:, slot, None])
        gain = corrected - total[..., None]  # [B, F, C]
        if confidence is not None:
            gain = _survival(gain, confidence(slot, state, tokens))

        def children(index):
            rank, parents = index // frontier, index % frontier
            tokens = jnp.take_along_axis(options, rank, axis=1)
            state = jax.tree.map(lambda x: x[rows, parents], inherited)
            return parents, tokens, (tokens, state)

        gain = jnp.minimum(gain, 0.0).swapaxes(1, 2)  # [B, C, F]
        return (scores[:, None] + gain).reshape(batch, -1), children

    rows = jnp.arange(batch)[:, None]
    start = jax.tree.map(
        lambda x: jnp.broadcast_to(x, (batch, frontier, *x.shape[2:])), (root[:, None], state)
    )
    return grow_by_level(expand, start, root, depth=depth, size=size, budget=budget)


def _survival(log_q: jax.Array, confidence: jax.Array) -> jax.Array:
    """Log-probability that the target takes each child: [B, F, C] given logits [B, F]."""
    first = jnp.max(log_q, axis=-1)
    accepted, rejected = jax.nn.log_sigmoid(confidence), jax.nn.log_sigmoid(-confidence)
    scale = jnp.minimum(rejected - _log1mexp(first), 0.0)
    others = log_q + scale[..., None]
    is_first = jnp.argmax(log_q, axis=-1)[..., None] == jnp.arange(log_q.shape[-1])
    return jnp.where(is_first, accepted[..., None], others)


def _log1mexp(x: jax.Array) -> jax.Array:
    """log(1 - exp(x)) of a log-probability; -inf at 0, and above it by rounding."""
    return jnp.log(-jnp.expm1(jnp.minimum(x, 0.0)))
