"""Many blocks of a known sequence in one pass, as in training; decoding runs one at a time.

Row j of a block predicts the token at anchor + j + 1, given the target's features of all
positions before the anchor and, in the heads, the true tokens before it.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxspec.drafters.head import DraftHead, Vocabulary


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockOutput:
    """What a head says about A blocks of every sequence.

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
        """Final logits, float32 [B, A, P, V], the sequential head included."""
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
) -> BlockOutput:
    """Runs the head on one block per anchor.

    Context keys and values are computed once per sequence. A block sees the features strictly
    before its anchor, whose own the target has not computed when it drafts, and itself;
    blocks never see each other.

    Args:
      tokens: [B, T] int32.
      features: [B, T, len(taps) * M].
      anchors: [B, A] int32, positions 0 … T - 1.
    """
    config = head.config
    length, block = tokens.shape[1], config.block_size
    at = anchors[..., None] + jnp.arange(config.depth + 1)  # [B, A, P + 1]
    known = _gather(tokens, jnp.minimum(at, length - 1))
    positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    context = head.context(features, positions)

    offset = jnp.arange(block)
    seen = jnp.arange(length) < anchors[..., None, None]  # [B, A, 1, T]
    related = offset[:, None] >= offset if config.causal else jnp.ones((block, block), bool)
    if config.window is not None:
        oldest = anchors[..., None] + offset - config.window + 1  # [B, A, b]
        seen = seen & (jnp.arange(length) >= oldest[..., None])
        related = related & (offset > offset[:, None] - config.window)

    def attend(layer, q, k, v):
        keys, values = context.keys[layer], context.values[layer]
        q = q.reshape(*q.shape[:-2], config.num_kv_heads, config.group_size, -1)

        def scores(spec, keys, mask):  # [B, A, K, G, b, T or b]
            s = config.head_dim**-0.5 * jnp.einsum(spec, q, keys)
            return jnp.where(mask[..., None, None, :, :], s, -jnp.inf)

        before = scores("...aikgd,...tkd->...akgit", keys, seen)
        within = scores("...aikgd,...ajkd->...akgij", k, related)
        weights = jax.nn.softmax(jnp.concatenate([before, within], axis=-1), axis=-1)
        before, within = weights[..., :length], weights[..., length:]
        out = jnp.einsum("...akgit,...tkd->...aikgd", before, values)
        return out + jnp.einsum("...akgij,...ajkd->...aikgd", within, v)

    return BlockOutput(
        stream=head.stream(vocabulary, known[..., 0], anchors, attend),
        previous=known[..., :-1],
        labels=known[..., 1:],
        inside=at[..., 1:] < length,
    )


def _gather(tokens: jax.Array, index: jax.Array) -> jax.Array:
    """tokens [B, T] at index [B, ...]."""
    return jax.vmap(lambda row, at: row[at])(tokens, index)
