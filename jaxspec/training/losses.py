"""Training losses of a drafter, and the weights of slots."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax

from jaxspec.arguments import at_least, check_field
from jaxspec.drafters.head import DraftHead, Vocabulary
from jaxspec.drafters.teacher_forced import BlockOutput
from jaxspec.training.selector_loss import MISSING, Choices, choices, leading_run
from jaxspec.training.vocabulary_loss import (
    Factors,
    Mixture,
    PositionLosses,
    vocabulary_loss,
)

WEIGHTINGS = ("exponential", "uniform", "dpace")
REDUCTIONS = ("weights", "slots", "blocks", "positions")
TRUTHS = ("data", "target")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The losses with their weights; defaults are DSpark's.

    Attributes:
      mixture: weights of the losses over the vocabulary.
      confidence: weight of the confidence head's binary cross-entropy against 1 - L1 / 2;
        ignored without such a head.
      weighting: weight of slot j, counted from 0. "exponential": exp(-j / decay); "uniform": 1;
        "dpace": the smoothed probability that the slot is reached, summed over it and later
        slots.
      smoothing: share of certainty that dpace mixes into the label's probability.
      reduction: denominator of the weighted sum. "weights": the sum of weights; "slots": the
        number of supervised slots; "blocks": the number of blocks with a supervised slot, so
        that under dpace blocks likely to be accepted count more; "positions": the number of
        all positions. None: weights; blocks with dpace; slots for EAGLE-3.
      truth: the label: "data": the next token in the data; "target": the target's likeliest.
      selector: weight of a selector's cross-entropy among its candidates; ignored without one.
      missing: slots whose label is not a candidate: see `selector_loss.choices`. "skip" leaves
        them out of the selector's loss, whose mean is then over the other slots.
    """

    mixture: Mixture = Mixture()
    confidence: float = 1.0
    weighting: str = "exponential"
    decay: float = 4.0
    smoothing: float = 0.5
    reduction: str | None = None
    truth: str = "data"
    selector: float = 1.0
    missing: str = "inject"

    def __post_init__(self):
        for name, allowed in (
            ("weighting", WEIGHTINGS),
            ("reduction", (None, *REDUCTIONS)),
            ("truth", TRUTHS),
            ("missing", MISSING),
        ):
            check_field(self, name, getattr(self, name) in allowed, f"one of {allowed}")
        at_least(0, self, "confidence", "selector")
        check_field(self, "decay", self.decay > 0, "more than 0")
        check_field(self, "smoothing", 0 <= self.smoothing <= 1, "a share, 0 … 1")

    def compares(self, head: DraftHead) -> bool:
        """Whether the target's distribution is needed."""
        confident = head.confidence is not None and self.confidence
        likeliest = self.truth == "target"
        return bool(self.mixture.kl or self.mixture.total_variation or confident or likeliest)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SelectionSums:
    """Sums over the slots of a selector.

    Attributes:
      loss: weighted sum of its cross-entropy.
      recalled: [P], number of slots whose label is a candidate.
      oracle: sum over blocks of the number of leading slots whose label is a candidate.
      selected: sum over blocks of the number of leading slots where the selector picks the
        label.
      blocks: number of blocks with a supervised slot.
    """

    loss: jax.Array
    recalled: jax.Array
    oracle: jax.Array
    selected: jax.Array
    blocks: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossSums:
    """Sums over positions, which add up exactly over micro-batches and hosts.

    Attributes:
      total: weighted sum of the mixed losses; the loss is `total / weight`.
      weight: its denominator.
      cross_entropy, kl, total_variation, confidence: weighted sums of each.
      accepted: [P], sums of the probability that a slot is accepted if reached, or of the
        label's probability if the target's distribution is not computed; 0 where the data's
        token is outside the draft vocabulary.
      counted: [P], number of supervised slots.
      selection: of the selector; None without one.
    """

    total: jax.Array
    weight: jax.Array
    cross_entropy: jax.Array
    kl: jax.Array
    total_variation: jax.Array
    confidence: jax.Array
    accepted: jax.Array
    counted: jax.Array
    selection: SelectionSums | None = None


def drafter_loss(
    config: LossConfig,
    head: DraftHead,
    vocabulary: Vocabulary,
    blocks: BlockOutput,
    supervised: jax.Array,
    target: jax.Array,
) -> LossSums:
    """The loss of teacher-forced blocks.

    With a draft vocabulary the drafter and the target are compared on it alone: the target's
    distribution is renormalised over the kept tokens. A slot whose label is outside is left out
    of every loss, the confidence's too, as its distribution is undefined. Later slots still
    count: each is predicted given the true tokens.

    Args:
      blocks: from `run_blocks`.
      supervised: [B, A, P] bool.
      target: [B, A, P, M], the target's hidden state before each label, after its final norm.
    """
    batch = len(supervised)
    flat = lambda x: x.reshape(batch, -1, *x.shape[3:])  # noqa: E731
    drafter = jax.tree.map(flat, factors(head, vocabulary, blocks))
    if drafter.latent is not None:
        drafter = dataclasses.replace(drafter, output=head.sequential.output[...])
    labels, known = vocabulary.index(flat(blocks.labels))
    drafted = supervised & known.reshape(supervised.shape)
    if config.truth == "target":
        labels, known = None, jnp.ones_like(known)
    judged = supervised & known.reshape(supervised.shape)
    teacher = flat(target) if config.compares(head) else None

    probability = None
    if config.weighting == "dpace":
        guide = teacher if labels is None else None
        probability = _label_probability(config, vocabulary, drafter, guide, labels, known)
        probability = probability.reshape(supervised.shape)
    known = known.reshape(supervised.shape)
    weights, denominator = position_weights(config, supervised, probability, known)
    flat_weights = flat(weights)

    unembed, judge = vocabulary.unembed, vocabulary.judge
    total, losses = vocabulary_loss(
        config.mixture, drafter, unembed, teacher, labels, flat_weights, judge
    )
    accepted = acceptance(losses)
    selection = None
    if head.config.candidates:
        picks = _picks(config, head, vocabulary, blocks, drafter, losses)
        selection = _selection(config, picks, judged, denominator)
        total += config.selector * selection.loss
        accepted = jnp.where(picks.present, jnp.exp(-picks.cross_entropy), 0)
        accepted = jax.lax.stop_gradient(accepted)
    bce = _confidence_loss(config, head, blocks, accepted, flat_weights)
    total += config.confidence * bce

    def weighted(losses):
        return jnp.float32(0) if losses is None else jnp.sum(flat_weights * losses)

    return LossSums(
        total=total,
        weight=denominator,
        cross_entropy=weighted(losses.cross_entropy),
        kl=weighted(losses.kl),
        total_variation=weighted(losses.total_variation),
        confidence=jax.lax.stop_gradient(bce),
        accepted=jnp.sum(accepted.reshape(drafted.shape) * drafted, axis=(0, 1)),
        counted=jnp.sum(supervised.astype(jnp.float32), axis=(0, 1)),
        selection=jax.lax.stop_gradient(selection),
    )


def _label_probability(config, vocabulary, drafter, guide, labels, known) -> jax.Array:
    """The drafter's probability of every label, [B, R]; constant to differentiation."""
    labels_only = Mixture(1.0, 0.0, 0.0, chunk=config.mixture.chunk)
    frozen, nothing = jax.lax.stop_gradient(drafter), jnp.zeros(known.shape)
    _, losses = vocabulary_loss(
        labels_only, frozen, vocabulary.unembed, guide, labels, nothing, vocabulary.judge
    )
    return jnp.exp(-losses.cross_entropy)


def _picks(config, head, vocabulary, blocks, drafter, losses):
    """The selector's choice among the candidates of every slot."""
    latent = head.teacher_forced(vocabulary, blocks.stream, blocks.previous)
    return choices(
        head,
        vocabulary,
        drafter.hidden,
        latent.reshape(len(latent), -1, *latent.shape[3:]),
        losses.candidates,
        losses.labels,
        missing=config.missing,
        chunk=config.mixture.chunk,
    )


def _confidence_loss(config, head, blocks, accepted, weights) -> jax.Array:
    """Weighted binary cross-entropy of the confidence head; 0 where it is not trained."""
    if head.confidence is None or not config.confidence:
        return jnp.float32(0)
    logits = head.confidence_logits(blocks.stream, blocks.previous)
    each = optax.sigmoid_binary_cross_entropy(logits.reshape(accepted.shape), accepted)
    return jnp.sum(weights * each)


def _selection(
    config: LossConfig, picks: Choices, judged: jax.Array, denominator: jax.Array
) -> SelectionSums:
    """The selector's sums; its loss is over the base loss's denominator."""
    picks = jax.tree.map(lambda x: x.reshape(*judged.shape, *x.shape[2:]), picks)
    present, losses = picks.present & judged, picks.cross_entropy
    slots = present if config.missing == "skip" else judged
    probability = jax.lax.stop_gradient(jnp.exp(-losses))
    weights, own = position_weights(config, slots, probability)
    loss = jnp.sum(weights * losses)
    if config.missing == "skip":  # the mean is over fewer slots than the base loss's
        loss = loss * denominator / jnp.maximum(own, 1e-6)
    return SelectionSums(
        loss=loss,
        recalled=jnp.sum(present.astype(jnp.float32), axis=(0, 1)),
        oracle=jnp.sum(leading_run(present)).astype(jnp.float32),
        selected=jnp.sum(leading_run(picks.right & judged)).astype(jnp.float32),
        blocks=jnp.sum(judged.any(axis=-1).astype(jnp.float32)),
    )


def factors(head: DraftHead, vocabulary: Vocabulary, blocks: BlockOutput) -> Factors:
    """The factors of every slot's final logits, [B, A, P, ...], without the LM head."""
    c = head.config
    options = dict(scale=c.logit_scale, cap=c.logit_softcap, candidates=c.candidates)
    if head.sequential is None or c.candidates:  # a selector has a separate loss
        return Factors(head.normed(blocks.stream), **options)
    latent = head.teacher_forced(vocabulary, blocks.stream, blocks.previous)
    if head.config.sequential == "mlp":  # it replaces the hidden state
        return Factors(latent, **options)
    return Factors(head.normed(blocks.stream), latent, **options)


def acceptance(losses: PositionLosses) -> jax.Array:
    """The probability that a token drawn from the drafter is accepted, [B, R]."""
    if losses.total_variation is None:
        return jnp.exp(-losses.cross_entropy)
    return jnp.clip(1 - losses.total_variation / 2, 0, 1)


def position_weights(
    config: LossConfig,
    supervised: jax.Array,
    label_probability: jax.Array | None = None,
    known: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The weight of each slot.

    Args:
      supervised: [..., A, P] bool.
      label_probability: [..., A, P], the drafter's; only dpace needs it.
      known: [..., A, P] bool, labels that the drafter can draft; None: all. The others have
        weight 0, and under dpace probability 0, as slots after them are hardly ever reached.

    Returns:
      Weights [..., A, P], and the denominator of the weighted sum (`LossConfig.reduction`).
    """
    known = jnp.ones_like(supervised) if known is None else known
    judged, slots = supervised & known, jnp.arange(supervised.shape[-1])
    if config.weighting == "dpace":
        probability = jnp.where(known, label_probability, 0)
        smoothed = (1 - config.smoothing) * probability + config.smoothing
        smoothed = jnp.where(supervised, smoothed, 1)
        reached = jnp.cumprod(smoothed, axis=-1) * judged
        weights = jnp.cumsum(reached[..., ::-1], axis=-1)[..., ::-1] * judged
    else:
        decay = jnp.exp(-slots / config.decay) if config.weighting == "exponential" else 1.0
        weights = judged * jnp.broadcast_to(decay, slots.shape).astype(jnp.float32)
    reduction = config.reduction or ("blocks" if config.weighting == "dpace" else "weights")
    if reduction == "weights":
        return weights, jnp.sum(weights)
    if reduction == "positions":
        return weights, jnp.float32(judged.size)
    counted = judged if reduction == "slots" else judged.any(axis=-1)
    return weights, jnp.sum(counted.astype(jnp.float32))
