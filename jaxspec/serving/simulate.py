"""Simulates the scheduler: its real code, with estimated step times of another machine.

Nothing in it is a measurement. Requests arrive, every round takes the time that a step-time
curve gives, and drafts are accepted with probabilities drawn per request. `decoding.budget`,
the code that the engine runs, chooses the nodes to verify. The simulation shows from which load
on a fixed draft costs more than it gains, and how the schedule reacts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import numpy as np

from jaxspec.decoding.budget import admit, best_size
from jaxspec.decoding.fitting import doubling_sizes
from jaxspec.decoding.staircase import Staircase

Rule = Literal["none", "fixed", "adaptive"]

admit_jit, best_size_jit = jax.jit(admit), jax.jit(best_size)


@dataclasses.dataclass(frozen=True)
class Machine:
    """Lower bounds on a round's time, from bytes moved and arithmetic.

    Defaults: one H100 SXM and Qwen3-8B in bfloat16, decoding at 2048 tokens of context.

    Attributes:
      bytes_per_second, flops_per_second: the machine's peak rates, which no kernel reaches.
      weight_bytes: bytes of weights read once per round.
      cache_bytes: bytes of cache read per row and round.
      flops_per_node: the target's arithmetic per node.
      draft_seconds: seconds of drafting per round with one row, and per further row.
    """

    bytes_per_second: float = 3.35e12
    flops_per_second: float = 989e12
    weight_bytes: float = 16.4e9
    cache_bytes: float = 2048 * 36 * 2 * 8 * 128 * 2.0
    flops_per_node: float = 16.4e9
    draft_seconds: tuple[float, float] = (6e-4, 2e-6)

    def seconds(self, rows: int, nodes: int, *, drafted: bool) -> float:
        """A round's floor: the slower of memory and arithmetic, and drafting."""
        memory = (self.weight_bytes + rows * self.cache_bytes) / self.bytes_per_second
        products = nodes * self.flops_per_node / self.flops_per_second
        first, more = self.draft_seconds
        return max(memory, products) + drafted * (first + more * (rows - 1))

    def staircase(self, rows: int, per_row: int, max_nodes: int) -> Staircase:
        """The staircase of an engine's batch of `rows`."""
        sizes = doubling_sizes(rows, per_row, max_nodes)
        return Staircase.of(
            sizes, [self.seconds(rows, s.total, drafted=s.per_row > 1) for s in sizes]
        )


@dataclasses.dataclass(frozen=True)
class Simulated:
    """A simulation's result, in simulated seconds.

    Attributes:
      tokens_per_second: over all requests.
      per_token: mean seconds per token as a request sees them, from its slot on.
      first_token: mean seconds from a request's arrival to the end of its first round, the
        wait for a slot included; a prompt itself takes no time.
      nodes_per_row: mean nodes verified per row and round, root included.
      tau: mean tokens committed per row and round.
    """

    tokens_per_second: float
    per_token: float
    first_token: float
    nodes_per_row: float
    tau: float


def simulate(
    machine: Machine,
    rule: Rule,
    arrivals: Sequence[float],
    *,
    slots: int,
    tokens: int = 256,
    depth: int = 7,
    max_nodes: int = 2048,
    acceptance: tuple[float, float] = (6.0, 2.0),
    age: int = 2,
    seed: int = 0,
) -> Simulated:
    """Serves requests that draft chains.

    Args:
      arrivals: seconds at which requests arrive; all 0 for a closed batch.
      tokens: new tokens of each.
      depth: tokens drafted per round.
      max_nodes: of all rows in a round.
      acceptance: parameters (a, b) of the Beta distribution of a request's acceptance
        probability per drafted token; (6, 2) has mean 0.75. Each round's probabilities vary
        around it, and the drafter's confidence equals them: it is calibrated.
      age: rounds between a draft and the verify size that it informs.
    """
    dice = np.random.default_rng(seed)
    chance = dice.beta(*acceptance, size=len(arrivals))
    waiting = sorted(range(len(arrivals)), key=lambda i: arrivals[i])
    stairs = {r: machine.staircase(r, depth + 1, max_nodes) for r in _buckets(slots)}
    running: list[int] = []
    left = np.full(len(arrivals), tokens)
    started = np.zeros(len(arrivals))
    old: dict[int, list[np.ndarray]] = {}
    now, spent, first, nodes, rounds, committed = 0.0, [], [], 0, 0, 0
    while waiting or running:
        while waiting and len(running) < slots and arrivals[waiting[0]] <= now:
            running.append(waiting.pop(0))
            started[running[-1]] = now
        if not running:
            now = arrivals[waiting[0]]
            continue
        bucket = next(r for r in _buckets(slots) if r >= len(running))
        confidence = _confidences(dice, chance[running], depth)
        fresh = np.zeros((bucket, depth), np.float32)
        fresh[: len(running)] = np.cumprod(confidence, axis=1)
        known = np.zeros_like(fresh)
        for i, request in enumerate(running):
            past = old.setdefault(request, [])
            known[i] = past[-age] if len(past) >= age else fresh[: len(running)].mean(0)
            past.append(fresh[i])
            del past[:-age]
        size, kept = _decide(rule, stairs[bucket], fresh, known, len(running), depth)
        seconds = float(stairs[bucket].seconds[size])
        passed = np.cumprod(dice.random(confidence.shape) < confidence, axis=1).sum(1)
        decided = np.minimum(np.minimum(passed, kept[: len(running)]) + 1, left[running])
        now += seconds
        nodes += len(running) + kept[: len(running)].sum()
        rounds += len(running)
        committed += decided.sum()
        first += [now - arrivals[request] for request in running if left[request] == tokens]
        left[running] -= decided
        for request in [r for r in running if left[r] == 0]:
            running.remove(request)
            spent.append((now - started[request]) / tokens)
            del old[request]
    return Simulated(
        tokens_per_second=float(committed / (now - min(arrivals))),
        per_token=float(np.mean(spent)),
        first_token=float(np.mean(first)),
        nodes_per_row=float(nodes / rounds),
        tau=float(committed / rounds),
    )


def _decide(rule, staircase, fresh, known, rows, depth) -> tuple[int, np.ndarray]:
    """Index of the round's size, and drafted nodes of each row."""
    totals = np.asarray(staircase.totals)
    if rule == "none":
        return 0, np.zeros(len(fresh), int)
    if rule == "fixed":
        kept = np.where(np.arange(len(fresh)) < rows, depth, 0)
        needed = min(rows * (depth + 1), totals[-1])
        kept = np.minimum(kept, needed // rows - 1)
        return int(np.searchsorted(totals, needed)), kept
    size = int(best_size_jit(known, rows, staircase))
    kept = admit_jit(fresh, totals[size] - rows, staircase.per_row[size] - 1)
    return size, np.asarray(kept)


def _confidences(dice, chance: np.ndarray, depth: int) -> np.ndarray:
    """This round's acceptance probabilities per slot, around each request's own."""
    spread = 8.0
    return dice.beta(spread * chance, spread * (1 - chance), size=(depth, len(chance))).T


def _buckets(slots: int) -> list[int]:
    rows = [1]
    while rows[-1] < slots:
        rows.append(min(2 * rows[-1], slots))
    return rows
