"""Calibration of a confidence head: sequential temperature scaling, and calibration error.

The head predicts, slot by slot, whether a drafted token is accepted if all before it are. Its
survival probability for slot k is the product up to k, which must be calibrated for a schedule
to compare requests by it. Temperatures are fitted left to right on rounds of real decoding in
which the whole chain was verified.

Source: DSpark (arXiv 2607.05147) §3.2.1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxspec.config import TreeConfig
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.evaluation.metrics import calibration_error, reliability_bins
from jaxspec.evaluation.walk import RecordedAnswer, observe_batches, tabulate, walk
from jaxspec.models.target import Target

BINS = 20
GRID = np.geomspace(0.25, 4.0, 81)  # contains 1: scaling never makes the fitted rounds worse
DRAWS = 400  # simulated draws of the calibration error by chance


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """Rounds in which a whole chain was verified.

    Attributes:
      logits: [R, P] float64, of the head.
      accepted: [R] int, drafted tokens accepted, 0 … P.
      limit: [R] int, number of slots with a known outcome: if a text ends within the block, it
        is unknown for later slots.
    """

    logits: np.ndarray
    accepted: np.ndarray
    limit: np.ndarray

    def __post_init__(self):
        if self.logits.ndim != 2 or not len(self.logits):
            raise ValueError(
                f"rollouts have logits of shape {self.logits.shape}; expected [R, P] with R > 0"
            )

    def survived(self, slot: int) -> tuple[np.ndarray, np.ndarray]:
        """Masks [R] bool: rounds in which the slot's outcome is known, and in which it
        survives."""
        return self.limit > slot, self.accepted > slot


def survival_of(logits: np.ndarray, temperatures: Sequence[float]) -> np.ndarray:
    """Survival probabilities [R, P] of logits [R, P] under temperatures [P]."""
    return np.cumprod(1 / (1 + np.exp(-logits / np.asarray(temperatures))), axis=1)


def fit_temperatures(rollouts: Rollouts) -> np.ndarray:
    """Sequential temperature scaling: [P], each the best of `GRID` given those before it.

    T_k minimises the calibration error of the survival of slot k, T_1 … T_{k-1} held fixed.
    Ties go to the temperature nearest 1. T_k stays 1 if the error at temperature 1 is within
    the 95th percentile of a calibrated head (`chance_error`): the best of 81 temperatures would
    then only fit noise.
    """
    grid = sorted(GRID, key=lambda t: abs(np.log(t)))
    temperatures, before = [], np.ones(len(rollouts.logits))
    for slot in range(rollouts.logits.shape[1]):
        known, happened = rollouts.survived(slot)
        options = [before / (1 + np.exp(-rollouts.logits[:, slot] / t)) for t in grid]
        errors = [
            calibration_error(reliability_bins(p[known], happened[known], count=BINS))
            for p in options
        ]
        _, most = chance_error(options[0][known])  # grid[0] is 1
        best = 0 if errors[0] <= most else int(np.argmin(errors))
        temperatures.append(float(grid[best]))
        before = options[best]
    return np.array(temperatures)


@dataclasses.dataclass(frozen=True)
class Quality:
    """Quality of one slot's survival probabilities.

    Attributes:
      rounds: number of rounds in which the slot's outcome is known.
      predicted, happened: mean predicted survival, and share that survived.
      ece: expected calibration error, with `BINS` equal bins.
      chance: mean `ece` of calibrated probabilities on as many rounds.
      auroc: probability that a survival gets a higher prediction than a non-survival; nan if
        all or none survived.
      brier: mean squared error.
      bins: [BINS, 3], see `metrics.reliability_bins`: the reliability diagram.
    """

    rounds: int
    predicted: float
    happened: float
    ece: float
    chance: float
    auroc: float
    brier: float
    bins: list[list[float]]


def assess(rollouts: Rollouts, temperatures: Sequence[float] | float = 1.0) -> list[Quality]:
    """`Quality` of every slot."""
    depth = rollouts.logits.shape[1]
    predicted = survival_of(rollouts.logits, np.broadcast_to(temperatures, depth))
    rows = []
    for slot in range(depth):
        known, happened = rollouts.survived(slot)
        p, y = predicted[known, slot], happened[known]
        bins = reliability_bins(p, y, count=BINS)
        rows.append(
            Quality(
                rounds=int(known.sum()),
                predicted=float(p.mean()) if p.size else float("nan"),
                happened=float(y.mean()) if p.size else float("nan"),
                ece=calibration_error(bins),
                chance=chance_error(p)[0],
                auroc=auroc(p, y),
                brier=float(np.mean((p - y) ** 2)) if p.size else float("nan"),
                bins=bins.tolist(),
            )
        )
    return rows


def chance_error(predicted: np.ndarray) -> tuple[float, float]:
    """Mean and 95th percentile of the calibration error if these probabilities [R] were true.

    It is not zero on a finite sample, and shrinks with more rounds.
    """
    dice = np.random.default_rng(0)
    errors = [
        calibration_error(
            reliability_bins(predicted, dice.random(len(predicted)) < predicted, count=BINS)
        )
        for _ in range(DRAWS)
    ]
    return float(np.mean(errors)), float(np.quantile(errors, 0.95))


def auroc(predicted: np.ndarray, happened: np.ndarray) -> float:
    """Area under the ROC curve, ties counted half; nan if all or none happened.

    >>> auroc(np.array([0.1, 0.4, 0.4, 0.9]), np.array([False, False, True, True]))
    0.875
    """
    positives = int(happened.sum())
    negatives = len(happened) - positives
    if not positives or not negatives:
        return float("nan")
    _, inverse, counts = np.unique(predicted, return_inverse=True, return_counts=True)
    rank = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # mean rank of equal values, from 1
    above = rank[happened].sum() - positives * (positives + 1) / 2
    return float(above / (positives * negatives))


def rollouts(
    target: Target,
    drafter: LoadedDrafter,
    answers: Sequence[RecordedAnswer],
    *,
    batch: int = 8,
) -> Rollouts:
    """The rounds in which decoding would write these answers, with the head's logits.

    Args:
      drafter: a block drafter with a confidence head; its greedy chain of full depth is used,
        whatever its tree.
      answers: the target's own (`walk.record`).

    Raises:
      ValueError: the drafter has no confidence head.
    """
    static = drafter.drafter
    if static.head_config is None or static.head_config.confidence is None:
        raise ValueError(
            f"{static} has no confidence head to calibrate; train a drafter with one (family "
            "dspark)"
        )
    depth = static.depth
    chain = dataclasses.replace(
        static, tree=TreeConfig("chain", size=depth + 1), survival_scores=True
    )
    # Raw logits: no temperatures, and no rule that would shorten the chain.
    params = dataclasses.replace(
        drafter.params,
        threshold=jnp.float32(0),
        survival=jnp.float32(0),
        temperatures=jnp.float32(1),
    )
    logits, accepted, limit = [], [], []
    loaded = LoadedDrafter(chain, params)
    for some, seen in observe_batches(target, [loaded], answers, batch=batch):
        tables = tabulate(seen, some, loaded, *seen.states)
        for answer, table in zip(some, tables, strict=True):
            _, visited = walk(answer, table, chain.size)
            anchors = np.array(visited, int)
            logits.append(_logit(np.diff(table.scores[anchors, 1:], axis=1, prepend=0.0)))
            accepted.append((table.nodes[anchors] < chain.size).sum(axis=1))
            known = len(answer.tokens) - answer.start - 1 - anchors
            limit.append(np.minimum(depth, known))
    return Rollouts(*map(np.concatenate, (logits, accepted, limit)))


def _logit(log_p: np.ndarray) -> np.ndarray:
    """Logits of log-probabilities, kept finite."""
    log_p = np.clip(log_p.astype(float), -30.0, -1e-9)
    return log_p - np.log(-np.expm1(log_p))


def draw_reliability(rows: Sequence[tuple[str, Sequence[Quality]]], path: str | Path) -> None:
    """Writes a picture: predicted against observed survival, one panel per slot.

    Args:
      rows: named assessments, drawn in one plot: before and after calibration.
      path: of a PNG or SVG; needs the extra 'plots'.
    """
    from matplotlib.figure import Figure

    slots = len(rows[0][1])
    figure = Figure(figsize=(2.4 * slots, 2.8), layout="constrained")
    panels = figure.subplots(1, slots, sharey=True, squeeze=False)[0]
    for slot, axes in enumerate(panels):
        axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
        for name, qualities in rows:
            bins = np.array(qualities[slot].bins)
            nodes, predicted, happened = bins[bins[:, 0] > 0].T
            label = f"{name}, ECE {qualities[slot].ece:.3f}"
            axes.plot(predicted / nodes, happened / nodes, marker=".", label=label)
        axes.set(
            title=f"slot {slot + 1}", xlabel="predicted survival", xlim=(0, 1), ylim=(0, 1)
        )
        axes.legend(fontsize=6)
    panels[0].set_ylabel("observed")
    figure.savefig(path, dpi=120)
