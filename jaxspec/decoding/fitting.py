"""Runs verification in the smallest of a few static sizes that holds the nodes.

Shapes are static, so a round with few nodes is faster only if a smaller program runs. A size
cuts the rectangle of B rows and N nodes to its first columns, and packs the nodes of all rows
into one axis if it holds fewer nodes than the rectangle.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxspec.decoding.choice import choose
from jaxspec.decoding.penalties import Written
from jaxspec.decoding.sampling import SamplingRows
from jaxspec.decoding.staircase import VerifySize
from jaxspec.decoding.state import Draft, Verdict, Verified
from jaxspec.drafters.base import Drafter
from jaxspec.trees.packing import Packing, pack_nodes
from jaxspec.trees.tree import DraftTree


def own_sizes(drafter: Drafter, tree: DraftTree) -> tuple[VerifySize, ...]:
    """The drafter's `verify_sizes` for every row, and the whole tree; ascending."""
    batch, full = tree.tokens.shape
    per_row = (*sorted(n for n in drafter.verify_sizes if n < full), full)
    return tuple(VerifySize(batch * n, n) for n in per_row)


def doubling_sizes(rows: int, per_row: int, max_nodes: int) -> tuple[VerifySize, ...]:
    """Sizes for a batch: its roots, twice, four times as many nodes, and so on.

    Args:
      rows: B.
      per_row: N, maximum nodes of a row; in all but the last size a row may have up to twice
        its share. Attention computes that many queries in every row, used or not.
      max_nodes: maximum nodes of all rows in the last size (at least two per row in any case).
    """
    most = rows * per_row
    most = min(most, max(max_nodes, 2 * rows))
    sizes, total = [VerifySize(rows, 1)], 2 * rows
    while sizes[-1].total < most:
        total = min(total, most)
        share = total if rows == 1 else 2 * total // rows
        sizes.append(VerifySize(total, per_row if total == most else min(per_row, share)))
        total *= 2
    return tuple(sizes)


def smallest(
    sizes: tuple[VerifySize, ...], tree: DraftTree, done: Bool[Array, " B"]
) -> Int[Array, ""]:
    """Index, scalar int32, of the first size that holds the trees of all running rows."""
    running = tree.valid & ~done[:, None]
    longest = jnp.max(jnp.where(running, jnp.arange(1, tree.size + 1), 1))
    totals = jnp.array([size.total for size in sizes])
    per_row = jnp.array([size.per_row for size in sizes])
    return jnp.argmax((totals >= running.sum()) & (per_row >= longest)).astype(jnp.int32)


def fitted(
    step: Callable[[Draft, Packing | None], Verdict],
    drafter: Drafter,
    draft: Draft,
    done: Bool[Array, " B"],
    sizes: tuple[VerifySize, ...],
    size: jax.Array | int,
) -> Verdict:
    """Runs step(draft, packing) on the part of the draft that `sizes[size]` holds.

    Args:
      step: verifies and accepts; returns a path as long as its draft is deep.
      done: [B] bool; rows that are done have no nodes in a packing.
      sizes: ascending.
    """
    width = min(drafter.depth, sizes[-1].per_row - 1) + 1

    def branch(size: VerifySize):
        def run(draft):
            first = lambda x: x[:, : size.per_row]  # noqa: E731
            tree, allowed = jax.tree.map(first, (draft.tree, draft.allowed))
            packing = None
            if size.total < tree.tokens.size:
                packing = pack_nodes(tree.valid & ~done[:, None], size.total)
            part = dataclasses.replace(draft, tree=tree, allowed=allowed)
            return _padded(step(part, packing), width)

        return run

    branches = [branch(size) for size in sizes]
    return branches[0](draft) if len(sizes) == 1 else jax.lax.switch(size, branches, draft)


def choose_in(
    tree: DraftTree,
    verified: Verified,
    positions: Int[Array, " B"],
    sampling: SamplingRows,
    max_depth: int,
    written: Written,
) -> Int[Array, "B N"]:
    """`choose` after every node of a tree, packed or not: [B, N] int32.

    Args:
      positions: [B] int32, absolute position of the token chosen after the root.
      written: the text before the choice after each node.
    """
    packing = verified.packing
    if packing is None:
        return choose(verified.logits, tree.depths, positions, sampling, max_depth, written)
    rows = packing.rows
    at = positions[rows] + packing.gather(tree.depths)[0]
    root = jnp.zeros((rows.shape[0], 1), jnp.int32)
    node = packing.gather(written.node)[0, :, None]
    written = dataclasses.replace(written, row=rows, node=node)
    chosen = choose(verified.logits[0][:, None], root, at, sampling, 0, written)
    return packing.spread(chosen[None, :, 0])


def _padded(verdict: Verdict, width: int) -> Verdict:
    """Pads a verdict with zeros to a path of at least `width` nodes."""
    missing = max(0, width - verdict.acceptance.path.shape[1])

    def pad(x):
        return jnp.pad(x, [(0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)])

    return jax.tree.map(lambda x: pad(x) if x.ndim > 1 else x, verdict) if missing else verdict
