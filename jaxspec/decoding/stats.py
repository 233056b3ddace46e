"""Counts of one request's rounds and tokens, from which all published metrics follow."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class DecodeStats:
    """Counts of one request.

    Attributes:
      committed: tokens committed by each round, bonus included. A last round counts in full if
        `max_new_tokens` cut it short, and up to the stop id if it met one.
      nodes: nodes verified in all, roots included, padding excluded.
    """

    committed: tuple[int, ...]
    nodes: int

    @property
    def rounds(self) -> int:
        """Forwards of the target after the prompt."""
        return len(self.committed)

    @property
    def tau(self) -> float:
        """Mean tokens committed per round, bonus included; 0 when no round ran."""
        return sum(self.committed) / self.rounds if self.rounds else 0.0

    def first(self, tokens: int) -> DecodeStats:
        """Counts of the rounds that committed the first `tokens` of an answer.

        The answer's first token comes from prefill. `nodes` stays the same, as the other
        rounds' nodes were verified too.
        """
        kept, left = [], tokens - 1
        for count in self.committed:
            if left <= 0:
                break
            kept.append(min(count, left))
            left -= count
        return DecodeStats(tuple(kept), self.nodes)


def pooled_tau(stats: list[DecodeStats]) -> float:
    """Tokens per round over all rounds of all requests, as papers report it."""
    rounds = sum(s.rounds for s in stats)
    return sum(sum(s.committed) for s in stats) / rounds if rounds else 0.0
