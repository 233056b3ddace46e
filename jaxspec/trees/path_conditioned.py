"""Trees whose nodes know their whole path: each level is scored given the nodes it kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from jaxspec.trees.candidates import top_logits
from jaxspec.trees.levels import best_of_levels, grow_by_level
from jaxspec.trees.tree import DraftTree, root_only
from pallas_kernels.tree_level import empty_levels, grow_level

# A drafter's sequential head as a pure function, called inside a jit for n nodes of one depth:
#
#   step(slot, state, tokens [B, n]) -> (logits [B, n, V], state)
#
#   slot: traced int32, 0 … P - 1, the drafted position.
#   state: pytree of [B, n, ...], the state of each node's path before its own token.
#   tokens: int32, each node's token, at the position before the slot (slot 0: the anchor).
#   logits: float32, of the token that follows the node.
#   the returned state: [B, n, ...], inherited by the node's children.
Step = Callable[[jax.Array, Any, jax.Array], tuple[jax.Array, Any]]

# confidence(slot, state, tokens [B, n]) -> logits [B, n] of the probability that the target
# follows the drafter's first choice after this node.
Confidence = Callable[[jax.Array, Any, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class LowRank:
    """A `Step` whose logits are base[:, slot] + latent · output.

    A tree grows over it without its logits, one pass over `output` per level: two kernels on
    an NVIDIA GPU, and no pass for a level none of whose nodes can have children in the tree.

    Attributes:
      base: [B, P, V] float32.
      output: [V, R].
      latent: (slot, state, tokens [B, n]) -> (latent [B, n, R], state), as in `Step`.
      implementation: of `pallas_kernels.tree_level`.
    """

    base: jax.Array
    output: jax.Array
    latent: Step
    implementation: str | None = None

    def __call__(self, slot, state, tokens):
        latent, state = self.latent(slot, state, tokens)
        latent = latent.astype(self.output.dtype)
        bias = jnp.einsum(
            "bnr,vr->bnv", latent, self.output, preferred_element_type=jnp.float32
        )
        return self.base[:, slot, None] + bias, state


def path_conditioned(
    root: Int[Array, " B"],
    step: Step,
    state: Any,
    *,
    depth: int,
    parents: int,
    budget: Int[Array, " B"],
    size: int,
    confidence: Confidence | None = None,
) -> DraftTree:
    """The best paths when a child's probability depends on all tokens above it.

    The M best nodes of a level are expanded: `step` scores the whole vocabulary after each.
    Node i is the i-th best path of those: an exact best-first search where M is N - 1, as no
    level has more nodes that count. Work per level is M x V.

    With `confidence`, scores are the log of survival probabilities: the chance that the target
    accepts the whole path. Let q be the drafter's distribution after a node and c its
    confidence. The drafter's first choice, argmax q, survives with probability c, as along
    DSpark's chains (arXiv 2607.05147). Any other child keeps q, scaled by (1 - c) / (1 - max q)
    where the children's total would exceed one. Where c = max q these are the log-probs.

    Args:
      root: [B] int32, the anchor.
      step: see `Step`; cheapest as a `LowRank` where logits are of that form.
      state: pytree of [B, 1, ...], the root's; () for heads without state.
      depth: P, levels below the root.
      parents: M.
      budget: [B] int32, nodes of each row, the root included.
      size: N, the budget's upper bound.
      confidence: see `Confidence`; calibrated if scores are to be compared between requests.
    """
    if isinstance(step, LowRank) and confidence is None:
        return _low_rank(root, step, state, parents=parents, budget=budget, size=size)
    batch, frontier = root.shape[0], size - 1
    expanded = min(parents, frontier)
    rows = jnp.arange(batch)[:, None]

    def expand(slot, scores, nodes):
        tokens, state = jax.tree.map(lambda x: x[:, :expanded], nodes)  # the best come first
        logits, inherited = step(slot, state, tokens)
        width = min(size, logits.shape[-1])  # confidence may put the first choice last
        likely, top, log_total = top_logits(logits, width)  # [B, M, K], [B, M, K], [B, M]
        gain = top - log_total[..., None]
        if confidence is not None:
            gain = _survival(gain, confidence(slot, state, tokens))
        gain = jnp.minimum(gain, 0.0).swapaxes(1, 2)  # [B, K, M]
        found = (scores[:, None, :expanded] + gain).reshape(batch, -1)
        missing = max(0, frontier - found.shape[1])

        def children(index):
            rank, above = index // expanded, index % expanded
            tokens = likely[rows, above, rank]
            return above, tokens, (tokens, jax.tree.map(lambda x: x[rows, above], inherited))

        return jnp.pad(found, [(0, 0), (0, missing)], constant_values=-jnp.inf), children

    start = jax.tree.map(
        lambda x: jnp.broadcast_to(x, (batch, frontier, *x.shape[2:])), (root[:, None], state)
    )
    return grow_by_level(expand, start, root, depth=depth, size=size, budget=budget)


def _low_rank(root, step: LowRank, state, *, parents, budget, size) -> DraftTree:
    """`path_conditioned` over a `LowRank` step."""
    batch, depth, _ = step.base.shape
    frontier = size - 1
    if frontier == 0:
        return root_only(root)
    expanded = min(parents, frontier)
    rows = jnp.arange(batch)[:, None]

    def level(slot, carry):
        levels, state = carry
        latent, state = step.latent(slot, state, levels.tokens[:, slot, :expanded])
        latent = latent.astype(step.output.dtype)
        levels = grow_level(
            levels, slot, step.base, latent, step.output, implementation=step.implementation
        )
        above = levels.parents[:, slot + 1, :expanded]
        return levels, jax.tree.map(lambda x: x[rows, above], state)

    state = jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, expanded, *x.shape[2:])), state)
    levels = empty_levels(root, depth=depth, width=frontier)
    levels, _ = lax.fori_loop(0, depth, level, (levels, state))
    found = levels.tokens[:, 1:], levels.parents[:, 1:], levels.scores[:, 1:]
    return best_of_levels(root, *found, size=size, budget=budget)


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
