"""Losses over the vocabulary that never hold all logits in memory.

A position's logits are a product of short vectors with tables of V rows, so they are computed
for a chunk of positions, used, and discarded. The gradient with respect to logits z, in closed
form with p = softmax(z) of the drafter and q of the target, is computed in the same pass:

  cross-entropy          -log p[label]                 p - onehot(label)
  forward KL, squared T  T² Σ q_T (log q_T - log p_T)   T (p_T - q_T)
  total variation, L1    Σ |p - q|                     p (s - Σ p s),  s = sign(p - q)

Each gradient is projected onto the short vectors at once, so the residuals of the forward pass
have the size of the inputs.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxspec.arguments import at_least, check_field
from jaxspec.drafters.chunks import join, split
from jaxspec.models.layers import project
from jaxspec.trees.candidates import top_logits

static = functools.partial(dataclasses.field, metadata=dict(static=True))


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Weights of the three losses over the vocabulary; 0 leaves one out.

    Attributes:
      temperature: T of the forward KL.
      chunk: positions, over all rows, whose logits are in memory at a time.
    """

    cross_entropy: float = 0.1
    kl: float = 0.0
    total_variation: float = 0.9
    temperature: float = 1.0
    chunk: int = 128

    def __post_init__(self):
        at_least(0, self, "cross_entropy", "kl", "total_variation")
        at_least(1, self, "chunk")
        check_field(self, "temperature", self.temperature > 0, "more than 0")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factors:
    """The drafter's logits: hidden · unembed, plus latent · output with a low-rank head.

    Attributes:
      hidden: [B, R, M], R positions per row.
      latent: [B, R, r], or None.
      output: [V, r], or None.
      scale, cap: of the products with `unembed`, see `DrafterConfig.logit_scale`.
      candidates: number of likeliest tokens to return per position.
    """

    hidden: jax.Array
    latent: jax.Array | None = None
    output: jax.Array | None = None
    scale: float = static(default=1.0)
    cap: float | None = static(default=None)
    candidates: int = static(default=0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PositionLosses:
    """Every position's losses, float32 [B, R], without gradients.

    Attributes:
      cross_entropy: on the label.
      kl, total_variation: against the target's distribution; None without it.
      labels: int32, the labels used.
      candidates: [B, R, k] int32, the drafter's likeliest tokens; None unless asked for.
    """

    cross_entropy: jax.Array
    kl: jax.Array | None
    total_variation: jax.Array | None
    labels: jax.Array | None = None
    candidates: jax.Array | None = None


def vocabulary_loss(
    mixture: Mixture,
    drafter: Factors,
    unembed: jax.Array,
    target: jax.Array | None,
    labels: jax.Array | None,
    weights: jax.Array,
    target_unembed: jax.Array | None = None,
) -> tuple[jax.Array, PositionLosses]:
    """The weighted sum over positions of the mixed losses.

    Differentiable only with respect to `drafter`: the LM head, the target and the weights are
    constants.

    Args:
      unembed: [V, M], the frozen LM head.
      target: [B, R, M], the target's hidden states after its final norm; None without KL and
        total variation.
      labels: [B, R] int32; None for the target's likeliest tokens.
      weights: [B, R] float32.
      target_unembed: [V, M], the target's LM head where `unembed` is the drafter's own.

    Returns:
      The sum, a float32 scalar, and the unweighted losses of every position.

    Raises:
      ValueError: a loss needs the target, which is None.
    """
    if target is None and (mixture.kl or mixture.total_variation or labels is None):
        raise ValueError("kl and total_variation need the target's outputs; target is None")
    total, losses = _weighted_sum(
        mixture, drafter, unembed, target, labels, weights, target_unembed
    )
    return total, jax.tree.map(jax.lax.stop_gradient, losses)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_sum(mixture, *arguments):
    return _scan(mixture, *arguments, gradient=False)[0]


def _forward_rule(mixture, drafter, *arguments):
    out, slopes = _scan(mixture, drafter, *arguments, gradient=True)
    return out, jax.tree.map(lambda slope, x: slope.astype(x.dtype), slopes, drafter)


def _backward_rule(mixture, slopes, cotangents):
    scale, _ = cotangents
    drafter = jax.tree.map(lambda slope: (scale * slope).astype(slope.dtype), slopes)
    return drafter, None, None, None, None, None


_weighted_sum.defvjp(_forward_rule, _backward_rule)


def _scan(
    mixture, drafter, unembed, target, labels, weights, target_unembed, *, gradient: bool
):
    """The sum, the positions' losses and, if asked for, the gradient of the drafter."""
    table, cap = drafter.output, drafter.cap
    judge = unembed if target_unembed is None else target_unembed

    def step(carry, chunk):
        total, d_table = carry
        hidden, latent, target, labels, weights = chunk
        logits = base = drafter.scale * project("brm,vm->brv", hidden, unembed)
        if cap is not None:
            logits = base = cap * jnp.tanh(base / cap)
        if table is not None:
            logits = logits + project("brl,vl->brv", latent, table)
        teacher = None if target is None else project("brm,vm->brv", target, judge)
        if labels is None:
            labels = jnp.argmax(teacher, axis=-1)
        losses = _losses(mixture, logits, teacher, labels)
        if drafter.candidates:
            top, _, _ = top_logits(logits, drafter.candidates)
            losses = dataclasses.replace(losses, candidates=top)
        total += jnp.sum(weights * _mix(mixture, losses))
        if not gradient:
            return (total, d_table), (losses, None, None)
        d_logits = weights[..., None] * _slope(mixture, logits, teacher, labels)
        d_latent = None
        if table is not None:
            d_latent = project("brv,vl->brl", d_logits, table)
            d_table += project("brv,brl->vl", d_logits, latent.astype(table.dtype))
        d_base = d_logits if cap is None else d_logits * (1 - (base / cap) ** 2)
        d_hidden = drafter.scale * project("brv,vm->brm", d_base, unembed)
        return (total, d_table), (losses, d_hidden, d_latent)

    batch, positions = weights.shape
    size = min(positions, max(1, mixture.chunk // batch))
    d_table = None
    if gradient and table is not None:
        d_table = jnp.zeros(table.shape, jnp.float32)
    # Padding of the last chunk has weight 0.
    chunks = split((drafter.hidden, drafter.latent, target, labels, weights), size)
    (total, d_table), stacked = jax.lax.scan(step, (jnp.float32(0), d_table), chunks)
    losses, d_hidden, d_latent = join(stacked, positions)
    slopes = dict(hidden=d_hidden, latent=d_latent, output=d_table)
    return (total, losses), dataclasses.replace(drafter, **slopes)


def _losses(mixture: Mixture, logits, teacher, labels) -> PositionLosses:
    log_p = jax.nn.log_softmax(logits)
    cross_entropy = -jnp.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0]
    labels = labels.astype(jnp.int32)
    if teacher is None:
        return PositionLosses(cross_entropy, None, None, labels)
    difference = jnp.exp(log_p) - jax.nn.softmax(teacher)
    heat = mixture.temperature
    log_p, log_q = jax.nn.log_softmax(logits / heat), jax.nn.log_softmax(teacher / heat)
    return PositionLosses(
        cross_entropy,
        heat**2 * jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=-1),
        jnp.sum(jnp.abs(difference), axis=-1),
        labels,
    )


def _mix(mixture: Mixture, losses: PositionLosses) -> jax.Array:
    mixed = mixture.cross_entropy * losses.cross_entropy
    if losses.kl is not None:
        mixed += mixture.kl * losses.kl + mixture.total_variation * losses.total_variation
    return mixed


def _slope(mixture: Mixture, logits, teacher, labels) -> jax.Array:
    """Gradient of a position's mixed loss with respect to its logits, [B, R, V]."""
    p = jax.nn.softmax(logits)
    label = labels[..., None] == jnp.arange(logits.shape[-1])
    slope = mixture.cross_entropy * (p - label)
    if mixture.kl:
        heat = mixture.temperature
        warmer = jax.nn.softmax(logits / heat) - jax.nn.softmax(teacher / heat)
        slope += mixture.kl * heat * warmer
    if mixture.total_variation:
        sign = jnp.sign(p - jax.nn.softmax(teacher))
        mean = jnp.sum(p * sign, axis=-1, keepdims=True)
        slope += mixture.total_variation * p * (sign - mean)
    return slope
