"""The host's view of the running batch: its number of rows, and each row's request."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from jaxspec.decoding.schedule import Batch
from jaxspec.decoding.stats import DecodeStats
from jaxspec.serving.matcher import Matcher
from jaxspec.serving.programs import Programs
from jaxspec.serving.requests import Finish, Request, TokenLogProb, Update

SHRINK_AFTER = 8  # consecutive rounds with too many rows


@dataclasses.dataclass
class Running:
    """A request that has a row, or waits for one.

    Attributes:
      submitted: time of submission, by time.perf_counter().
      stop_ids: ids that end the answer.
      length: tokens returned so far, prompt included.
      matcher: the answer's position in its grammar, if it has one.
      paused: whether its row has stopped where its grammar begins, and can go on.
    """

    id: int
    request: Request
    submitted: float
    stop_ids: Sequence[int]
    length: int
    matcher: Matcher | None = None
    paused: bool = False

    @property
    def restricting(self) -> Matcher | None:
        """The matcher, if it restricts the next token."""
        return None if self.matcher is None or self.matcher.waiting else self.matcher

    def advance(self, tokens: Sequence[int], logprobs: tuple[TokenLogProb, ...] = ()) -> Update:
        """Adds tokens to the answer; returns the request's update.

        Args: logprobs: of the tokens, if asked for.
        """
        self.length += len(tokens)
        failure = None
        if self.matcher is not None:
            free = self.matcher.waiting
            self.matcher.advance(tokens)
            self.paused = free and not self.matcher.waiting
            failure = self.matcher.failure
        finish: Finish | None = None  # as the device decides, but for failures
        if failure is not None:
            finish = "stuck"
        elif tokens and tokens[-1] in self.stop_ids:
            finish = "stop"
        elif self.length == len(self.request.prompt) + self.request.max_new_tokens:
            finish = "length"
        return Update(self.id, tuple(tokens), finish, logprobs=logprobs, failure=failure)


class RunningRows:
    """The rows of a batch, in one of the programs' bucket sizes.

    Attributes:
      batch: the batch on the device; None before `open`.
      requests: the request of every row; None for a free row.
    """

    def __init__(self, programs: Programs):
        self._programs = programs
        self.batch: Batch | None = None
        self.requests: list[Running | None] = [None] * programs.buckets[0]
        self._idle_rounds = 0

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def taken(self) -> Iterator[tuple[int, Running]]:
        """Pairs of row and request, without free rows."""
        return ((i, x) for i, x in enumerate(self.requests) if x is not None)

    @property
    def running(self) -> int:
        """Number of rows with a request."""
        return sum(1 for _ in self.taken)

    @property
    def grown(self) -> bool:
        """Whether there are more rows than in the smallest batch."""
        return len(self) > self._programs.buckets[0]

    def open(self) -> None:
        """Creates the batch, with all rows free."""
        self.batch = self._programs.empty(len(self))

    def lengths(self) -> np.ndarray:
        """Tokens returned so far, [B] int32; 0 for free rows."""
        return np.array([x.length if x else 0 for x in self.requests], np.int32)

    def place(self, running: Running, fresh: Batch, may_have: Callable[[int], bool]) -> bool:
        """Gives a prefilled request a row, in a larger batch if need be.

        Args:
          may_have: whether a batch may have this number of rows.

        Returns:
          Whether a row was found.
        """
        if self.running == len(self):
            larger = [n for n in self._programs.buckets if n > len(self)]
            if not larger or not may_have(larger[0]):
                return False
            self._resize(larger[0])
        row = self.requests.index(None)
        self.batch = self._programs.place_row(self.batch, fresh, row)
        self.requests[row] = running
        self.resume()
        return True

    def resume(self) -> None:
        """Lets paused rows go on."""
        for row, running in self.taken:
            if running.paused:
                self.batch = self._programs.resume_row(self.batch, running.request, row)
                running.paused = False

    def stop(self, rows: Sequence[int]) -> None:
        """Ends rows on the device."""
        if rows:
            mask = np.zeros(len(self), bool)
            mask[list(rows)] = True
            self.batch = self._programs.stop_rows(self.batch, mask)

    def release(self, last: dict[int, Update]) -> list[Update]:
        """Frees rows; returns their last updates, completed with counts.

        Args:
          last: last update of each row, without counts.
        """
        if not last:
            return []
        state = self.batch.state
        rounds, committed, nodes = jax.device_get((state.rounds, state.committed, state.nodes))
        updates = []
        for row, update in last.items():
            stats = DecodeStats(tuple(committed[row, : rounds[row]].tolist()), int(nodes[row]))
            updates.append(dataclasses.replace(update, stats=stats))
            self.requests[row] = None
        return updates

    def fit(self, rounds: int, *, awaited: bool) -> None:
        """Shrinks a batch that is empty or has been too large for SHRINK_AFTER rounds.

        Args:
          rounds: rounds since the last call.
          awaited: whether a request will need a row.
        """
        smaller = [n for n in self._programs.buckets if n < len(self)]
        if not smaller or self.running > smaller[-1] or awaited:
            self._idle_rounds = 0
            return
        self._idle_rounds += rounds
        if self._idle_rounds > SHRINK_AFTER or not self.running:
            self._resize(smaller[-1])
            self._idle_rounds = 0

    def _resize(self, rows: int) -> None:
        taken = [i for i, _ in self.taken]
        source = np.full(rows, -1, np.int32)
        source[: len(taken)] = taken
        self.batch = self._programs.move_rows(self.batch, source)
        self.requests = [self.requests[i] for i in taken] + [None] * (rows - len(taken))
