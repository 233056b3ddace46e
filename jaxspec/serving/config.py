"""Limits of an engine."""

from __future__ import annotations

import dataclasses

from jaxspec.config import TargetConfig, at_least, check_field
from jaxspec.decoding.schedule import Adaptive, Fixed, Schedule


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Limits of an engine; its memory follows from them.

    Caches hold `room` tokens for every slot and for the prompt being prefilled; while a batch
    grows they also hold half of the slots a second time. `Engine.warm_up` reaches that peak.

    Attributes:
      slots: requests decoded together, at most.
      room: maximum tokens of a prompt and its answer together.
      queue: maximum requests that wait for a slot.
      schedule: `Fixed` or `Adaptive`; None is adaptive where there is something to draft.
      budget: nodes per row, root included, with a fixed schedule; the whole tree if None.
      max_nodes: of all rows in one round, with an adaptive schedule.
      chunk: prompt tokens per forward. Between two bursts, chunks run for at most as long as a
        burst took, and at least one does.
      rounds: decode rounds per burst; tokens are returned after each burst.
      rejection: see `jaxspec.generate`.
      throughput: nobody waits for a single answer. The batch then always has a row for every
        slot, so that one set of programs is compiled, and free rows are filled before the
        others go on.
      top_logprobs: alternatives whose log-probabilities requests may ask for, beside those of
        the answer's tokens; 0 keeps none of either. What is kept takes 8 bytes for each of them
        at every place of `room`.
      prefix_cache_mb: MiB for prefixes of prompts that need not be run again
        (`serving.prefix_cache`); None is half of what the slots' rows take, 0 keeps none.
    """

    slots: int = 8
    room: int = 1024
    queue: int = 64
    schedule: Schedule | None = None
    budget: int | None = None
    max_nodes: int = 128
    chunk: int = 64
    rounds: int = 1
    rejection: bool = False
    throughput: bool = False
    top_logprobs: int = 0
    prefix_cache_mb: float | None = 0.0
    implementation: str | None = None

    def __post_init__(self):
        for name in ("top_logprobs", "prefix_cache_mb"):
            value = getattr(self, name)
            good = value is None or 0 <= value < float("inf")
            check_field(self, name, good, "at least 0")
        at_least(1, self, "slots", "room", "queue", "max_nodes", "chunk", "rounds")

    def resolved(self, target: TargetConfig, size: int) -> EngineConfig:
        """With a schedule and a budget, for a drafter whose trees have `size` nodes.

        Raises:
          ValueError: the room passes the target's positions, or the budget or the schedule does
            not fit the drafter.
        """
        schedule = self.schedule or (Adaptive() if size > 1 else Fixed())
        if isinstance(schedule, Adaptive) and size < 2:
            raise ValueError("an adaptive schedule needs a drafter; use Fixed without one")
        if self.budget is not None and not isinstance(schedule, Fixed):
            raise ValueError(f"budget is {self.budget}, but the schedule is not Fixed")
        if self.budget is not None and not 1 <= self.budget <= size:
            raise ValueError(f"budget is {self.budget}; the drafter's trees have 1 … {size}")
        if self.room > target.max_positions:
            raise ValueError(
                f"room is {self.room} tokens per request; the target has "
                f"{target.max_positions} positions"
            )
        budget = size if self.budget is None else self.budget
        top = min(self.top_logprobs, target.vocab_size)
        return dataclasses.replace(self, schedule=schedule, budget=budget, top_logprobs=top)
