"""How much of every request's draft is verified: pure functions from survival probabilities.

The nodes of all running requests compete for one batch budget. A row is described by its
survival probabilities `[R, J]`: column j is the chance that node j + 1 of its tree is on the
path that the target takes (the root, node 0, is always verified). They never rise along a
row, so what a rule keeps of a row is a beginning of it, and trees are nested in that: a chain
becomes shorter, a tree narrower.

Rules for one row alone are `drafters.confidence.confident_prefix` (per-slot threshold) and
`surviving_prefix` (longest prefix under a budget and a survival threshold).

Losslessness (DSpark, arXiv 2607.05147, section 3.3 and appendix A). Trees verified by
sample-then-match may be cut by any rule: they are fixed before the target chooses. Chains that
were *drawn* from the drafter and are verified by rejection sampling may not: whether slot j is
verified must not depend on the drawn token at j or later ones. `admit` ranks slots under a
budget that comes from elsewhere, which is safe. `best_size` over the *current* draft's survival
is not; over that of earlier rounds it is. `tests/decoding/test_budget.py` enumerates all cases.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxspec.trees.tree import DraftTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepTimes:
    """Seconds of a round by what it verifies: a staircase, as shapes are static.

    A round that verifies T nodes in all, at most n of one row, costs `seconds[i]` of the first
    size i with `totals[i] >= T` and `per_row[i] >= n`.

    Attributes:
      totals: [n] int32, ascending; nodes of all rows together, roots included.
      per_row: [n] int32, ascending; nodes of one row, root included.
      seconds: [n] float32. The first size has room for the roots alone, and its time leaves
        drafting out; the others include it.
    """

    totals: jax.Array
    per_row: jax.Array
    seconds: jax.Array


def survival(tree: DraftTree) -> Float[Array, "B drafted"]:
    """Survival probabilities [B, N - 1] of the drafted nodes, from their scores.

    Scores that are not sorted along the nodes (`best_first`) count as their running minimum.
    """
    scores = jnp.where(tree.valid, tree.scores, -jnp.inf)[:, 1:]
    return jnp.exp(jax.lax.cummin(jnp.minimum(scores, 0.0), axis=1))


def admit(
    survival: Float[Array, "R J"], nodes: Int[Array, ""] | int, per_row: Int[Array, ""] | int
) -> Int[Array, " R"]:
    """How many nodes of each row are among the `nodes` most likely ones of the batch.

    Args:
      survival: [R, J], never rising along a row; rows that take no part are 0.
      nodes: scalar int32, drafted nodes to admit in all.
      per_row: scalar int32, at most this many of one row.

    Returns:
      [R] int32.
    """
    rank = _rank(jnp.where(jnp.arange(survival.shape[1]) < per_row, survival, 0.0))
    taken = (rank < nodes) & (survival > 0) & (jnp.arange(survival.shape[1]) < per_row)
    return taken.sum(axis=1, dtype=jnp.int32)


def best_size(
    survival: Float[Array, "R J"], rows: Int[Array, ""] | int, times: StepTimes
) -> Int[Array, ""]:
    """The size with the most expected tokens per second: an index into `times`.

    Every row commits its accepted nodes and one token more, so a size of T nodes is worth
    (rows + the sum of the T - rows best survivals) / seconds. All sizes are compared: along a
    staircase one more node often pays only if a whole step is filled.

    Args:
      survival: [R, J]; for drawn chains it must not be the current draft's (see the module).
      rows: scalar int32, rows that are running.
    """

    def expected(total, per_row):
        taken = jnp.where(jnp.arange(survival.shape[1]) < per_row - 1, survival, 0.0)
        best = -jnp.sort(-taken, axis=None)
        inside = jnp.arange(best.shape[0]) < total - rows
        return rows + jnp.sum(jnp.where(inside, best, 0.0))

    tokens = jax.vmap(expected)(times.totals, times.per_row)
    rate = jnp.where(times.totals >= rows, tokens / times.seconds, -jnp.inf)
    return jnp.argmax(rate).astype(jnp.int32)


def _rank(survival: jax.Array) -> jax.Array:
    """Place of every node among all, likeliest first: [R, J] int32.

    Ties go to the earlier node, then to the earlier row, never by what the tokens are.
    """
    rows, nodes = survival.shape
    order = jnp.argsort(-survival.T.ravel(), stable=True)
    rank = jnp.zeros(rows * nodes, jnp.int32).at[order].set(jnp.arange(rows * nodes))
    return rank.reshape(nodes, rows).T
