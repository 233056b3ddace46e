"""Many blocks of a known sequence in one pass, as in training; decoding runs one at a time.

Row j of a block predicts the token at anchor + j + 1, given the target's features of all
positions before the anchor and, in the heads, the true tokens before it.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxspec.config import DrafterConfig
from jaxspec.drafters.chunks import map_chunks
from jaxspec.drafters.head import DraftHead, Vocabulary
from jaxspec.drafters.visibility import block_visibility
from jaxspec.models.layers import product


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockOutput:
    """Outputs of a head for A blocks of every sequence.

    Attributes:
      stream: [B, A, P, M], see `DraftHead`.
      previous: [B, A, P] int32, the true token before each slot's prediction.
      labels: [B, A, P] int32, the true token; past the end of the sequence, its last one.
      inside: [B, A, P] bool, the label is within the sequence.
    """

    stream: jax.Array
    previous: jax.Array
    labels: jax.Array
    inside: jax.Array

    def logits(self, head: DraftHead, vocabulary: Vocabulary) -> jax.Array:
        """Final logits, float32 [B, A, P, V'], the sequential head included."""
        base = head.logits(vocabulary, self.stream)
        if head.sequential is None:
            return base
        latent = head.teacher_forced(vocabulary, self.stream, self.previous)
        return head.correct(vocabulary, base, latent)


def run_blocks(
    head: DraftHead,
    vocabulary: Vocabulary,
    tokens: jax.Array,
    features: jax.Array,
    anchors: jax.Array,
    starts: jax.Array | None = None,
    *,
    chunk: int = 32,
) -> BlockOutput:
    """Runs the head on one block per anchor.

    Context keys and values are computed once per sequence. A block attends to itself and to the
    features strictly before its anchor, as the anchor's own feature does not exist yet when
    decoding drafts; blocks never attend to each other. Attention runs over `chunk` anchors of
    every sequence at a time and is recomputed in the backward pass, so that memory holds
    chunk · T scores per slot and head, not A · T.

    Args:
      tokens: [B, T] int32.
      features: [B, T, len(taps) * M].
      anchors: [B, A] int32, 0 … T - 1.
      starts: [B, T] int32, where a row holds several sequences: the first index of the one a
        token belongs to. Positions count from there, and a block attends to nothing before it;
        slots past the end of the sequence have labels of the next one.
    """
    config, length = head.config, tokens.shape[1]
    first = None if starts is None else take(starts, anchors)  # [B, A]
    at = anchors[..., None] + jnp.arange(config.depth + 1)  # [B, A, P + 1]
    known = take(tokens, jnp.minimum(at, length - 1))
    positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    context = head.context(features, positions if starts is None else positions - starts)
    dtype = head.fc[...].dtype
    context = jax.tree.map(lambda x: x.astype(dtype), context)

    def attend(layer, q, k, v):
        keys, values = context.keys[layer], context.values[layer]
        q, k, v = (x.astype(dtype) for x in (q, k, v))
        options = dict(layer=layer, chunk=chunk)
        return block_attention(config, q, k, v, keys, values, anchors, first, **options)

    return BlockOutput(
        stream=head.stream(
            vocabulary, known[..., 0], anchors if first is None else anchors - first, attend
        ),
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
    first: jax.Array | None = None,
    *,
    layer: int,
    chunk: int,
) -> jax.Array:
    """Every block attends to the context strictly before its anchor, and to itself.

    The two parts are scored separately, each with a small mask, and merged by log-sum-exp.

    Args:
      q: [B, A, b, H, D]; k, v: [B, A, b, K, D], of the blocks.
      context_keys, context_values: [B, T, K, D].
      anchors: [B, A] int32.
      first: [B, A] int32, the first index of the context a block sees; 0 by default.
      layer: whose visibility and window count.
      chunk: anchors per sequence scored at a time.

    Returns:
      [B, A, b, H, D] float32.
    """
    attend = functools.partial(_attend, config, layer, context_keys, context_values)
    return map_chunks(attend, q, k, v, anchors, first, size=chunk)


def _attend(
    config: DrafterConfig, layer: int, context_keys, context_values, q, k, v, anchors, first
):
    block, length = q.shape[2], context_keys.shape[1]
    q = q.reshape(*q.shape[:3], config.num_kv_heads, config.group_size, -1)
    slot = jnp.arange(block)
    before = jnp.arange(length) < anchors[..., None, None]  # [B, A, 1, T]
    if first is not None:
        before = before & (jnp.arange(length) >= first[..., None, None])
    within = block_visibility(config, layer)
    if config.window[layer] is not None:
        oldest = anchors[..., None] + slot - config.window[layer] + 1  # [B, A, b]
        before = before & (jnp.arange(length) >= oldest[..., None])

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
