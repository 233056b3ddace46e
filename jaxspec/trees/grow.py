"""Trees over one distribution per drafted position, shared by all parents at a depth.

Every builder takes a static `size` N and a `budget` of nodes per row, the root included; a
smaller budget's tree is the beginning of a larger one's.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxspec.trees.candidates import top_log_probs
from jaxspec.trees.levels import grow_by_level
from jaxspec.trees.path_conditioned import path_conditioned
from jaxspec.trees.transitions import from_transitions
from jaxspec.trees.tree import NO_PARENT, DraftTree

__all__ = [
    "best_first",
    "best_first_from_top",
    "from_transitions",
    "path_conditioned",
    "profile_caps",
    "top2gap_caps",
    "top_budget",
    "top_budget_from_top",
]


def best_first(
    logits: jax.Array,
    root: jax.Array,
    *,
    width: int,
    budget: jax.Array,
    size: int,
    caps: jax.Array | None = None,
) -> DraftTree:
    """JetSpec's `accum_logp`: expand the best node by its `width` likeliest children, repeat.

    Nodes stand in the order in which they were added. Of equally good nodes the oldest is
    expanded first. A round adds up to `width` children and deepens the tree by at most one,
    so the tree is never deeper than ceil((budget - 1) / width): full fan-out at a small
    budget drafts less far than a chain.

    Args:
      logits: [B, P, V]; row p is the distribution of the token at depth p + 1.
      root: [B] int32, the anchor.
      width: W, children per expanded node; at most V.
      budget: [B] int32, nodes of each row, the root included.
      size: N, the budget's upper bound.
      caps: [B, P] int32, children of a node at depth p, 1 … W; W everywhere if absent. See
        `top2gap_caps` and `profile_caps`. Needs N - 1 steps instead of (N - 1) / W.

    Source: JetSpec (arXiv 2606.18394), Algorithm 1.
    """
    tokens, log_probs = top_log_probs(logits, width)
    return best_first_from_top(tokens, log_probs, root, budget=budget, size=size, caps=caps)


def best_first_from_top(
    tokens: jax.Array,
    log_probs: jax.Array,
    root: jax.Array,
    *,
    budget: jax.Array,
    size: int,
    caps: jax.Array | None = None,
) -> DraftTree:
    """`best_first` over the top W tokens of each depth, both [B, P, W], likeliest first."""
    grow = jax.vmap(_best_first_row, in_axes=(0, 0, 0, 0, None, None if caps is None else 0))
    return grow(tokens, log_probs, root, budget, size, caps)


def _best_first_row(tokens, log_probs, root, budget, size, caps) -> DraftTree:
    depth, width = tokens.shape
    steps = -(-(size - 1) // width) if caps is None else size - 1
    room = size + width  # children are written W at a time
    rank = jnp.arange(width)

    def expand(carry, _):
        nodes, used = carry
        best = jnp.argmax(nodes["open"])
        level = nodes["depth"][best]
        count = width if caps is None else caps[level]
        scores = jnp.where(rank < count, nodes["open"][best] + log_probs[level], -jnp.inf)
        children = {
            "open": jnp.where(level + 1 < depth, scores, -jnp.inf),
            "score": scores,
            "depth": jnp.broadcast_to(level + 1, width),
            "parent": jnp.broadcast_to(best, width),
            "token": tokens[level],
        }
        nodes = nodes | {"open": nodes["open"].at[best].set(-jnp.inf)}
        nodes = {
            name: lax.dynamic_update_slice(nodes[name], children[name], (used,))
            for name in nodes
        }
        return (nodes, jnp.minimum(used + count, size)), None

    first = jnp.arange(room) == 0
    empty = jnp.where(first, 0.0, -jnp.inf)
    nodes = {
        "open": empty,  # score of a node not yet expanded
        "score": empty,
        "depth": jnp.zeros(room, jnp.int32),
        "parent": jnp.full(room, NO_PARENT, jnp.int32),
        "token": jnp.where(first, root, 0).astype(jnp.int32),
    }
    (nodes, _), _ = lax.scan(expand, (nodes, jnp.int32(1)), None, length=steps)
    nodes = {name: x[:size] for name, x in nodes.items()}
    valid = (nodes["score"] > -jnp.inf) & (jnp.arange(size) < budget)
    return DraftTree(
        tokens=jnp.where(valid, nodes["token"], 0),
        parents=jnp.where(valid, nodes["parent"], NO_PARENT),
        depths=jnp.where(valid, nodes["depth"], 0),
        scores=jnp.where(valid, nodes["score"], -jnp.inf),
        valid=valid,
    )


def top2gap_caps(log_probs: jax.Array, *, beta: float = 1.0, middle: float = 1.0) -> jax.Array:
    """JetSpec's `top2gap`: fewer children where the likeliest token leads clearly.

    max(1, round(W sigmoid(-beta (gap - middle)))) children, where gap is the difference of
    the two best log-probs of a depth.

    Args:
      log_probs: [B, P, W], likeliest first; with W = 1 the tree is a chain.
    """
    width = log_probs.shape[-1]
    if width < 2:
        return jnp.ones(log_probs.shape[:-1], jnp.int32)
    gap = log_probs[..., 0] - log_probs[..., 1]
    share = jax.nn.sigmoid(-beta * (gap - middle))
    return jnp.maximum(1, jnp.round(width * share)).astype(jnp.int32)


def profile_caps(
    accepted: jax.Array, *, batch: int, depth: int, width: int, threshold: float = 0.02
) -> jax.Array:
    """JetSpec's `depth_rank_histogram`: the ranks that a profile saw accepted often enough.

    Args:
      accepted: [D, R], share of rounds whose accepted child at depth d had rank r. Depths
        that it lacks are not capped; neither is any if the threshold is 0.

    Returns:
      caps [batch, depth] in 1 … width, the number of ranks at or above the threshold.
    """
    counted = jnp.sum(accepted[:depth, :width] >= threshold, axis=-1)
    caps = jnp.full(depth, width).at[: counted.shape[0]].set(jnp.clip(counted, 1, width))
    caps = caps if threshold > 0 else jnp.full(depth, width)
    return jnp.broadcast_to(caps.astype(jnp.int32), (batch, depth))


def top_budget(
    logits: jax.Array,
    root: jax.Array,
    *,
    budget: jax.Array,
    size: int,
    width: int | None = None,
) -> DraftTree:
    """The most probable prefixes under independent depths: DDTree's optimum.

    No tree of `budget` nodes has a larger expected accepted length if each depth's token were
    drawn from its row of logits. Node i is the i-th most probable prefix.

    Args:
      logits: [B, P, V]; row p is the distribution of the token at depth p + 1.
      root: [B] int32, the anchor.
      budget: [B] int32, nodes of each row, the root included (DDTree does not count it).
      size: N, the budget's upper bound.
      width: tokens considered per depth. N - 1, the default, never misses one; fewer are found
        sooner.

    Source: DDTree (spec/baselines.md §2.1).
    """
    width = max(1, min(width or size - 1, size - 1, logits.shape[-1]))
    tokens, log_probs = top_log_probs(logits, width)
    return top_budget_from_top(tokens, log_probs, root, budget=budget, size=size)


def top_budget_from_top(
    tokens: jax.Array, log_probs: jax.Array, root: jax.Array, *, budget: jax.Array, size: int
) -> DraftTree:
    """`top_budget` over the top K tokens of each depth, both [B, P, K], likeliest first."""
    frontier, width = size - 1, tokens.shape[-1]
    # The child of rank k of the i-th best node of a level has (i + 1)(k + 1) - 1 nodes of its
    # own level that are no worse: beyond N - 1 it cannot be kept. About N ln N pairs remain.
    pairs = [(i, k) for k in range(width) for i in range(frontier // (k + 1))]
    above, ranks = np.array(pairs, np.int32).reshape(-1, 2).T

    def expand(slot, scores, _):
        candidates = scores[:, above] + log_probs[:, slot][:, ranks]

        def children(index):
            rank = jnp.asarray(ranks)[index]
            chosen = jnp.take_along_axis(tokens[:, slot], rank, axis=-1)
            return jnp.asarray(above)[index], chosen, None

        return candidates, children

    return grow_by_level(expand, None, root, depth=tokens.shape[1], size=size, budget=budget)
