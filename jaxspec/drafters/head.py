"""The network of a block drafter: tap fusion, layers, sequential and confidence head.

Its weights are a pytree: `drafters.weights`.

Sources: DFlash (arXiv 2602.06036), JetSpec (arXiv 2606.18394), DSpark (arXiv 2607.05147),
DFlash2 ("Keep Drafting Parallel", Inco AI, August 2026).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxspec.config import DrafterConfig
from jaxspec.drafters.confidence import Confidence
from jaxspec.drafters.convolution import Convolution, sides
from jaxspec.drafters.sequential import HEAD_MODULES, ones, weight
from jaxspec.models.cache import KVRows
from jaxspec.models.layers import (
    lookup,
    lookup_whole,
    project,
    rms_norm,
    rotate,
    swiglu,
)
from jaxspec.models.rope import rotary_angles
from jaxspec.trees.candidates import top_logits
from jaxspec.trees.tree import DraftTree

# attend(layer, q [..., b, H, D], k [..., b, K, D], v [..., b, K, D]) -> [..., b, H, D]
Attend = Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array]

OUTPUT = ("sequential", "output")  # path of W2 in a head's weights


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The target's own arrays, shared and never saved with a drafter.

    A draft vocabulary of V' tokens is much cheaper to score than all V and contains most of
    what a target writes. Inside a draft, logits and choices are indices 0 … V' - 1; tokens are
    ids everywhere else. Without one V' = V, and the two are the same.

    Attributes:
      embed: [V, M].
      unembed: [V', M], rows of the LM head.
      kept: [V'] int32, token ids of these rows, ascending; None: all tokens.
      judge: [V', M], the target's rows if `unembed` is the drafter's own, else None.
      own_embed: `embed` is the drafter's own (static).
    """

    embed: jax.Array
    unembed: jax.Array
    kept: jax.Array | None = None
    judge: jax.Array | None = None
    own_embed: bool = dataclasses.field(default=False, metadata=dict(static=True))

    def ids(self, index: Int[Array, "*S"]) -> Int[Array, "*S"]:
        """Token ids of draft indices."""
        return index if self.kept is None else self.kept[index]

    def of_tree(self, tree: DraftTree) -> DraftTree:
        """Converts a tree over draft indices, whose root is a token id, to token ids."""
        if self.kept is None:
            return tree
        tokens = jnp.where(tree.depths > 0, self.ids(tree.tokens), tree.tokens)
        return dataclasses.replace(tree, tokens=tokens)

    def index(self, tokens: Int[Array, "*S"]) -> tuple[Int[Array, "*S"], Bool[Array, "*S"]]:
        """Draft indices of tokens, and whether each has one; other indices are arbitrary."""
        if self.kept is None:
            return tokens, jnp.ones(tokens.shape, bool)
        index = jnp.minimum(jnp.searchsorted(self.kept, tokens), self.kept.shape[0] - 1)
        return index.astype(jnp.int32), self.kept[index] == tokens


class DraftLayer(nnx.Module):
    """A pre-norm layer whose slots also attend to the context.

    Queries and keys/values are separate weights, because the context needs no queries. The
    context is projected without `norm`, which applies to slots only.
    """

    def __init__(self, config: DrafterConfig, *, rngs: nnx.Rngs, dtype):
        width, dim = config.hidden_size, config.head_dim
        heads, group = config.num_kv_heads, config.group_size
        self.norm = ones(dtype, width)
        self.q = weight(rngs, dtype, width, heads, group, dim)
        self.kv = weight(rngs, dtype, width, heads, 2, dim)
        self.q_norm = ones(dtype, dim)
        self.k_norm = ones(dtype, dim)
        self.out = weight(rngs, dtype, heads, group, dim, width)
        self.mlp_norm = ones(dtype, width)
        self.gate_up = weight(rngs, dtype, width, 2, config.intermediate_size)
        self.down = weight(rngs, dtype, config.intermediate_size, width)
        make = functools.partial(Convolution, config, rngs=rngs, dtype=dtype)
        self.attention_conv = make() if config.conv_taps else None
        self.mlp_conv = make() if config.conv_taps else None
        self.eps = config.rms_norm_eps

    def keys_values(
        self, x: Float[Array, "*S M"], angles
    ) -> tuple[Float[Array, "*S K D"], Float[Array, "*S K D"]]:
        """Rotated keys, and values, of context or of normed slots."""
        # Without the barrier XLA joins products that share an operand, concatenating their
        # weights in every round: queries with these, and these of all layers.
        x, weight = jax.lax.optimization_barrier((x, self.kv[...]))
        kv = project("...m,mkcd->...kcd", x, weight)
        k = rms_norm(kv[..., 0, :], self.k_norm[...], self.eps)
        return rotate(k, *angles), kv[..., 1, :]

    def __call__(self, x: Float[Array, "*B T M"], angles, attend) -> Float[Array, "*B T M"]:
        """The T slots of blocks after the layer; `attend(q, k, v)` adds the context."""
        normed = rms_norm(x, self.norm[...], self.eps)
        before, after = sides(self.attention_conv, normed)
        normed = before(normed)
        q = project("...m,mkgd->...kgd", normed, self.q[...])
        q = q.reshape(*x.shape[:-1], -1, q.shape[-1])  # [..., b, H, D]
        q = rotate(rms_norm(q, self.q_norm[...], self.eps), *angles)
        attended = attend(q, *self.keys_values(normed, angles)).reshape(*x.shape[:-1], -1)
        # One contracted axis: with three, XLA transposes the weight.
        out = self.out[...].reshape(-1, x.shape[-1])
        x = x + after(project("...h,hm->...m", attended, out))
        normed = rms_norm(x, self.mlp_norm[...], self.eps)
        before, after = sides(self.mlp_conv, normed)
        inner = swiglu(project("...m,mcf->...cf", before(normed), self.gate_up[...]))
        return x + after(project("...f,fm->...m", inner, self.down[...]))


class DraftHead(nnx.Module):
    """The network of every block drafter: layers, and heads as `DrafterConfig` says.

    A *stream* is the residual stream of the predicting slots after the last layer, before the
    final norm, [..., P, M]; row j predicts the token j + 1 after the anchor.
    """

    def __init__(self, config: DrafterConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        width = config.hidden_size
        self.config = config
        self.fc = weight(rngs, dtype, len(config.taps) * width, width)
        self.hidden_norm = ones(dtype, width)
        self.layers = nnx.List(
            [DraftLayer(config, rngs=rngs, dtype=dtype) for _ in range(config.num_layers)]
        )
        self.norm = ones(dtype, width)
        make = HEAD_MODULES.get(config.sequential)
        self.sequential = make(config, rngs=rngs, dtype=dtype) if make else None
        self.confidence = (
            Confidence(config, rngs=rngs, dtype=dtype) if config.confidence else None
        )

    def context(self, features: Float[Array, "B C F"], positions: Int[Array, "B C"]) -> KVRows:
        """Every layer's keys and values of observed tokens, projected once.

        Args:
          features: [B, C, len(taps) * M], outputs of the tapped layers.
          positions: [B, C] int32.
        """
        fused = project("...t,tm->...m", features, self.fc[...])
        fused = rms_norm(fused, self.hidden_norm[...], self.config.rms_norm_eps)
        angles = self._angles(positions)
        keys, values = zip(*(x.keys_values(fused, angles) for x in self.layers), strict=True)
        return KVRows(keys, values)

    def stream(
        self,
        vocabulary: Vocabulary,
        anchors: Int[Array, "*B"],
        positions: Int[Array, "*B"],
        attend: Attend,
    ) -> Float[Array, "*B P M"]:
        """One pass over blocks of the anchor and masks.

        Args:
          anchors: [...] int32, token of each block's anchor.
          positions: [...] int32, its absolute position.
          attend: attention of a layer, with its context and masks.

        Returns:
          [..., P, M] float32.
        """
        block = jnp.arange(self.config.block_size)
        masked = jnp.int32(self.config.mask_token_id)
        tokens = jnp.where(block == 0, anchors[..., None], masked)
        x = self.config.embedding_scale * lookup(vocabulary.embed, tokens)
        angles = self._angles(positions[..., None] + block)
        for i, layer in enumerate(self.layers):
            x = layer(x, angles, functools.partial(attend, i))
        return x[..., -self.config.depth :, :]

    def logits(
        self, vocabulary: Vocabulary, stream: Float[Array, "*S M"]
    ) -> Float[Array, "*S V"]:
        """Base logits of a stream, float32, over the draft vocabulary."""
        return self.unembed(vocabulary, self.normed(stream))

    def unembed(
        self, vocabulary: Vocabulary, hidden: Float[Array, "*S M"]
    ) -> Float[Array, "*S V"]:
        """Logits of hidden states, scaled and capped, float32."""
        return self.scaled(project("...m,vm->...v", hidden, vocabulary.unembed))

    def scaled(self, logits: Float[Array, "*S"]) -> Float[Array, "*S"]:
        """Scales and caps products with the LM head."""
        logits, cap = self.config.logit_scale * logits, self.config.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def normed(self, stream: Float[Array, "*S M"]) -> Float[Array, "*S M"]:
        """The hidden state h_k that all heads read."""
        return rms_norm(stream, self.norm[...], self.config.rms_norm_eps)

    def advance(
        self,
        vocabulary: Vocabulary,
        stream: Float[Array, "*#S M"],
        previous: Int[Array, "*#S"],
        state,
    ) -> tuple[Float[Array, "*S R"], Any]:
        """One slot of the sequential head, after the previous token.

        Returns:
          The latent, whose width is M with an "mlp" head, and the new state.
        """
        if self.config.sequential == "mlp":
            embedded = lookup(vocabulary.embed, previous)
            return self.normed(stream + self.sequential(self.normed(stream), embedded)), state
        return self.sequential.advance(self.normed(stream), previous, state)

    def teacher_forced(
        self,
        vocabulary: Vocabulary,
        stream: Float[Array, "*B P M"],
        previous: Int[Array, "*B P"],
    ) -> Float[Array, "*B P R"]:
        """Latents of whole blocks whose previous tokens are given; see `advance`."""
        state = self.sequential.initial_state(previous.shape[:-1])
        if self.config.sequential != "rnn":
            return self.advance(vocabulary, stream, previous, state)[0]

        def slot(state, inputs):
            latent, state = self.advance(vocabulary, *inputs, state)
            return state, latent

        slots = (jnp.moveaxis(stream, -2, 0), jnp.moveaxis(previous, -1, 0))
        return jnp.moveaxis(jax.lax.scan(slot, state, slots)[1], 0, -2)

    def correct(
        self,
        vocabulary: Vocabulary,
        base: Float[Array, "*#S V"],
        latent: Float[Array, "*#S R"],
    ) -> Float[Array, "*S V"]:
        """Logits given the previous token, float32.

        A bilinear head's are -inf outside the candidates, the likeliest by base logits.
        """
        if self.config.sequential == "mlp":
            return self.unembed(vocabulary, latent)
        if self.config.candidates:
            index, top, _ = top_logits(base, min(self.config.candidates, base.shape[-1]))
            scores = self.select(top, index, latent)
            never = jnp.full((*scores.shape[:-1], base.shape[-1]), -jnp.inf)
            index = jnp.broadcast_to(index, scores.shape)
            return jnp.put_along_axis(never, index, scores, axis=-1, inplace=False)
        return base + project("...r,vr->...v", latent, self.sequential.output[...])

    def select(
        self,
        top: Float[Array, "*#S k"],
        index: Int[Array, "*#S k"],
        latent: Float[Array, "*#S R"],
    ) -> Float[Array, "*S k"]:
        """A bilinear head's scores of candidates.

        Args:
          top: base logits of the candidates.
          index: draft indices of the candidates.
        """
        rows = lookup_whole(self.sequential.output[...], index)
        return top + jnp.einsum("...r,...kr->...k", latent, rows)

    def confidence_logits(
        self, stream: Float[Array, "*#S M"], previous: Int[Array, "*#S"]
    ) -> Float[Array, "*S"]:
        """Logits of the confidence head, given a stream and the token before each slot."""
        embedded = None
        if self.config.confidence == "hidden_and_previous":
            embedded = self.sequential.embed(previous)
        return self.confidence(self.normed(stream), embedded)

    def _angles(self, positions: jax.Array):
        c = self.config
        return rotary_angles(positions, c.head_dim, c.rope_theta, c.rope_scaling)


def restrict(
    weights: nnx.State, vocabulary: Vocabulary, kept: jax.Array | None
) -> tuple[nnx.State, Vocabulary]:
    """Weights and vocabulary restricted to a draft vocabulary, by gathering its tokens' rows.

    The output table W2 [V, R] becomes [V', R]. W1 stays whole, as any token may be the previous
    one.

    Args:
      vocabulary: the full vocabulary.
      kept: see `Vocabulary`; None leaves both as they are.
    """
    if kept is None:
        return weights, vocabulary
    flat = dict(nnx.to_flat_state(weights))
    if OUTPUT in flat:
        flat[OUTPUT] = flat[OUTPUT].replace(flat[OUTPUT][...][kept])
    vocabulary = Vocabulary(vocabulary.embed, vocabulary.unembed[kept], kept)
    return nnx.from_flat_state(list(flat.items())), vocabulary
