"""Blocks of known sequences: where they start, what they are judged on, their forward pass."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxspec.config import DrafterConfig
from jaxspec.drafters.head import DraftHead, Vocabulary
from jaxspec.drafters.teacher_forced import BlockOutput


def sample_anchors(
    key: jax.Array, supervised: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    """Anchors drawn without replacement, uniformly, in ascending order.

    A position may be an anchor if it and the next are supervised: the first token of an answer
    comes from the prompt's own forward, so it is never drafted.

    Args:
      key: consumed.
      supervised: [B, T] bool, tokens the target wrote.
      count: A.

    Returns:
      anchors [B, A] int32, and which of them are real, [B, A] bool; the others, where a
      sequence has too few candidates, are 0.
    """
    length = supervised.shape[1]
    possible = supervised & jnp.pad(supervised[:, 1:], [(0, 0), (0, 1)])
    lots = jnp.where(possible, jax.random.uniform(key, possible.shape), -1.0)
    drawn, anchors = jax.lax.top_k(lots, min(count, length))
    anchors = jnp.sort(jnp.where(drawn >= 0, anchors, length), axis=1)
    anchors = jnp.pad(anchors, [(0, 0), (0, count - anchors.shape[1])], constant_values=length)
    kept = anchors < length
    return jnp.where(kept, anchors, 0).astype(jnp.int32), kept


def supervised_slots(
    supervised: jax.Array, anchors: jax.Array, kept: jax.Array, depth: int
) -> jax.Array:
    """Slots whose label, and all labels before it in the block, are supervised: [B, A, P].

    Args:
      supervised: [B, T] bool.
      anchors, kept: [B, A], from `sample_anchors`.
    """
    length = supervised.shape[1]
    at = anchors[..., None] + 1 + jnp.arange(depth)
    label = take(supervised, jnp.minimum(at, length - 1)) & (at < length)
    return jnp.cumprod(label & kept[..., None], axis=-1).astype(bool)


def before_labels(hidden: jax.Array, anchors: jax.Array, depth: int) -> jax.Array:
    """The target's hidden state that decides each label: [B, T, M] -> [B, A, P, M]."""
    at = anchors[..., None] + jnp.arange(depth)
    return take(hidden, jnp.minimum(at, hidden.shape[1] - 1))


def run_blocks(
    head: DraftHead,
    vocabulary: Vocabulary,
    tokens: jax.Array,
    features: jax.Array,
    anchors: jax.Array,
    *,
    chunk: int = 32,
) -> BlockOutput:
    """Runs the head on one block per anchor, as `drafters.teacher_forced.run_blocks` does.

    Attention runs over `chunk` anchors of every sequence at a time and is recomputed in the
    backward pass, so that memory holds chunk · T scores per slot and head, not A · T.

    Args:
      tokens: [B, T] int32.
      features: [B, T, len(taps) * M].
      anchors: [B, A] int32.
    """
    config, length = head.config, tokens.shape[1]
    at = anchors[..., None] + jnp.arange(config.depth + 1)  # [B, A, P + 1]
    known = take(tokens, jnp.minimum(at, length - 1))
    positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    context = head.context(features, positions)
    dtype = head.fc[...].dtype
    context = jax.tree.map(lambda x: x.astype(dtype), context)

    def attend(layer, q, k, v):
        keys, values = context.keys[layer], context.values[layer]
        q, k, v = (x.astype(dtype) for x in (q, k, v))
        return block_attention(config, q, k, v, keys, values, anchors, chunk=chunk)

    return BlockOutput(
        stream=head.stream(vocabulary, known[..., 0], anchors, attend),
        previous=known[..., :-1],
        labels=known[..., 1:],
        inside=at[..., 1:] < length,
    )


def block_attention(
    config: DrafterConfig,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    context_keys: jax.Array,
    context_values: jax.Array,
    anchors: jax.Array,
    *,
    chunk: int,
) -> jax.Array:
    """Every block attends to the context strictly before its anchor, and to itself.

    The two parts are scored apart, each with its own small mask, and merged by log-sum-exp.

    Args:
      q: [B, A, b, H, D]; k, v: [B, A, b, K, D], of the blocks.
      context_keys, context_values: [B, T, K, D].
      anchors: [B, A] int32.
      chunk: anchors per sequence scored at a time.

    Returns:
      [B, A, b, H, D] float32.
    """
    batch, count = anchors.shape
    size = min(chunk, count)
    parts = -(-count // size)

    def split(x):
        pad = [(0, 0)] * x.ndim
        pad[1] = (0, parts * size - count)
        return jnp.moveaxis(jnp.pad(x, pad).reshape(batch, parts, size, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def some(q, k, v, anchors):
        return _attend(config, q, k, v, context_keys, context_values, anchors)

    if parts == 1:
        return some(q, k, v, anchors)
    out = jax.lax.map(lambda part: some(*part), jax.tree.map(split, (q, k, v, anchors)))
    out = jnp.moveaxis(out, 0, 1)
    return out.reshape(batch, parts * size, *out.shape[3:])[:, :count]


def _attend(config: DrafterConfig, q, k, v, context_keys, context_values, anchors):
    block, length = q.shape[2], context_keys.shape[1]
    q = q.reshape(*q.shape[:3], config.num_kv_heads, config.group_size, -1)
    slot = jnp.arange(block)
    before = jnp.arange(length) < anchors[..., None, None]  # [B, A, 1, T]
    within = slot[:, None] >= slot if config.causal else jnp.ones((block, block), bool)
    if config.window is not None:
        oldest = anchors[..., None] + slot - config.window + 1  # [B, A, b]
        before = before & (jnp.arange(length) >= oldest[..., None])
        within = within & (slot > slot[:, None] - config.window)

    def product(spec, x, y):
        return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)

    def scores(spec, keys, mask):
        masked = jnp.where(mask[..., None, None, :, :], product(spec, q, keys), -jnp.inf)
        return config.head_dim**-0.5 * masked

    far = scores("baikgd,btkd->bakgit", context_keys, before)
    near = scores("baikgd,bajkd->bakgij", k, within)
    # A slot sees itself, so the peak is finite.
    peak = jnp.maximum(far.max(-1), near.max(-1))[..., None]
    far, near = jnp.exp(far - peak), jnp.exp(near - peak)
    total = far.sum(-1) + near.sum(-1)  # [B, A, K, G, b]
    out = product("bakgit,btkd->baikgd", far.astype(v.dtype), context_values)
    out += product("bakgij,bajkd->baikgd", near.astype(v.dtype), v)
    out = out / jnp.moveaxis(total, 4, 2)[..., None]
    return out.reshape(*out.shape[:3], config.num_heads, -1)


def take(rows: jax.Array, index: jax.Array) -> jax.Array:
    """rows [B, T, ...] at positions [B, ...]."""
    return jax.vmap(lambda row, at: row[at])(rows, index)
