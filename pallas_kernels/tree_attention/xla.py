"""Tree attention in XLA, by blocks of the prefix, for platforms without the kernel."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.tree_attention.reference import (
    head_groups,
    nodes_apart,
    related_nodes,
    tree_attention_reference,
)

BLOCK = 128  # cache rows at a time; fastest of 128, 256 and all for 1 … 32 rows on a CPU


def tree_attention_xla(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    lengths: jax.Array,
    k_new: jax.Array,
    v_new: jax.Array,
    ancestors: jax.Array,
    *,
    scale: float,
    depths: jax.Array | None = None,
    window: int | None = None,
    block: int = BLOCK,
) -> jax.Array:
    """As `tree_attention_reference`, but its cost follows the longest row, not the capacity.

    A loop over blocks of the prefix with a running softmax (as in FlashAttention) ends with the
    last row that any request sees. It has no gradient, as the number of blocks is dynamic.
    Blocks past a row's own length do not change its result, bit for bit.
    """
    batch, n, heads, _ = q.shape
    kv_heads, capacity = k_cache.shape[1:3]
    group = heads // kv_heads
    if capacity <= block:
        arrays = (q, k_cache, v_cache, lengths, k_new, v_new, ancestors)
        options = dict(scale=scale, depths=depths, window=window)
        return tree_attention_reference(*arrays, **options)
    rows = head_groups(q, kv_heads).astype(k_cache.dtype)  # [B, K, N*G, D]
    position = lengths[:, None] + (0 if depths is None else depths)  # [B, N] or [B, 1]
    oldest = jnp.zeros_like(position) if window is None else position - window + 1

    def attend(carry, keys, values, spec, mask):
        """One more part of the softmax; mask [B, N, its keys], or N = 1: all see the same."""
        peak, total, out = carry
        s = scale * jnp.einsum(
            f"bkrd,{spec}->bkrs", rows, keys, preferred_element_type=jnp.float32
        )
        mask = jnp.repeat(mask, group, axis=1) if mask.shape[1] == n else mask
        s = jnp.where(mask[:, None], s, -jnp.inf)
        higher = jnp.maximum(peak, s.max(-1, keepdims=True))
        shrink, weight = jnp.exp(peak - higher), jnp.exp(s - higher)
        more = jnp.einsum(
            f"bkrs,{spec}->bkrd",
            weight.astype(values.dtype),
            values,
            preferred_element_type=jnp.float32,
        )
        return higher, shrink * total + weight.sum(-1, keepdims=True), shrink * out + more

    def prefix(i, carry):
        at = jnp.minimum(i * block, capacity - block)
        place = at + jnp.arange(block)
        seen = (place >= i * block) & (place < lengths[:, None])
        seen = seen[:, None] & (place >= oldest[..., None])
        keys, values = (
            jax.lax.dynamic_slice_in_dim(x, at, block, axis=2) for x in (k_cache, v_cache)
        )
        return attend(carry, keys, values, "bksd", seen)

    # The nodes first: each sees itself, so the peak is finite from here on.
    zeros = jnp.zeros(rows.shape, jnp.float32)
    carry = (jnp.full_like(zeros[..., :1], -jnp.inf), zeros[..., :1], zeros)
    related = related_nodes(ancestors, n) & (position[:, None] >= oldest[..., None])
    new = (x.astype(cache.dtype) for x, cache in ((k_new, k_cache), (v_new, v_cache)))
    carry = attend(carry, *new, "bskd", related)
    reads = lengths[:, None] > 0  # a row without a prefix must not open others' windows
    first = jnp.min(oldest, where=reads, initial=capacity).clip(0) // block
    last = -(-jnp.minimum(lengths.max(), capacity) // block)
    _, total, out = jax.lax.fori_loop(first, last, prefix, carry)
    return nodes_apart(out / total, n).astype(q.dtype)
