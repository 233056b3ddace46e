"""Limits of an engine."""

from __future__ import annotations

import dataclasses

from jaxspec.arguments import at_least, check_field
from jaxspec.config import TargetConfig
from jaxspec.decoding.schedule import Adaptive, Fixed, Schedule


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Limits of an engine; its memory follows from them.

    Caches hold `room` tokens for every slot and for one prompt in prefill, and half of the
    slots a second time while a batch grows. `Engine.warm_up` reaches that peak.

    Attributes:
      slots: maximum requests decoded together.
      room: maximum tokens of a prompt and its answer together.
      queue: maximum requests that wait for a slot.
      schedule: `Fixed` or `Adaptive`; None is adaptive if there is a drafter.
      budget: nodes per row, root included, with a fixed schedule; the whole tree if None.
      max_nodes: maximum nodes of all rows in one round, with an adaptive schedule.
      chunk: prompt tokens per forward. Between two bursts at least one chunk runs, and more for
        at most as long as the last burst took.
      rounds: decode rounds per burst; tokens are returned after each burst.
      rejection: see `jaxspec.generate`.
      throughput: optimises for many answers rather than latency. The batch always has a row for
        every slot, so one set of programs is compiled, and free rows are filled before the
        others go on.
      top_logprobs: maximum alternative tokens whose log-probabilities requests may ask for; 0
        turns log-probabilities off. Each takes 8 bytes per position of `room` and row.
      prefix_cache_mb: MiB for prompt prefixes (`serving.prefix_cache`); None: half of the
        memory of the slots' rows; 0: no prefix cache.
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

    def __post_init__(self):
        for name in ("top_logprobs", "prefix_cache_mb"):
            value = getattr(self, name)
            good = value is None or 0 <= value < float("inf")
            check_field(self, name, good, "at least 0")
        at_least(1, self, "slots", "room", "queue", "max_nodes", "chunk", "rounds")

    def check_room(self, target: TargetConfig) -> None:
        """Raises ValueError if a request may be longer than the target's positions."""
        if self.room > target.max_positions:
            raise ValueError(
                f"room is {self.room} tokens per request; the target has "
                f"{target.max_positions} positions"
            )

    def resolved(self, target: TargetConfig, size: int) -> EngineConfig:
        """Fills in schedule and budget, for a drafter whose trees have `size` nodes.

        Raises:
          ValueError: `room` exceeds the target's positions, or the budget or the schedule does
            not fit the drafter.
        """
        schedule = self.schedule or (Adaptive() if size > 1 else Fixed())
        if isinstance(schedule, Adaptive) and size < 2:
            raise ValueError("an adaptive schedule needs a drafter; use Fixed without one")
        if self.budget is not None and not isinstance(schedule, Fixed):
            raise ValueError(f"budget is {self.budget}, but the schedule is not Fixed")
        if self.budget is not None and not 1 <= self.budget <= size:
            raise ValueError(f"budget is {self.budget}; the drafter's trees have 1 … {size}")
        self.check_room(target)
        budget = size if self.budget is None else self.budget
        top = min(self.top_logprobs, target.vocab_size)
        return dataclasses.replace(self, schedule=schedule, budget=budget, top_logprobs=top)
