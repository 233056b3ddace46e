"""Copies of earlier text as children of a tree's nodes: prompt lookup after every path.

What followed the last tokens of a node's path, where they stand earlier in the text, may follow
the node. With w the weight of such a copy x, by the number of tokens that match, and q the
drafter's distribution after the node, a child's probability is

    w [child = x] + (1 - w) q(child)

so that a copy may follow drafted tokens, drafted tokens a copy, and each counts for the other.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxspec.trees.tree import known
from pallas_kernels.tree_level import Levels, with_row


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Copies:
    """The copied child of each of the first M nodes of a level.

    Attributes:
      tokens: [B, M] int32.
      weights: [B, M] float32, below 1; 0 where there is no copy.
    """

    tokens: jax.Array
    weights: jax.Array

    def rest(self, levels: Levels, slot: jax.Array) -> Levels:
        """The levels with the scores of row `slot` times 1 - w, for the drafter's children."""
        share = jnp.log1p(-self.weights)
        scores = levels.scores.at[:, slot, : share.shape[1]].add(share)
        return dataclasses.replace(levels, scores=scores)

    def beside(self, levels: Levels, slot: jax.Array, drafted: Levels) -> Levels:
        """The levels with row slot + 1: the best of copies and of the drafter's children.

        A copy outside the F best children of a level counts without its q.

        Args:
          drafted: `rest`, with its row slot + 1.
        """
        width = levels.scores.shape[-1]
        above = levels.scores[:, slot, : self.tokens.shape[1]]
        scores, parents, tokens = (
            x[:, slot + 1] for x in (drafted.scores, drafted.parents, drafted.tokens)
        )
        node = jnp.broadcast_to(jnp.arange(above.shape[1]), above.shape)
        copied = above + jnp.log(self.weights)
        twin = (parents[:, None] == node[..., None]) & (
            tokens[:, None] == self.tokens[..., None]
        )
        twin &= (copied > -jnp.inf)[..., None]  # [B, M, F]
        own = jnp.max(jnp.where(twin, scores[:, None], -jnp.inf), axis=-1)
        copied = jnp.minimum(jnp.logaddexp(copied, own), above)
        scores = jnp.where(twin.any(1), -jnp.inf, scores)
        scores, place = lax.top_k(known(jnp.concatenate([scores, copied], axis=1)), width)

        def best(drafted, copied):
            return jnp.take_along_axis(jnp.concatenate([drafted, copied], 1), place, axis=1)

        return with_row(levels, slot, scores, best(parents, node), best(tokens, self.tokens))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Matches:
    """Where a text and the paths of n nodes of one depth agree with a node's path.

    A place is an index of the text, 0 … S - 1, or S + i, the node's own path at depth i + 1, so
    that a repetition goes on.

    Attributes:
      text: [B, S] int32; -1 past the anchor.
      last: [B] int32, the anchor's index.
      weights: [L] float32, of a copy after 1, 2, … L or more equal tokens; below 1.
      paths: [B, n, D] int32, each node's tokens below the anchor; -1 below the node.
      runs: [B, n, S + D] int8, how many tokens up to each place, at most L, equal those up to
        the node.
    """

    text: jax.Array
    last: jax.Array
    weights: jax.Array
    paths: jax.Array
    runs: jax.Array

    @property
    def depth(self) -> int:
        """D, levels below the anchor that copies may reach."""
        return self.paths.shape[-1]

    def broadcast(self, nodes: int) -> Matches:
        """The matches of the anchor, for `nodes` nodes."""

        def wide(x):
            return jnp.broadcast_to(x, (x.shape[0], nodes, x.shape[-1]))

        return dataclasses.replace(self, paths=wide(self.paths), runs=wide(self.runs))

    def copies(self) -> Copies:
        """What followed the longest, then latest match of each node."""
        size, places = self.text.shape[1], self.runs.shape[-1]
        rank = self.runs.astype(jnp.int32) * places + jnp.arange(places)
        place = jnp.argmax(rank, axis=-1)[..., None]
        length = jnp.take_along_axis(self.runs, place, axis=-1)[..., 0].astype(jnp.int32)
        after = jnp.where(place == self.last[:, None, None], size, place + 1)
        in_text = jnp.take_along_axis(self.text[:, None], jnp.minimum(after, size - 1), axis=-1)
        in_path = jnp.take_along_axis(self.paths, jnp.maximum(after - size, 0), axis=-1)
        tokens = jnp.where(after < size, in_text, in_path)[..., 0]
        weights = self.weights[jnp.maximum(length - 1, 0)]
        return Copies(tokens, jnp.where(length > 0, weights, 0.0))

    def follow(
        self, slot: jax.Array, parents: Int[Array, "B m"], tokens: Int[Array, "B m"]
    ) -> Matches:
        """The matches of nodes at depth slot + 1, children of the nodes `parents`."""
        size, rows = self.text.shape[1], jnp.arange(parents.shape[0])[:, None]
        paths, runs = self.paths[rows, parents], self.runs[rows, parents]
        at_anchor = jnp.take_along_axis(runs, self.last[:, None, None], axis=-1)
        place = jnp.arange(runs.shape[-1])
        before = jnp.where(place == size, at_anchor, jnp.roll(runs, 1, axis=-1))
        before = jnp.where(place == 0, 0, before)
        text = jnp.broadcast_to(self.text[:, None], (*parents.shape, size))
        same = jnp.concatenate([text, paths], axis=-1) == tokens[..., None]
        runs = jnp.where(same, jnp.minimum(before + 1, len(self.weights)), 0).astype(jnp.int8)
        paths = jnp.where(jnp.arange(self.depth) == slot, tokens[..., None], paths)
        return dataclasses.replace(self, paths=paths, runs=runs)


def common_suffixes(
    text: Int[Array, "B S"], last: Int[Array, " B"], longest: int
) -> Int[Array, "B S"]:
    """How many tokens up to each earlier place equal those up to the anchor: int32 [B, S].

    Args:
      text: decided up to index `last`, the anchor's, included.
      longest: more tokens count as so many.
    """
    last = last[:, None]
    end = jnp.arange(text.shape[1])
    length, unbroken = jnp.zeros(text.shape, jnp.int32), end < last
    for back in range(longest):
        token = jnp.take_along_axis(text, jnp.maximum(last - back, 0), axis=1)
        unbroken &= (jnp.roll(text, back, axis=1) == token) & (end >= back) & (last >= back)
        length += unbroken
    return length


def matches(
    text: Int[Array, "B S"],
    last: Int[Array, " B"],
    *,
    weights: Float[Array, " L"],
    depth: int,
) -> Matches:
    """The matches of the anchor, n = 1, for trees of `depth` levels.

    Args:
      text: decided up to index `last`, the anchor's, included.
      weights: see `Matches`.
    """
    runs = common_suffixes(text, last, len(weights)).astype(jnp.int8)
    return Matches(
        text=jnp.where(jnp.arange(text.shape[1]) <= last[:, None], text, -1),
        last=last,
        weights=weights,
        paths=jnp.full((len(text), 1, depth), -1, jnp.int32),
        runs=jnp.pad(runs, [(0, 0), (0, depth)])[:, None],
    )
