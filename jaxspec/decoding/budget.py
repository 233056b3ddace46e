"""How much of every request's draft is verified: pure functions from survival probabilities.

The nodes of all running requests compete for one batch budget. A row is described by its
survival probabilities `[R, J]`: column j is the probability that node j + 1 of its tree is on
the path that the target takes (the root, node 0, is always verified). They never increase
along a row, so a rule keeps a prefix of each row, and smaller trees are nested in larger ones:
a chain becomes shorter, a tree narrower.

Rules for a single row are `drafters.confidence.confident_prefix` (per-slot threshold) and
`surviving_prefix` (survival threshold).

Losslessness (DSpark, arXiv 2607.05147, section 3.3 and appendix A). Trees verified by
sample-then-match may be cut by any rule: they are fixed before the target chooses. Chains that
were *drawn* from the drafter and are verified by rejection sampling may not: whether slot j is
verified must not depend on the drawn token at j or later ones. `admit` ranks slots under a
given budget, which is safe. `best_size` over the *current* draft's survival is not safe; over
earlier rounds' it is. `tests/decoding/test_budget.py` enumerates all cases.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxspec.decoding.staircase import Staircase
from jaxspec.trees.tree import DraftTree


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
      survival: [R, J], never increasing along a row; 0 in rows that take no part.
      nodes: scalar int32, drafted nodes to admit in all.
      per_row: scalar int32, at most this many of one row.

    Returns:
      [R] int32.
    """
    rank = _rank(jnp.where(jnp.arange(survival.shape[1]) < per_row, survival, 0.0))
    taken = (rank < nodes) & (survival > 0) & (jnp.arange(survival.shape[1]) < per_row)
    return taken.sum(axis=1, dtype=jnp.int32)


def best_size(
    survival: Float[Array, "R J"], rows: Int[Array, ""] | int, staircase: Staircase
) -> Int[Array, ""]:
    """The size with the most expected tokens per second: an index into `staircase`.

    Every row commits its accepted nodes and one more token, so a size of T nodes commits
    (rows + the sum of the T - rows largest survivals) / seconds. All sizes are compared, since
    along a staircase one more node often pays only if it fills a whole step.

    Args:
      survival: [R, J]; for drawn chains it must not be the current draft's (see the module).
      rows: scalar int32, rows that are running.
    """

    def expected(total, per_row):
        taken = jnp.where(jnp.arange(survival.shape[1]) < per_row - 1, survival, 0.0)
        best = -jnp.sort(-taken, axis=None)
        inside = jnp.arange(best.shape[0]) < total - rows
        return rows + jnp.sum(jnp.where(inside, best, 0.0))

    tokens = jax.vmap(expected)(staircase.totals, staircase.per_row)
    rate = jnp.where(staircase.totals >= rows, tokens / staircase.seconds, -jnp.inf)
    return jnp.argmax(rate).astype(jnp.int32)


def _rank(survival: jax.Array) -> jax.Array:
    """Rank of every node among all, likeliest first: [R, J] int32.

    Ties go to the earlier node, then to the earlier row, and never depend on tokens.
    """
    rows, nodes = survival.shape
    order = jnp.argsort(-survival.T.ravel(), stable=True)
    rank = jnp.zeros(rows * nodes, jnp.int32).at[order].set(jnp.arange(rows * nodes))
    return rank.reshape(nodes, rows).T
