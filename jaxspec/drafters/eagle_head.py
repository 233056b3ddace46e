"""The network of an EAGLE-3 drafter: a layer that reads pairs of a feature and a token.

A row is a pair: a feature and the token that follows it. Features of committed tokens come from
the target, through `fuse`; a drafted token's feature is the output of the row before, so that
drafting needs no target.

Sources: EAGLE-3 (arXiv 2503.01840); vLLM's `speculators` for the flags.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from jaxspec.arguments import at_least, check_field
from jaxspec.config import RopeScaling, check_heads, check_taps, for_every_layer
from jaxspec.drafters.head import Vocabulary
from jaxspec.drafters.sequential import join, ones, weight
from jaxspec.models.layers import lookup, project, rms_norm, rotate, swiglu
from jaxspec.models.rope import rotary_angles

TAP_NORMS = (None, "joined", "each")

# attend(layer, q [..., n, H, D], k [..., n, K, D], v [..., n, K, D]) -> [..., n, H, D]
Attend = Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class EagleConfig:
    """Static shape of an EAGLE-3 drafter.

    Attributes:
      hidden_size: M, of the drafter.
      target_hidden_size: M_t, of the target.
      target_layers: number of layers of its target; None where its file does not say.
      taps: target layers whose outputs it reads, 0-based, in this order; -1 is the embedding.
      steps: tokens drafted one after another, and runs of the layer per round.
      qk_norm: RMSNorm over the head dimension of queries and keys (Qwen3-shaped layers).
      tap_norm: RMSNorm before `fc`: None, "joined" over all taps at once, or "each" tap's own.
      residual_after_norm: the layer adds to the normed feature instead of the feature.
      feedback_after_norm: the next row's feature is the output after the final norm.
      logits_after_norm: the LM head reads the output after the final norm, else before it.
      window: per layer, or one for all: a pair attends to pairs less than `window` before it,
        and a drafted row to those of the last pair; None: to all.
      rope_scaling: None for plain rotary positions.
    """

    vocab_size: int
    hidden_size: int
    target_hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    target_layers: int | None
    taps: tuple[int, ...]
    num_layers: int = 1
    steps: int = 5
    qk_norm: bool = False
    tap_norm: str | None = None
    residual_after_norm: bool = False
    feedback_after_norm: bool = False
    logits_after_norm: bool = True
    window: tuple[int | None, ...] | int | None = None
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-6
    max_positions: int = 40_960

    def __post_init__(self):
        at_least(1, self, "vocab_size", "hidden_size", "target_hidden_size")
        at_least(1, self, "num_layers", "steps")
        for_every_layer(self, "window")
        check_heads(self)
        check_taps(self)
        check_field(self, "tap_norm", self.tap_norm in TAP_NORMS, f"one of {TAP_NORMS}")

    @property
    def depth(self) -> int:
        """P: number of drafted positions."""
        return self.steps

    @property
    def group_size(self) -> int:
        """Query heads per key/value head (G)."""
        return self.num_heads // self.num_kv_heads


class EagleLayer(nnx.Module):
    """A pre-norm layer. The first one's attention reads [embedding; feature], 2 M wide."""

    def __init__(self, config: EagleConfig, first: bool, *, rngs: nnx.Rngs, dtype):
        width, dim = config.hidden_size, config.head_dim
        heads, group = config.num_kv_heads, config.group_size
        inputs = 2 * width if first else width
        self.norm = ones(dtype, width)
        self.hidden_norm = ones(dtype, width) if first else None
        self.q = weight(rngs, dtype, inputs, heads, group, dim)
        self.kv = weight(rngs, dtype, inputs, heads, 2, dim)
        self.q_norm = ones(dtype, dim) if config.qk_norm else None
        self.k_norm = ones(dtype, dim) if config.qk_norm else None
        self.out = weight(rngs, dtype, heads, group, dim, width)
        self.mlp_norm = ones(dtype, width)
        self.gate_up = weight(rngs, dtype, width, 2, config.intermediate_size)
        self.down = weight(rngs, dtype, config.intermediate_size, width)
        self.config = config

    def __call__(self, embedded: jax.Array, x: jax.Array, angles, attend) -> jax.Array:
        """Rows [..., n, M] -> [..., n, M]; `attend(q, k, v)` masks."""
        eps = self.config.rms_norm_eps
        residual = x
        if self.hidden_norm is None:
            inputs = rms_norm(x, self.norm[...], eps)
        else:
            normed = rms_norm(x, self.hidden_norm[...], eps)
            inputs = join(rms_norm(embedded, self.norm[...], eps), normed)
            residual = normed if self.config.residual_after_norm else x
        attended = attend(*self._qkv(inputs, angles)).reshape(*x.shape[:-1], -1)
        # One contracted axis: with three, XLA transposes the weight.
        out = self.out[...].reshape(-1, x.shape[-1])
        x = residual + project("...h,hm->...m", attended, out)
        normed = rms_norm(x, self.mlp_norm[...], eps)
        inner = swiglu(project("...m,mcf->...cf", normed, self.gate_up[...]))
        return x + project("...f,fm->...m", inner, self.down[...])

    def _qkv(self, inputs: jax.Array, angles):
        """Rotated queries [..., H, D], rotated keys and values [..., K, D]."""
        q = project("...m,mkgd->...kgd", inputs, self.q[...])
        q = q.reshape(*inputs.shape[:-1], -1, q.shape[-1])
        # XLA joins products that share an operand and concatenates their weights every time.
        inputs, weights = jax.lax.optimization_barrier((inputs, self.kv[...]))
        kv = project("...m,mkcd->...kcd", inputs, weights)
        k, v = kv[..., 0, :], kv[..., 1, :]
        if self.q_norm is not None:
            q = rms_norm(q, self.q_norm[...], self.config.rms_norm_eps)
            k = rms_norm(k, self.k_norm[...], self.config.rms_norm_eps)
        return rotate(q, *angles), rotate(k, *angles), v


class PairHead(Protocol):
    """A network with weights that reads pairs of a feature and the token after it.

    `drafters.eagle.EagleDrafter` runs it: an EAGLE-3 head, or an MTP layer.
    """

    def fuse(self, taps: jax.Array) -> jax.Array:
        """Features [..., M] from the target's outputs [..., len(taps) * M_t]."""

    def __call__(
        self,
        vocabulary: Vocabulary,
        features: jax.Array,
        tokens: jax.Array,
        positions: jax.Array,
        attend: Attend,
    ) -> jax.Array:
        """Runs pairs of a feature [B, n, M] and the token after it [B, n].

        Args:
          positions: [B, n] int32, positions of the features.
          attend: attention of a layer.

        Returns:
          [B, n, M] float32, for `logits` and `feedback`.
        """

    def logits(self, vocabulary: Vocabulary, output: jax.Array) -> jax.Array:
        """Logits, float32 [..., V'], of the token after the row's, from outputs [..., M]."""

    def feedback(self, output: jax.Array) -> jax.Array:
        """The feature of the next row, [..., M], from outputs [..., M]."""


class EagleHead(nnx.Module):
    """Tap fusion, the layers, and the norm before the LM head: a `PairHead`."""

    def __init__(self, config: EagleConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        width, tapped = config.hidden_size, len(config.taps) * config.target_hidden_size
        self.config = config
        self.tap_norm = ones(dtype, tapped) if config.tap_norm else None
        self.fc = weight(rngs, dtype, tapped, width)
        self.layers = nnx.List(
            [
                EagleLayer(config, i == 0, rngs=rngs, dtype=dtype)
                for i in range(config.num_layers)
            ]
        )
        self.norm = ones(dtype, width)

    def fuse(self, taps: jax.Array) -> jax.Array:
        c = self.config
        if c.tap_norm == "joined":
            taps = rms_norm(taps, self.tap_norm[...], c.rms_norm_eps)
        elif c.tap_norm == "each":
            apart = (*taps.shape[:-1], len(c.taps), c.target_hidden_size)
            gains = self.tap_norm[...].reshape(apart[-2:])
            taps = rms_norm(taps.reshape(apart), gains, c.rms_norm_eps).reshape(taps.shape)
        return project("...t,tm->...m", taps, self.fc[...])

    def __call__(
        self,
        vocabulary: Vocabulary,
        features: jax.Array,
        tokens: jax.Array,
        positions: jax.Array,
        attend: Attend,
    ) -> jax.Array:
        c = self.config
        angles = rotary_angles(positions, c.head_dim, c.rope_theta, c.rope_scaling)
        embedded, x = lookup(vocabulary.embed, tokens), features
        for i, layer in enumerate(self.layers):
            x = layer(embedded, x, angles, functools.partial(attend, i))
        return x

    def read_out(self, output: jax.Array) -> jax.Array:
        """Hidden states for the LM head, [..., M], from outputs [..., M]."""
        return self._normed(output) if self.config.logits_after_norm else output

    def logits(self, vocabulary: Vocabulary, output: jax.Array) -> jax.Array:
        return project("...m,vm->...v", self.read_out(output), vocabulary.unembed)

    def feedback(self, output: jax.Array) -> jax.Array:
        return self._normed(output) if self.config.feedback_after_norm else output

    def _normed(self, output: jax.Array) -> jax.Array:
        return rms_norm(output, self.norm[...], self.config.rms_norm_eps)


@dataclasses.dataclass(frozen=True)
class ParallelEagleConfig(EagleConfig):
    """A P-EAGLE drafter, which drafts `steps` tokens at once.

    Attributes:
      mask_token_id: token that rows after the first read.
    """

    mask_token_id: int = 0

    def __post_init__(self):
        super().__post_init__()
        masks = 0 <= self.mask_token_id < self.vocab_size
        rule = f"a row of the embedding, 0 … {self.vocab_size - 1}"
        check_field(self, "mask_token_id", masks, rule)
        rule = "None: programs disagree about windows of rows that are drafted at once"
        check_field(self, "window", not any(self.window), rule)


class ParallelEagleHead(EagleHead):
    """`EagleHead` with a learned feature for rows after the first."""

    def __init__(self, config: ParallelEagleConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        super().__init__(config, rngs=rngs, dtype=dtype)
        self.mask_hidden = weight(rngs, dtype, len(config.taps) * config.target_hidden_size)
