"""Numbers of an evaluation: ratios of sums over prompts, with bootstrap intervals.

Every metric here is a ratio of two sums over prompts, so a resampling of prompts is a row of
weights: `weights @ numerator / weights @ denominator`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A value and its bootstrap interval over prompts."""

    value: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        """'2.31 [2.20, 2.43]' with spec '.2f'."""
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def resamplings(sizes: Sequence[int]) -> np.ndarray:
    """How often each prompt is drawn: [1 + RESAMPLES, sum(sizes)], the first row all ones.

    Prompts are drawn with replacement within each set (a stratified bootstrap). The draws
    depend only on the sizes, so decoders that answered the same prompts share resamplings, and
    intervals of their ratios are paired.
    """
    random = np.random.default_rng(0)
    parts = [random.multinomial(n, np.full(n, 1 / n), RESAMPLES) for n in sizes]
    drawn = np.concatenate(parts, axis=1).astype(float)
    return np.concatenate([np.ones((1, drawn.shape[1])), drawn])


def ratio(numerator: np.ndarray, denominator: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Pooled ratio on every resampling, [1 + RESAMPLES]; nan where nothing was counted."""
    top, bottom = weights @ np.asarray(numerator), weights @ np.asarray(denominator)
    return np.divide(top, bottom, out=np.full(top.shape, np.nan), where=bottom > 0)


def estimate(draws: np.ndarray) -> Estimate:
    """The first draw as the value, the others as its interval (percentiles)."""
    tail = 100 * (1 - LEVEL) / 2
    rest = draws[1:][~np.isnan(draws[1:])]
    low, high = np.percentile(rest, [tail, 100 - tail]) if rest.size else (np.nan, np.nan)
    return Estimate(float(draws[0]), float(low), float(high))


def survival_by_depth(committed: np.ndarray) -> np.ndarray:
    """Share of rounds that accepted at least k drafted tokens, k = 1, 2, ….

    Args:
      committed: [K] rounds that committed 0, 1, 2, … tokens, bonus included. A round that met
        a stop id has no bonus and counts as having accepted one token fewer.

    >>> survival_by_depth(np.array([0, 2, 1, 1]))
    array([0.5 , 0.25])
    """
    at_least = np.cumsum(committed[::-1])[::-1]
    return at_least[2:] / max(committed.sum(), 1)


def conditional(survival: np.ndarray) -> np.ndarray:
    """Share that accepts depth k among the rounds that accepted all before; nan if none did.

    >>> conditional(np.array([0.5, 0.25]))
    array([0.5, 0.5])
    """
    before = np.concatenate([[1.0], survival[:-1]])
    return np.divide(survival, before, out=np.full(survival.shape, np.nan), where=before > 0)


def effective_acceptance(tau: float, drafted: float) -> float:
    """The rate alpha at which a chain of `drafted` independent tokens would reach tau.

    Solves tau = (1 - alpha^(g + 1)) / (1 - alpha) for g = `drafted`, JetSpec's draft budget:
    for a tree that is its nodes without the root, so a tree that gains little from its nodes
    has a low rate.

    Args:
      tau: tokens per round, bonus included.
      drafted: drafted nodes per round.

    >>> round(effective_acceptance(1.75, 2), 6)
    0.5
    """
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _expected(middle, drafted) < tau else (low, middle)
    return (low + high) / 2


def theoretical_speedup(alpha: float, drafted: float, cost: float) -> float:
    """(1 - alpha^(g + 1)) / ((1 - alpha) (g c + 1)): the speedup if verification were free.

    It assumes that verifying g + 1 nodes costs as much as a forward of one token. The gap to
    the measured speedup is the cost of verification (and the host).

    Args:
      drafted: g, drafted nodes per round.
      cost: c, of a drafted node, in forwards of the target: drafting's time over g forwards.
    """
    return _expected(alpha, drafted) / (drafted * cost + 1)


def _expected(alpha: float, drafted: float) -> float:
    if alpha > 1 - 1e-9:
        return drafted + 1
    return (1 - alpha ** (drafted + 1)) / (1 - alpha)


def reliability_bins(
    predicted: np.ndarray, happened: np.ndarray, *, count: int = 10
) -> np.ndarray:
    """Bins of a reliability diagram, [count, 3]: nodes, sum predicted, sum happened.

    Args:
      predicted: probabilities, any shape.
      happened: bool, of the same shape.
    """
    place = np.minimum((predicted * count).astype(int), count - 1).ravel()
    columns = np.ones(place.size), predicted.ravel(), happened.ravel()
    return np.stack([np.bincount(place, column, count) for column in columns], axis=1)


def calibration_error(bins: np.ndarray) -> float:
    """Expected calibration error: the mean |predicted - happened| of a node's bin."""
    nodes = max(bins[:, 0].sum(), 1)
    return float(np.abs(bins[:, 1] - bins[:, 2]).sum() / nodes)
