"""Nodes of a batch of trees side by side, padding left out.

A forward's cost is mostly per node: norms, projections, MLP, logits. With trees of different
sizes in a batch, those run over the T nodes there are, and only attention, which needs to know
whose cache a node reads, over the rectangle of B rows and N nodes::

    row 0: a b c .                                  place   0 1 2 -
    row 1: d . . .    nodes   a b c d e f -         (of a   3 - - -
    row 2: e f . .    index   0 1 2 4 8 9 -          node)  4 5 - -
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packing:
    """Maps nodes of a rectangle [B, N] to a packed axis of T, and back.

    Absent nodes, on either side, read entry 0: finite numbers that are not used.

    Attributes:
      index: [T] int32, into B * N.
      place: [B, N] int32, into T.
    """

    index: jax.Array
    place: jax.Array

    @property
    def rows(self) -> Int[Array, " T"]:
        """Row of each packed node, [T] int32."""
        return self.index // self.place.shape[1]

    def gather(self, x: Shaped[Array, "B N ..."]) -> Shaped[Array, "1 T ..."]:
        """[B, N, ...] -> [1, T, ...]."""
        return x.reshape(-1, *x.shape[2:])[self.index][None]

    def spread(self, x: Shaped[Array, "1 T ..."]) -> Shaped[Array, "B N ..."]:
        """[1, T, ...] -> [B, N, ...]."""
        return x[0][self.place]


def pack_nodes(present: Bool[Array, "B N"], total: int) -> Packing:
    """Packs the nodes `present` [B, N], row by row; at most `total`, T, of them."""
    flat = present.ravel()
    place = jnp.where(flat, jnp.cumsum(flat) - 1, 0)
    (index,) = jnp.nonzero(flat, size=total, fill_value=0)
    return Packing(index.astype(jnp.int32), place.reshape(present.shape).astype(jnp.int32))
