"""The sizes in which rounds are compiled, and how long each takes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

NODES_AS_ROUND = 16


@dataclasses.dataclass(frozen=True)
class VerifySize:
    """Maximum nodes of a forward, over all rows and per row, roots included."""

    total: int
    per_row: int


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("seconds",), meta_fields=("sizes",)
)
@dataclasses.dataclass(frozen=True)
class Staircase:
    """Seconds of a round by the nodes it verifies: a staircase, as shapes are static.

    A round that verifies T nodes in all and at most n per row takes `seconds[i]`, for the first
    size i with `totals[i] >= T` and `per_row[i] >= n`.

    Attributes:
      sizes: ascending; static under jit.
      seconds: [n] float32. The first size holds the roots alone, and its time excludes
        drafting; the others include it.
    """

    sizes: tuple[VerifySize, ...]
    seconds: jax.Array

    @classmethod
    def of(cls, sizes: Sequence[VerifySize], seconds: Sequence[float]) -> Staircase:
        return cls(tuple(sizes), np.array(seconds, np.float32))

    @classmethod
    def guessed(cls, sizes: Sequence[VerifySize]) -> Staircase:
        """Used until times are measured: the fixed cost of a round is guessed to equal that of
        `NODES_AS_ROUND` nodes."""
        return cls.of(sizes, [1 + size.total / NODES_AS_ROUND for size in sizes])

    @property
    def totals(self) -> jax.Array:
        """[n] int32, ascending; nodes of all rows together, roots included."""
        return jnp.array([size.total for size in self.sizes])

    @property
    def per_row(self) -> jax.Array:
        """[n] int32, ascending; nodes of one row, root included."""
        return jnp.array([size.per_row for size in self.sizes])

    def only(self, i: int) -> Staircase:
        """The same sizes with times under which only size i can be chosen."""
        seconds = np.full(len(self.sizes), np.inf, np.float32)
        seconds[i] = 1.0
        return Staircase(self.sizes, seconds)

    def ends(self) -> Staircase:
        """The smallest and the largest size alone."""
        return Staircase((self.sizes[0], self.sizes[-1]), self.seconds[np.array([0, -1])])
