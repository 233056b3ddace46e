"""The running batch as the host sees it: which request has which row, and how many rows there
are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from jaxspec.decoding.logprobs import LogProbs
from jaxspec.decoding.schedule import Batch
from jaxspec.decoding.stats import DecodeStats
from jaxspec.serving.matcher import Matcher
from jaxspec.serving.programs import Programs
from jaxspec.serving.requests import Request, Update, read_logprobs

SHRINK_AFTER = 8  # rounds with too many rows


@dataclasses.dataclass
class Running:
    """A request that has a row, or waits for one.

    Attributes:
      submitted: time.perf_counter().
      length: tokens decided and given out, prompt included.
      matcher: where the answer is in its grammar, if it has one.
    """

    id: int
    request: Request
    submitted: float
    length: int
    matcher: Matcher | None = None

    def advance(self, tokens: Sequence[int]) -> str | None:
        """After these tokens; why the answer cannot go on, if so."""
        self.length += len(tokens)
        if self.matcher is None:
            return None
        self.matcher.advance(tokens)
        return self.matcher.failure

    def progress(self, tokens: np.ndarray, laws: LogProbs | None, row: int) -> Update:
        """What a burst decided for it.

        Args:
          tokens: [n] int32.
          laws, row: recent log-probabilities, and the request's row of them.
        """
        ids, top = tokens.tolist(), self.request.logprobs
        found = () if top is None else read_logprobs(laws, row, range(len(ids)), ids, top)
        return Update(self.id, tuple(ids), logprobs=found)


class RunningRows:
    """The rows of a batch, as many as one of the programs' buckets.

    Attributes:
      batch: the device's side; None before `open`.
      requests: of every row; None for a free one.
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
        """Rows with a request, and these."""
        return ((i, x) for i, x in enumerate(self.requests) if x is not None)

    @property
    def running(self) -> int:
        """How many have a request."""
        return sum(1 for _ in self.taken)

    @property
    def grown(self) -> bool:
        """Whether there are more than the fewest."""
        return len(self) > self._programs.buckets[0]

    def open(self) -> None:
        """Makes the batch, all of its rows free."""
        self.batch = self._programs.empty(len(self))

    def lengths(self) -> np.ndarray:
        """Tokens given out, [B] int32; 0 of free rows."""
        return np.array([x.length if x else 0 for x in self.requests], np.int32)

    def place(self, running: Running, fresh: Batch, may_have: Callable[[int], bool]) -> bool:
        """Gives a request whose prompt has run a row, of a larger batch if need be.

        Args:
          may_have: whether there may be so many rows.

        Returns:
          Whether there is one for it.
        """
        if self.running == len(self):
            larger = [n for n in self._programs.buckets if n > len(self)]
            if not larger or not may_have(larger[0]):
                return False
            self._resize(larger[0])
        row = self.requests.index(None)
        self.batch = self._programs.place_row(self.batch, fresh, row)
        self.requests[row] = running
        return True

    def stop(self, rows: Sequence[int]) -> None:
        """Ends rows on the device."""
        if rows:
            mask = np.zeros(len(self), bool)
            mask[list(rows)] = True
            self.batch = self._programs.stop_rows(self.batch, mask)

    def release(self, last: dict[int, Update]) -> list[Update]:
        """Frees rows; their last updates, with counts.

        Args:
          last: by row, its last update without them.
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
        """Shrinks a batch that has been too large for a while, or is empty.

        Args:
          rounds: since the last call.
          awaited: a request will need a row.
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
