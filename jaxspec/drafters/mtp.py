"""Multi-token prediction (MTP): the drafter that checkpoints of hybrid targets contain.

One layer of the target's attention kind reads the embedding of a token and the target's output
at the position before, after its final norm, and predicts the next token. Where the target has
not run, the layer's own normed output replaces the target's. So it drafts as EAGLE does, and
shares that drafter's loop and trees. Embedding and LM head are the target's.

Sources: DeepSeek-V3 (arXiv 2412.19437, section 2.2) for the module; vLLM's `qwen3_next_mtp` and
`qwen3_5_mtp` for which outputs are normed, and in which order they are joined.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxspec.config import TargetConfig
from jaxspec.drafters.eagle import EagleDrafter, EagleParams, eagle_params
from jaxspec.drafters.eagle_head import Attend
from jaxspec.drafters.head import Vocabulary
from jaxspec.drafters.sequential import join
from jaxspec.models.attention import attention
from jaxspec.models.decoder import mlp
from jaxspec.models.layers import lookup, project, rms_norm
from jaxspec.models.params import LayerParams, TargetParams, abstract_params
from jaxspec.models.rope import layer_angles


@dataclasses.dataclass(frozen=True)
class MtpConfig:
    """The MTP layer of a target.

    Attributes:
      layer: the target's configuration, with this as the only layer.
      target_layers: L, of the target.
      steps: tokens drafted one after another, and runs of the layer per round.
    """

    layer: TargetConfig
    target_layers: int
    steps: int = 5

    num_layers = 1
    window = (None,)

    @property
    def taps(self) -> tuple[int, ...]:
        """The target's last layer, tapped after the final norm."""
        return (self.target_layers - 1,)

    @property
    def hidden_size(self) -> int:
        """M, of the target and the layer."""
        return self.layer.hidden_size

    @property
    def vocab_size(self) -> int:
        """V, of the target."""
        return self.layer.vocab_size

    @property
    def num_kv_heads(self) -> int:
        """K, of the layer's attention."""
        return self.layer.num_kv_heads

    @property
    def head_dim(self) -> int:
        """D, of the layer's attention."""
        return self.layer.head_dim


def mtp_config(target: TargetConfig) -> MtpConfig:
    """The MTP layer that a hybrid target of this shape is published with.

    Raises:
      ValueError: the target is not a hybrid.
    """
    if target.delta_net is None:
        raise ValueError(
            "'mtp' needs a hybrid target (Qwen3.5, 3.6, 3.8 or Qwen3-Next), and this one has "
            "no gated delta nets; use another drafter"
        )
    layer = dataclasses.replace(
        target,
        num_layers=1,
        delta_net=None,
        windows=(),
        sparse_layers=(0,) if target.sparse_layers else (),
    )
    return MtpConfig(layer, target.num_layers)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MtpWeights:
    """An MTP layer's own weights.

    Attributes:
      token_norm, feature_norm: [M], of the embedding and of the target's output.
      fc: [2 M, M], of the two side by side, the embedding first.
      layer: attention and MLP.
      norm: [M], before the LM head and before the next step.
    """

    token_norm: jax.Array
    feature_norm: jax.Array
    fc: jax.Array
    layer: LayerParams
    norm: jax.Array


def abstract_mtp(config: MtpConfig, dtype=jnp.float32) -> MtpWeights:
    """The shape of every weight as a `ShapeDtypeStruct`, nothing allocated."""
    whole, width = abstract_params(config.layer, dtype), config.hidden_size
    return MtpWeights(
        token_norm=whole.final_norm,
        feature_norm=whole.final_norm,
        fc=jax.ShapeDtypeStruct((2 * width, width), dtype),
        layer=whole.layers[0],
        norm=whole.final_norm,
    )


@dataclasses.dataclass(frozen=True)
class MtpHead:
    """The layer with its weights: an `eagle_head.PairHead`."""

    config: MtpConfig
    weights: MtpWeights

    def fuse(self, taps: jax.Array) -> jax.Array:
        return taps  # already after the target's final norm

    def __call__(
        self,
        vocabulary: Vocabulary,
        features: jax.Array,
        tokens: jax.Array,
        positions: jax.Array,
        attend: Attend,
    ) -> jax.Array:
        c, w = self.config.layer, self.weights
        embedded = rms_norm(lookup(vocabulary.embed, tokens), w.token_norm, c.rms_norm_eps)
        normed = rms_norm(features, w.feature_norm, c.rms_norm_eps)
        x = project("bnm,mo->bno", join(embedded, normed), w.fc)
        (angles,) = layer_angles(c, positions)
        own = functools.partial(attend, 0)
        x = x + attention(w.layer.attention, c, x, angles, own)
        return x + mlp(w.layer.mlp, c, x)

    def logits(self, vocabulary: Vocabulary, output: jax.Array) -> jax.Array:
        return project("...m,vm->...v", self.feedback(output), vocabulary.unembed)

    def feedback(self, output: jax.Array) -> jax.Array:
        return rms_norm(output, self.weights.norm, self.config.layer.rms_norm_eps)


@dataclasses.dataclass(frozen=True)
class MtpDrafter(EagleDrafter):
    """Drafts with an MTP layer: EAGLE's chain or its dynamic tree (`EagleDrafter`)."""

    config: MtpConfig

    def head(self, params: EagleParams) -> MtpHead:
        return MtpHead(self.config, params.head)

    def abstract_params(self, target: TargetParams) -> EagleParams:
        weights = abstract_mtp(self.config, target.embed.dtype)
        return jax.eval_shape(eagle_params, weights, target)
