"""The gated delta rule over a tree in plain XLA: the kernel's contract.

Letters: J key heads, R value heads per key head, dk and dv dimensions of a key and a value.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt32

from pallas_kernels.tree_attention.reference import related_nodes

LARGEST_DECAY = 128.0  # exp of less is 0 in float32


def tree_delta_rule_reference(
    q: Float[Array, "B N J dk"],
    k: Float[Array, "B N J dk"],
    v: Float[Array, "B N J R dv"],
    decay: Float[Array, "B N J R"],
    rate: Float[Array, "B N J R"],
    memory: Float[Array, "B J dk Rdv"],
    ancestors: UInt32[Array, "B N words"],
    begun: Bool[Array, " B"],
) -> tuple[Float[Array, "B N J R dv"], Float[Array, "B N J R dv"]]:
    """Outputs and updates (O, U), float32, of every node, from the memory and its ancestors.

    With S0 the memory, G_i the sum of g over i and its ancestors, and D_ij = exp(G_i - G_j)
    where j is i or above it, else 0:

        A_ij = beta_i D_ij (k_i . k_j)  for j above i, else 0
        (I + A) U = beta (V - exp(G) K S0)
        O = exp(G) (Q S0) + (D * (Q K^T)) U

    Args:
      decay, rate: g <= 0 and beta.
      memory: S0, the value heads of a key head concatenated.
      ancestors: bits, ancestor-or-self; parents come before children.
      begun: whether there is a memory before the roots; if not, it counts as zeros.

    Source: arXiv 2412.06464, its recurrence unrolled along the ancestors of a node.
    """
    with jax.default_matmul_precision("highest"):
        n = q.shape[1]
        related = related_nodes(ancestors, n)
        rate = jnp.moveaxis(rate, 1, -1)[..., None]  # [B, J, R, N, 1]
        kept, from_root = decays_along(decay, related, begun)  # D and exp(G)

        # The state is read once, by keys and queries together.
        both = jnp.concatenate([k, q], axis=1)  # [B, 2 N, J, dk]
        recalled = jnp.einsum("bnjd,bjde->bjne", both, memory)
        recalled = jnp.moveaxis(recalled.reshape(*recalled.shape[:3], *v.shape[3:]), 3, 2)
        recalled = recalled * jnp.concatenate([from_root, from_root], axis=-2)

        # k . k and q . k in one product. Without the barrier XLA would join it with the one
        # above, which reads `both` too, and copy the state beside the keys.
        alike = jnp.einsum("bnjd,bkjd->bjnk", jax.lax.optimization_barrier(both), k)
        overlap, seen = alike[:, :, None, :n], alike[:, :, None, n:]
        above = related & (jnp.arange(n)[:, None] != jnp.arange(n))
        below = rate * jnp.where(above[:, None, None], kept * overlap, 0.0)  # A
        wanted = rate * (jnp.moveaxis(v, 1, 3) - recalled[..., :n, :])
        updates = wanted if n == 1 else solve(below, wanted)
        scores = kept * seen
        out = recalled[..., n:, :] + jnp.einsum("bjrik,bjrke->bjrie", scores, updates)
        return jnp.moveaxis(out, 3, 1), jnp.moveaxis(updates, 3, 1)


def decays_along(
    decay: jax.Array, related: jax.Array, begun: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Decay of each node's update at its descendants, and of the state before the root.

    Args:
      related: [B, N, N] bool, [i, j]: node j is node i or above it.

    Returns:
      D [B, J, R, N, N] and exp(G) [B, J, R, N, 1], 0 where nothing is before the root.
    """
    sums = decay_sums(decay, related)
    between = jnp.sum(sums[..., :, None] - sums[..., None, :], axis=0)
    kept = jnp.exp(jnp.where(related[:, None, None], between, -jnp.inf))
    begun = begun[:, None, None, None, None]
    return kept, jnp.where(begun, jnp.exp(sums.sum(axis=0))[..., None], 0.0)


def decay_sums(decay: jax.Array, related: jax.Array) -> jax.Array:
    """G [B, J, R, N] of g [B, N, J, R] in two parts: [2, B, J, R, N].

    Differences of float32 sums would lose terms that are small beside the sums. So decays are
    split into a coarse part, a multiple of a step so large that sums of N are exact, and a
    rest, whose sums are small. Differences are taken of each part separately.
    """
    n = decay.shape[1]
    decay = jnp.maximum(jnp.moveaxis(decay, 1, -1), -LARGEST_DECAY)
    step = coarse_step(n)
    coarse = jnp.round(decay / step) * step
    parts = jnp.stack([coarse, decay - coarse])
    own = related.astype(jnp.float32)
    return jnp.einsum("bik,sbjrk->sbjri", own, parts, precision="highest")


def coarse_step(n: int) -> float:
    """The step of which float32 sums of n multiples, each up to `LARGEST_DECAY`, are exact."""
    return LARGEST_DECAY * 2.0 ** (math.ceil(math.log2(n)) - 23)


def solve(below: jax.Array, wanted: jax.Array) -> jax.Array:
    """X of (I + A) X = Y, A strictly lower triangular.

    By substitution. The product (I - A)(I + A^2)(I + A^4)… would do too, but its powers grow
    like binomials where keys repeat: three of float32's seven digits are lost at depth 16, all
    at 32.
    """
    return jax.lax.linalg.triangular_solve(
        below, wanted, left_side=True, lower=True, unit_diagonal=True
    )
