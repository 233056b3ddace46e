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
from jaxspec.trees.copies import Matches
from jaxspec.trees.levels import best_of_levels
from jaxspec.trees.tree import DraftTree, known, root_only
from pallas_kernels.tree_level import Levels, empty_levels, grow_level, with_row

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
    kept: Int[Array, " V"] | None = None,
    confidence: Confidence | None = None,
    matches: Matches | None = None,
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

    With `matches`, q is mixed with a copy of what followed the end of the path earlier in the
    text (`trees.copies`), and below depth P there are only copies.

    Args:
      root: [B] int32, the anchor.
      step: see `Step`; cheapest as a `LowRank` where logits are of that form.
      state: pytree of [B, 1, ...], the root's; () for heads without state.
      depth: P, levels below the root that `step` scores.
      parents: M.
      budget: [B] int32, nodes of each row, the root included.
      size: N, the budget's upper bound.
      kept: [V] int32, the tokens that logits score; None: 0 … V - 1.
      confidence: see `Confidence`; calibrated if scores are to be compared between requests.
      matches: the anchor's.
    """
    if size == 1:
        return root_only(root)
    batch, expanded = root.shape[0], min(parents, size - 1)
    rows = jnp.arange(batch)[:, None]
    if isinstance(step, LowRank) and confidence is None:
        score = _scored_by_low_rank(step)
    else:
        score = _scored_by_logits(step, confidence)

    def drafted(levels: Levels, slot, state):
        levels, state = score(levels, slot, state, levels.tokens[:, slot, :expanded])
        if kept is not None:
            row = kept[levels.tokens[:, slot + 1]]
            levels = dataclasses.replace(levels, tokens=levels.tokens.at[:, slot + 1].set(row))
        return levels, state

    def level(slot, carry):
        levels, state, matches = carry
        if matches is None:
            levels, state = drafted(levels, slot, state)
        else:
            copies = matches.copies()
            below, state = drafted(copies.rest(levels, slot), slot, state)
            levels = copies.beside(levels, slot, below)
        above = levels.parents[:, slot + 1, :expanded]
        state = jax.tree.map(lambda x: x[rows, above], state)
        return levels, state, followed(levels, slot, matches)

    def followed(levels, slot, matches):
        if matches is None:
            return None
        above, tokens = (x[:, slot + 1, :expanded] for x in (levels.parents, levels.tokens))
        return matches.follow(slot, above, tokens)

    def copied_level(slot, carry):
        levels, matches = carry
        levels = matches.copies().beside(levels, slot, levels)  # whose row slot + 1 is empty
        return levels, followed(levels, slot, matches)

    state = jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, expanded, *x.shape[2:])), state)
    deepest = depth
    if matches is not None:
        deepest, matches = max(depth, matches.depth), matches.broadcast(expanded)
    levels = empty_levels(root, depth=deepest, width=size - 1)
    levels, _, matches = lax.fori_loop(0, depth, level, (levels, state, matches))
    if matches is not None:
        levels, _ = lax.fori_loop(depth, deepest, copied_level, (levels, matches))
    found = levels.tokens[:, 1:], levels.parents[:, 1:], levels.scores[:, 1:]
    return best_of_levels(root, *found, size=size, budget=budget)


def _scored_by_low_rank(step: LowRank):
    def score(levels: Levels, slot, state, tokens):
        latent, state = step.latent(slot, state, tokens)
        levels = grow_level(
            levels, slot, step.base, latent, step.output, implementation=step.implementation
        )
        return levels, state

    return score


def _scored_by_logits(step: Step, confidence: Confidence | None):
    def score(levels: Levels, slot, state, tokens):
        frontier, count = levels.scores.shape[-1], tokens.shape[1]
        logits, inherited = step(slot, state, tokens)
        width = min(frontier + 1, logits.shape[-1])  # confidence may put the first choice last
        likely, top, log_total = top_logits(logits, width)  # [B, M, K], [B, M, K], [B, M]
        gain = top - log_total[..., None]
        if confidence is not None:
            gain = _survival(gain, confidence(slot, state, tokens))
        # First children of all nodes come first: partial sorts are two to three times as quick
        # where the likely stand in front.
        gain = jnp.minimum(gain, 0.0).swapaxes(1, 2)  # [B, K, M]
        found = (levels.scores[:, slot, None, :count] + gain).reshape(len(tokens), -1)
        missing = max(0, frontier - found.shape[1])
        found = jnp.pad(known(found), [(0, 0), (0, missing)], constant_values=-jnp.inf)
        scores, place = lax.top_k(found, frontier)
        place = jnp.minimum(place, width * count - 1)
        rank, above = place // count, place % count
        tokens = likely[jnp.arange(len(tokens))[:, None], above, rank]
        return with_row(levels, slot, scores, above, tokens), inherited

    return score


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
