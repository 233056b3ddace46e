"""Results by decoder, with the prompts of all sets concatenated."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import numpy as np

from jaxspec.evaluation import metrics as m
from jaxspec.evaluation.results import (
    PLAIN,
    Branches,
    Costs,
    Reliability,
    Rounds,
    Row,
    RunSettings,
    Verify,
)

ALL = "all"


@dataclasses.dataclass(frozen=True, eq=False)  # compared by identity
class Line:
    """One decoder at one temperature and budget: one `Rounds` per set, in the file's order."""

    parts: tuple[Rounds, ...]

    @property
    def label(self) -> Rounds:
        """Any part; the decoder's fields are equal in all."""
        return self.parts[0]

    @property
    def sets(self) -> tuple[str, ...]:
        return tuple(part.set for part in self.parts)

    def of(self, name: str) -> Line:
        """The line of one set, or itself for `ALL`."""
        return self if name == ALL else Line(tuple(p for p in self.parts if p.set == name))

    @functools.cached_property
    def weights(self) -> np.ndarray:
        return m.resamplings([len(part.nodes) for part in self.parts])

    def column(self, get) -> np.ndarray:
        """Values of `get(part)`, concatenated over parts, [prompts]."""
        return np.concatenate([np.asarray(get(part), float) for part in self.parts])

    @functools.cached_property
    def tau(self) -> np.ndarray:
        """Pooled over rounds, on every resampling."""
        decided = self.column(Rounds.decided)
        return m.ratio(decided, self.column(Rounds.rounds), self.weights)

    @functools.cached_property
    def rate(self) -> np.ndarray:
        """Tokens per second, on every resampling."""
        seconds = self.column(lambda part: part.seconds)
        return m.ratio(self.column(lambda part: part.tokens), seconds, self.weights)

    @property
    def nodes(self) -> float:
        """Nodes verified per round, root included; nan without a round."""
        nodes = self.column(lambda p: p.nodes)
        return float(m.ratio(nodes, self.column(Rounds.rounds), self.weights[:1])[0])

    @property
    def verify_rate(self) -> float:
        """Tokens committed per node verified; nan without a round."""
        nodes = self.column(lambda p: p.nodes)
        return float(m.ratio(self.column(Rounds.decided), nodes, self.weights[:1])[0])

    @property
    def survival(self) -> np.ndarray:
        """Share of rounds that accepted at least 1, 2, … drafted tokens."""
        histograms = [part.histogram().sum(axis=0) for part in self.parts]
        width = max(map(len, histograms))
        return m.survival_by_depth(sum(np.pad(h, (0, width - len(h))) for h in histograms))

    @property
    def alpha(self) -> float:
        return m.effective_acceptance(self.tau[0], self.nodes - 1)

    @property
    def equal(self) -> str:
        same = self.column(lambda part: part.equal)
        return f"{int(same.sum())}/{same.size}"


def mean_of_sets(line: Line) -> float:
    """Tau averaged over sets with equal weight."""
    return float(np.mean([line.of(name).tau[0] for name in line.sets]))


class View:
    """The rows of a file.

    Raises:
      ValueError: the decoders did not answer the same prompts, once each.
    """

    def __init__(self, rows: Iterable[Row]):
        rows = list(rows)
        self.setups = [row.fields for row in rows if isinstance(row, RunSettings)]
        self.costs = [row for row in rows if isinstance(row, Costs)]
        self.verify = [row for row in rows if isinstance(row, Verify)]
        self.branches = [row for row in rows if isinstance(row, Branches)]
        self.reliability = [row for row in rows if isinstance(row, Reliability)]
        groups: dict[tuple, list[Rounds]] = {}
        for row in rows:
            if isinstance(row, Rounds):
                key = row.how, row.temperature, row.decoder, row.budget
                groups.setdefault(key, []).append(row)
        self.lines = [Line(tuple(parts)) for parts in groups.values()]
        _check_prompts(self.lines)
        self.sets = list(dict.fromkeys(part.set for line in self.lines for part in line.parts))

    @property
    def temperatures(self) -> list[float]:
        return list(dict.fromkeys(line.label.temperature for line in self.lines))

    def select(self, how: str, temperature: float) -> list[Line]:
        return [
            line
            for line in self.lines
            if (line.label.how, line.label.temperature) == (how, temperature)
        ]

    def tau_lines(self, temperature: float) -> list[Line]:
        """Replayed rounds if there are any, else decoded ones; without plain decoding."""
        lines = self.select("walk", temperature) or self.select("decode", temperature)
        return [line for line in lines if not is_plain(line)]

    def cost(self, line: Line) -> Costs | None:
        """Costs of a line's decoder."""
        key = line.label.decoder, line.label.budget
        return next((c for c in self.costs if (c.decoder, c.budget) == key), None)

    def plain_ms(self) -> float | None:
        """Milliseconds of a round of the fastest plain decoding."""
        rounds = [total(c) for c in self.costs if c.decoder == PLAIN]
        return min(rounds, default=None)

    def theoretical(self, line: Line) -> float | None:
        """`metrics.theoretical_speedup`, from the measured cost of drafting."""
        cost, plain, drafted = self.cost(line), self.plain_ms(), line.nodes - 1
        if cost is None or plain is None or not drafted > 0:  # nan without a round
            return None
        drafting = cost.phases["draft"] + (cost.phases["grow"] or 0.0)
        return m.theoretical_speedup(line.alpha, drafted, drafting / plain / drafted)


def _check_prompts(lines: Sequence[Line]) -> None:
    first: dict[tuple, Line] = {}
    for line in lines:
        one = line.label
        other = first.setdefault((one.how, one.temperature), line)
        found, expected = (
            [(part.set, len(part.nodes)) for part in x.parts] for x in (line, other)
        )
        if found != expected:
            raise ValueError(
                f"decoder {one.decoder!r} with budget {one.budget} has {one.how} rows of "
                f"{found}, but {other.label.decoder!r} of {expected} (set, prompts): a run was "
                "cut short, or runs on different prompts were merged; measure again, or remove "
                "the lines that do not match"
            )
        if len(set(line.sets)) < len(line.sets):
            raise ValueError(
                f"decoder {one.decoder!r} with budget {one.budget} has {one.how} rows of one "
                f"set twice ({', '.join(line.sets)}); report on one run at a time, or give "
                "decoders different names"
            )


def is_plain(line: Line) -> bool:
    return line.label.drafter == PLAIN


def best_plain(lines: Sequence[Line]) -> Line:
    """The form of plain decoding with the most tokens per second over all prompts.

    Forms of this library only: `plain` decoders are named so.
    """
    forms = [x for x in lines if is_plain(x) and x.label.decoder.startswith("plain")]
    return max(forms, key=lambda line: line.rate[0])


def largest_budgets(lines: Iterable[Line]) -> list[Line]:
    """Each decoder's line with the largest budget, in order of decoders."""
    found: dict[str, Line] = {}
    for line in lines:
        known = found.setdefault(line.label.decoder, line)
        if line.label.budget > known.label.budget:
            found[line.label.decoder] = line
    return list(found.values())


def total(cost: Costs) -> float:
    """Milliseconds of a round."""
    return sum(ms or 0.0 for ms in cost.phases.values())


def pairs(lines: Sequence[Line], against: Sequence[str] = ()) -> list[tuple[Line, Line]]:
    """Pairs of lines for a paired comparison.

    Every tree is compared with the chains and `top_budget` trees of its drafter, with or
    without the sequential head, at equal budget and dtype; and every decoder with those named
    in `against`, at equal budget.
    """

    def compared(line: Line, other: Line) -> bool:
        a, b = line.label, other.label
        if a.budget != b.budget or a.decoder == b.decoder or line.sets != other.sets:
            return False
        own = (a.drafter, a.dtype) == (b.drafter, b.dtype)
        trees = b.tree == "chain" or (b.tree == "top_budget" and a.tree != "chain")
        return (own and trees and a.tree is not None) or b.decoder in against

    return [(line, other) for other in lines for line in lines if compared(line, other)]
