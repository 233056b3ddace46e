"""EAGLE-3 on known sequences, unrolled as in drafting: each step reads the last one's output.

At step j, index i stands for the row that decoding would run j tokens after the pair of
feature i and token i + 1, if it drafted the true tokens: its feature is the output of index i
at step j - 1, its token is i + 1 + j, and it sees the pairs up to i and its own earlier steps.
P-EAGLE reads the mask's feature and token at every step but the first.

Sources: training-time test of EAGLE-3 (arXiv 2503.01840); vLLM's `speculators`, "peagle".
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxspec.drafters.chunks import map_chunks
from jaxspec.drafters.eagle_head import EagleConfig, EagleHead, ParallelEagleConfig
from jaxspec.drafters.head import Vocabulary
from jaxspec.drafters.teacher_forced import take
from jaxspec.models.layers import product


def unroll(
    head: EagleHead,
    vocabulary: Vocabulary,
    tokens: jax.Array,
    taps: jax.Array,
    starts: jax.Array | None = None,
    at: jax.Array | None = None,
    *,
    steps: int,
    chunk: int = 128,
) -> jax.Array:
    """Outputs of every step, at every index or at those given.

    Attention runs over `chunk` rows of every sequence at a time and is recomputed in the
    backward pass, as is the rest of a step.

    Args:
      tokens: [B, T] int32; those past the end count as 0.
      taps: [B, T, len(taps) * M_t], the target's outputs.
      starts: [B, T] int32, where a row holds several sequences: the first index of the one a
        token belongs to. Positions count from there, and a row sees nothing before it.
      at: [B, A] int32, the indices that are unrolled; the first step always runs at all.

    Returns:
      [B, J, A, M] float32, A = T by default. The output at step j and index i is that of the
      token i + 2 + j; it means something while that token is in the sequence.
    """
    config, dtype = head.config, head.fc[...].dtype
    first = jnp.zeros_like(tokens) if starts is None else starts
    everywhere = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    positions = everywhere - first
    pairs, later = {}, {layer: [] for layer in range(config.num_layers)}
    masked = isinstance(config, ParallelEagleConfig)

    def chosen(rows):
        return rows if at is None else take(rows, at)

    @functools.partial(jax.checkpoint, static_argnums=0)
    def run(step, feature, pairs, later):
        own, here = {}, chosen if step else lambda rows: rows

        def attend(layer, q, k, v):
            q, k, v = (x.astype(dtype) for x in (q, k, v))
            own[layer] = k, v
            seen = pairs if step else own
            rows = [*later[layer], own[layer]] if step else []
            attend = functools.partial(_attend, config, layer, *seen[layer])
            return map_chunks(attend, q, rows, here(everywhere), here(first), size=chunk)

        following = here(_shifted(tokens, 1 + step))
        if masked and step:
            following = jnp.full_like(following, config.mask_token_id)
        return head(vocabulary, feature, following, here(positions) + step, attend), own

    feature, outputs = head.fuse(taps), []
    for step in range(steps):
        output, own = run(step, feature, pairs, later)
        if step == 0:
            pairs, output = own, chosen(output)
        else:
            later = {layer: [*rows, own[layer]] for layer, rows in later.items()}
        outputs.append(output)
        feature = head.feedback(output)
        if masked:
            mask = head.fuse(head.mask_hidden[...].astype(jnp.float32))
            feature = jnp.broadcast_to(mask, feature.shape)
    return jnp.stack(outputs, axis=1)


def _shifted(rows: jax.Array, by: int) -> jax.Array:
    """rows [B, T, ...] from index `by` on, zeros past the end."""
    pad = [(0, 0)] * rows.ndim
    pad[1] = (0, by)
    return jnp.pad(rows, pad)[:, by:]


def _attend(config: EagleConfig, layer: int, keys, values, q, rows, index, first) -> jax.Array:
    """Every index attends to the pairs up to it, and to its own rows of later steps.

    Args:
      keys, values: [B, T, K, D], of the pairs.
      q: [B, A, H, D].
      rows: of each step from 1 on, keys and values [B, A, K, D].
      index: [B, A] int32.
      first: [B, A] int32, the first index that a row sees.
    """
    batch, count = q.shape[:2]
    window, length = config.window[layer], keys.shape[1]
    q = q.reshape(batch, count, config.num_kv_heads, config.group_size, -1)
    place, at = jnp.arange(length), index[..., None]
    seen = (place <= at) & (place >= first[..., None])  # [B, c, T]
    if window is not None:
        seen = seen & (at - place < window)
    scale = config.head_dim**-0.5
    scores = scale * product("bikgd,btkd->bkgit", q, keys)
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    if rows:
        own_keys, own_values = (jnp.stack(x, axis=2) for x in zip(*rows, strict=True))
        near = scale * product("bikgd,bijkd->bkgij", q, own_keys)
        scores = jnp.concatenate([scores, near], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    out = product("bkgit,btkd->bikgd", weights[..., :length], values)
    if rows:
        out += product("bkgij,bijkd->bikgd", weights[..., length:], own_values)
    return out.reshape(batch, count, config.num_heads, -1)
