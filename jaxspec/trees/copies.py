"""Copies of earlier text behind every node of a tree: prompt lookup after every path.

What followed the end of a node's path, where it stands earlier in the text, may follow the
node. With x the first token of this copy, w its weight by the number of tokens that match, and
q the drafter's probability, a child's probability is

    w [child = x] + (1 - w) q(child)

so a copy may follow drafted tokens, and raises the drafted child that it agrees with.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxspec.trees.levels import ROOT, best_nodes
from jaxspec.trees.tree import DraftTree, ancestors, unpack_bits


def with_copies(
    tree: DraftTree,
    text: Int[Array, "B S"],
    last: Int[Array, " B"],
    *,
    weights: Float[Array, " L"],
    depth: int,
    budget: Int[Array, " B"],
) -> DraftTree:
    """The best nodes of a tree and of the copies behind its nodes, best first.

    Args:
      tree: of N nodes, as is the result; its scores are log-probabilities.
      text: decided up to index `last`, the anchor's, included.
      weights: of a copy's first token after 1, 2, … L or more equal tokens, below 1, 0 for no
        copy; before each further token of the copy one more token is equal.
      depth: D, levels below the anchor that copies may reach.
      budget: [B] int32, at most this many nodes per row, the root included.
    """
    above = unpack_bits(ancestors(tree), tree.size)
    copies = find_copies(tree, above, text, last, longest=len(weights), depth=depth)
    batch, size = tree.tokens.shape
    rows, node = jnp.arange(batch)[:, None], jnp.arange(size)
    first = jnp.where(copies.length > 0, weights[copies.length - 1], 0.0)

    # The tree's own nodes.
    drafted = (tree.scores > -jnp.inf) & (node > 0)
    parents = jnp.maximum(tree.parents, 0)
    copied = drafted & (copies.tokens[rows, parents, 0] == tree.tokens)  # behind their parents
    weight = first[rows, parents]
    gain = jnp.log1p(-weight) + tree.scores - tree.scores[rows, parents]
    gain = jnp.where(copied, jnp.logaddexp(gain, jnp.log(weight)), gain)
    gain = jnp.where(drafted, jnp.minimum(gain, 0.0), 0.0)
    scores = jnp.sum(jnp.where(above, gain[:, None], 0.0), axis=-1)  # along the path
    scores = jnp.where(drafted | (node == 0), scores, -jnp.inf)

    # The copies that do not begin with a child of their node.
    is_child = jnp.any((parents[:, None] == node[:, None]) & copied[:, None], axis=-1)
    place = jnp.arange(depth)
    levels = tree.depths[..., None] + 1 + place
    real = ((copies.length > 0) & ~is_child)[..., None] & (levels <= depth)
    length = jnp.minimum(copies.length[..., None] + place, len(weights))
    shares = jnp.cumsum(jnp.log(weights[length - 1]), axis=-1)
    behind = jnp.where(real, scores[..., None] + shares, -jnp.inf)  # [B, N, D]
    # Nodes without the root: the tree's, then all copies one after another.
    number = size - 1 + node[:, None] * depth + place
    starts = jnp.where(node == 0, ROOT, node - 1)
    parents_behind = jnp.where(place == 0, starts[:, None], number - 1)

    def join(own, behind):
        behind = jnp.broadcast_to(behind, (batch, size, depth)).reshape(batch, -1)
        return jnp.concatenate([own[:, 1:], behind], axis=1)

    return best_nodes(
        tree.tokens[:, 0],
        join(tree.tokens, copies.tokens),
        join(jnp.where(tree.parents == 0, ROOT, tree.parents - 1), parents_behind),
        join(tree.depths, levels),
        join(scores, behind),
        size=size,
        budget=budget,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Copies:
    """What followed the longest, of these the latest, match of the end of each node's path.

    Attributes:
      tokens: [B, N, D] int32.
      length: [B, N] int32, tokens that match, up to L; 0: there is no copy.
    """

    tokens: jax.Array
    length: jax.Array


def find_copies(
    tree: DraftTree,
    above: Bool[Array, "B N N"],
    text: Int[Array, "B S"],
    last: Int[Array, " B"],
    *,
    longest: int,
    depth: int,
) -> Copies:
    """The copies behind every valid node above depth D.

    Args:
      above: whether node j of [B, i, j] is node i or above it.
      text, last, depth: as in `with_copies`.
      longest: L.
    """
    capacity = text.shape[1]
    level = jnp.arange(1, depth + 1)
    at = above[..., None] & (tree.depths[:, None, :, None] == level)  # [B, N, N, D]
    paths = jnp.max(jnp.where(at, tree.tokens[:, None, :, None], -1), axis=2)
    shape = (*tree.tokens.shape, capacity)
    end = (last[:, None] + tree.depths)[..., None]  # where the node stands behind the text

    def token(index):  # of a node's path, behind the text: [B, N, X] for indices [B, N, X]
        below = index - last[:, None, None]
        clipped = jnp.minimum(index, capacity - 1), jnp.clip(below - 1, 0, depth - 1)
        in_text = jnp.take_along_axis(jnp.broadcast_to(text[:, None], shape), clipped[0], -1)
        return jnp.where(below > 0, jnp.take_along_axis(paths, clipped[1], -1), in_text)

    index = jnp.broadcast_to(jnp.arange(capacity + depth), (*shape[:2], capacity + depth))
    tokens, suffix = token(index), token(jnp.maximum(end - jnp.arange(longest), 0))
    length = common_suffixes(tokens, suffix, end)
    best = jnp.argmax(length * index.shape[-1] + index, axis=-1)[..., None]
    length = jnp.take_along_axis(length, best, axis=-1)[..., 0]
    # A match that overlaps the end is a repetition: go on repeating it.
    period = jnp.maximum(end - best, 1)
    following = token(best + 1 + jnp.arange(depth) % period)
    return Copies(following, jnp.where(tree.valid & (tree.depths < depth), length, 0))


def common_suffixes(
    tokens: Int[Array, "*L X"], suffix: Int[Array, "*L K"], end: Int[Array, "*L 1"]
) -> Int[Array, "*L X"]:
    """How many tokens up to every earlier place equal the last ones: up to K.

    Args:
      suffix: the last tokens, the last one first.
      end: index of the last token; places from it on have 0.
    """
    place = jnp.arange(tokens.shape[-1])
    length, unbroken = jnp.zeros(tokens.shape, jnp.int32), place < end
    for back in range(suffix.shape[-1]):
        same = jnp.roll(tokens, back, axis=-1) == suffix[..., back, None]
        unbroken &= same & (place >= back) & (end >= back)
        length += unbroken
    return length
