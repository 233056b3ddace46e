"""Tree attention in plain XLA: the contract of all implementations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

WORD_BITS = 32


def tree_attention_reference(
    q: Float[Array, "B N H D"],
    k_cache: Float[Array, "B K S D"],
    v_cache: Float[Array, "B K S D"],
    lengths: Int[Array, " B"],
    k_new: Float[Array, "B N K D"],
    v_new: Float[Array, "B N K D"],
    ancestors: UInt32[Array, "B N W"],
    *,
    scale: float,
    depths: Int[Array, "B N"] | None = None,
    window: int | None = None,
) -> Float[Array, "B N H D"]:
    """Attention of N tree nodes over a committed prefix and over their ancestors.

    One softmax runs over both parts: their scores are computed separately and merged by
    log-sum-exp, in float32. Neither the cache nor the new rows are copied.

    Args:
      q: [B, N, H, D], rotated queries.
      k_cache, v_cache: [B, K, S, D], rotated keys and values of the prefix.
      lengths: [B] int32; cache rows at or past a row's length are not seen.
      k_new, v_new: [B, N, K, D], keys and values of the nodes themselves.
      ancestors: [B, N, ceil(N / 32)] uint32; bit j of row i: node i sees node j. Every node
        must see itself.
      scale: multiplies the scores.
      depths: [B, N] int32, distance of each node from the root; needed with `window`.
      window: sliding window: a node at position p sees positions p - window + 1 … p, where
        a node stands at `lengths + depths`.

    Returns:
      [B, N, H, D] in the dtype of q.
    """
    batch, n, heads, _ = q.shape
    kv_heads, capacity = k_cache.shape[1], k_cache.shape[2]
    group = heads // kv_heads
    rows = head_groups(q, kv_heads).astype(k_cache.dtype)

    visible = jnp.arange(capacity) < lengths[:, None, None]  # [B, 1, S]
    related = related_nodes(ancestors, n)
    if window is not None:
        position = lengths[:, None] + depths  # [B, N]
        oldest = position - window + 1
        visible = visible & (jnp.arange(capacity) >= oldest[..., None])  # [B, N, S]
        related = related & (position[:, None, :] >= oldest[..., None])

    def scores(keys, spec, mask):
        s = scale * jnp.einsum(spec, rows, keys, preferred_element_type=jnp.float32)
        mask = jnp.broadcast_to(mask, (batch, n, s.shape[-1]))
        mask = jnp.repeat(mask, group, axis=1)[:, None]  # node-major rows: [B, 1, N*G, .]
        return jnp.where(mask, s, -jnp.inf)

    prefix = scores(k_cache, "bkrd,bksd->bkrs", visible)  # [B, K, N*G, S]
    tree = scores(k_new.astype(k_cache.dtype), "bkrd,bnkd->bkrn", related)  # [B, K, N*G, N]
    # The tree part is never empty (a node sees itself), so the peak is finite.
    peak = jnp.maximum(prefix.max(-1), tree.max(-1))[..., None]
    prefix, tree = jnp.exp(prefix - peak), jnp.exp(tree - peak)
    total = prefix.sum(-1) + tree.sum(-1)
    out = jnp.einsum(
        "bkrs,bksd->bkrd",
        prefix.astype(v_cache.dtype),
        v_cache,
        preferred_element_type=jnp.float32,
    ) + jnp.einsum(
        "bkrn,bnkd->bkrd",
        tree.astype(v_cache.dtype),
        v_new.astype(v_cache.dtype),
        preferred_element_type=jnp.float32,
    )
    return nodes_apart(out / total[..., None], n).astype(q.dtype)


def head_groups(q: jax.Array, kv_heads: int) -> jax.Array:
    """[B, N, H, D] -> [B, K, N*G, D]: queries of one key/value head, for one matrix product."""
    batch, n, heads, dim = q.shape
    rows = q.reshape(batch, n, kv_heads, heads // kv_heads, dim).transpose(0, 2, 1, 3, 4)
    return rows.reshape(batch, kv_heads, -1, dim)


def nodes_apart(rows: jax.Array, n: int) -> jax.Array:
    """The inverse of `head_groups`."""
    batch, kv_heads, _, dim = rows.shape
    out = rows.reshape(batch, kv_heads, n, -1, dim).transpose(0, 2, 1, 3, 4)
    return out.reshape(batch, n, -1, dim)


def related_nodes(ancestors: jax.Array, n: int) -> jax.Array:
    """[B, N, N] bool: node i sees node j."""
    bits = (ancestors[..., None] >> jnp.arange(WORD_BITS, dtype=jnp.uint32)) & 1
    return bits.reshape(*ancestors.shape[:2], -1)[..., :n] == 1
