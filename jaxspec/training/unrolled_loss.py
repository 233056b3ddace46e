"""EAGLE-3's loss: every unrolled step against the target's distribution of the next token."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxspec.drafters.eagle_head import EagleHead
from jaxspec.drafters.head import Vocabulary
from jaxspec.drafters.teacher_forced import take
from jaxspec.training.losses import LossConfig, LossSums, acceptance
from jaxspec.training.vocabulary_loss import Factors, vocabulary_loss

WEIGHTINGS, REDUCTIONS = ("uniform", "exponential"), (None, "slots", "weights", "positions")


def check_loss(config: LossConfig) -> None:
    """Raises ValueError for options that unrolled steps do not support."""
    for name, allowed in (("weighting", WEIGHTINGS), ("reduction", REDUCTIONS)):
        if getattr(config, name) not in allowed:
            raise ValueError(
                f"LossConfig.{name} is {getattr(config, name)!r}, which needs blocks; expected "
                f"one of {allowed} with EAGLE-3"
            )


def unrolled_loss(
    config: LossConfig,
    head: EagleHead,
    vocabulary: Vocabulary,
    outputs: jax.Array,
    tokens: jax.Array,
    supervised: jax.Array,
    hidden: jax.Array,
    starts: jax.Array | None = None,
    at: jax.Array | None = None,
) -> LossSums:
    """The loss of unrolled steps.

    Step j at index i, which has read the tokens up to r = i + 1 + j, is compared with the
    target after r, where r is supervised. Each step's mean over its rows is weighted and
    summed; `reduction` "weights" divides by the sum of the weights, and "positions" takes means
    over all indices instead. With a draft vocabulary the target's distribution is renormalised
    over the kept tokens; with `truth` "data", rows whose next token is outside are left out.

    Args:
      outputs: [B, J, A, M], from `unroll`.
      tokens: [B, T] int32.
      supervised: [B, T] bool, tokens after which the target's distribution counts.
      hidden: [B, T, M_t], the target's, after its final norm.
      starts: [B, T] int32, see `unroll`.
      at: [B, A] int32, the indices of `outputs`; `length` and more for none. All by default.
    """
    batch, steps, count, _ = outputs.shape
    length = tokens.shape[1]
    at = jnp.broadcast_to(jnp.arange(length), tokens.shape) if at is None else at
    read = at[:, None] + 1 + jnp.arange(steps)[:, None]  # [B, J, A]
    inside, read = read < length, jnp.minimum(read, length - 1)
    judged = take(supervised, read) & inside
    if starts is not None:
        own = take(starts, jnp.minimum(at, length - 1))
        judged = judged & (take(starts, read) == own[:, None])

    labels, known = vocabulary.index(take(tokens, jnp.minimum(read + 1, length - 1)))
    drafted = judged & known & (read + 1 < length)
    counted = _by_step(judged)
    if config.truth == "data":
        judged = drafted
    else:
        labels = None
    weights, denominator = _step_weights(config, judged)

    flat = lambda x: x.reshape(batch, steps * count, *x.shape[3:])  # noqa: E731
    total, losses = vocabulary_loss(
        config.mixture,
        Factors(head.read_out(flat(outputs))),
        vocabulary.unembed,
        flat(take(hidden, read)),
        None if labels is None else flat(labels),
        flat(weights),
        vocabulary.judge,
    )

    def weighted(x):
        return jnp.sum(flat(weights) * x)

    accepted = acceptance(losses).reshape(judged.shape)
    return LossSums(
        total=total,
        weight=denominator,
        cross_entropy=weighted(losses.cross_entropy),
        kl=weighted(losses.kl),
        total_variation=weighted(losses.total_variation),
        confidence=jnp.float32(0),
        accepted=_by_step(accepted * drafted),
        counted=counted,
    )


def _by_step(rows: jax.Array) -> jax.Array:
    """Sums [J] over rows [B, J, A]."""
    return jnp.sum(rows.astype(jnp.float32), axis=(0, 2))


def _step_weights(config: LossConfig, judged: jax.Array):
    """Weights [B, J, A] of the rows, and what to divide the weighted sum by."""
    counted, everywhere = _by_step(judged), jnp.float32(judged[:, 0].size)
    steps = counted.shape[0]
    decay = jnp.ones(steps)
    if config.weighting == "exponential":
        decay = jnp.exp(-jnp.arange(steps) / config.decay)
    if config.reduction == "positions":
        return judged * decay[:, None], everywhere
    # Each step has its own mean; micro-batches are weighted by their rows at step 0.
    each = decay * counted[0] / jnp.maximum(counted, 1e-6)
    denominator = counted[0] * (jnp.sum(decay) if config.reduction == "weights" else 1.0)
    return judged * each[:, None], denominator
