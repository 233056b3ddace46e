"""Compiling and timing an engine's programs while it serves.

An engine answers as soon as the programs for one request at a time are compiled. The others are
compiled meanwhile, and rounds are timed while it is idle.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from jaxspec.decoding.curve import Curve, least
from jaxspec.decoding.staircase import Staircase
from jaxspec.serving.memory import trim_memory
from jaxspec.serving.prefix_cache import PrefixCache
from jaxspec.serving.programs import Programs

REPEATS = 10  # timings of every verify size


class Readiness:
    """Compiles and measures the programs of one engine, piece by piece.

    Attributes:
      beside: whether another thread calls `prepare`; the engine then compiles nothing itself.
      curve: step times, given or measured; None before that, and with a fixed schedule.
      staircases: verify sizes and step times by number of rows; guessed without a curve.
      wanted: the most requests so far that were running or waiting at a time.
    """

    def __init__(self, programs: Programs, curve: Curve | None):
        """Raises ValueError: see `Curve.check`."""
        self._programs = programs
        self._rows: list[int] = []  # numbers of rows whose programs are compiled
        self._few = False  # whether the first of them lacks some verify sizes
        self._restricted: set[int] = set()  # as `_rows`, for grammar programs
        self._grammars = False  # whether grammar programs are wanted
        self._turns: list[dict[int, list[float]]] = []  # timings by `measure`
        self._known = not programs.adaptive
        self.beside = False
        self.wanted = 0
        self.curve: Curve | None = None
        self.staircases = {r: Staircase.guessed(s) for r, s in programs.sizes.items()}
        if curve is not None:
            self.use(curve)

    def open(self, prefixes: PrefixCache | None, *, few: bool = False) -> None:
        """Compiles the programs for one request at a time; `prepare` adds the rest.

        Args: few: compile only the smallest and the largest verify size, in half the time.
        """
        first = self._programs.buckets[0]
        self._few = few and len(self._programs.sizes[first]) > 2
        with ThreadPoolExecutor(2) as threads:
            pieces = [
                threads.submit(self._programs.compile_rows, first, few=self._few),
                threads.submit(self._programs.compile_prompts),
            ]
        for piece in pieces:
            piece.result()
        if prefixes is not None:
            prefixes.compile(self._programs.begin_prompt())
        self._rows.append(first)
        trim_memory()

    def has(self, rows: int) -> bool:
        """Whether the programs for batches of `rows` rows are compiled."""
        return rows in self._rows

    def staircase(self, rows: int) -> Staircase:
        """The verify sizes of a batch of `rows` rows that are compiled, and their times."""
        few = self._few and rows == self._rows[0]
        return self.staircases[rows].ends() if few else self.staircases[rows]

    @property
    def lacks_grammars(self) -> bool:
        """Whether requests with grammars must wait: some batch size lacks their programs."""
        return self._grammars and not self._restricted.issuperset(self._rows)

    def ask_for_grammars(self) -> None:
        """Makes `prepare` compile the programs of requests with grammars too."""
        self._grammars = True

    def prepare(self) -> bool:
        """Compiles the next missing programs; returns False if none are missing.

        Any thread may call it while another steps the engine. Only requests that need these
        programs wait.
        """
        piece = self._next_piece()
        if piece is None:
            return False
        piece()
        trim_memory()
        return True

    def _next_piece(self) -> Callable[[], None] | None:
        if self.lacks_grammars:
            lacking = [rows for rows in self._rows if rows not in self._restricted]
            return functools.partial(self._add_grammars, lacking[0])
        larger = self._programs.buckets[len(self._rows) :]
        if self._rows and larger and not self._can_wait:
            return functools.partial(self._add_rows, larger[0])
        return self._add_sizes if self._few else None

    @property
    def _can_wait(self) -> bool:
        """Whether larger batches can be left until they are needed, as each takes memory.

        Their programs load within seconds, and there was one request at a time so far, or one
        more than ever would still fit.
        """
        kept = self._programs.kept
        loads = self._known and kept.loaded > 0 and kept.compiled == 0
        return loads and (self.wanted <= 1 or self.wanted < self._rows[-1])

    def _add_grammars(self, rows: int) -> None:
        self._programs.compile_restricted(rows)
        self._restricted.add(rows)

    def _add_rows(self, rows: int) -> None:
        self._programs.compile_rows(rows)
        if self._grammars:  # before larger batches: a running request may need them there
            self._add_grammars(rows)
        self._rows.append(rows)

    def _add_sizes(self) -> None:
        self._programs.compile_rounds(self._rows[0])
        self._few = False

    def measure(self, *, repeats: int = REPEATS) -> bool:
        """Times a round of every size once. Returns False if there is nothing to measure: after
        `repeats` calls, if step times are known, or while programs are missing."""
        if self._known or not self._rows or self._next_piece() is not None:
            return False
        self._turns.append(self._programs.turn())
        if len(self._turns) == repeats:
            self._known = True  # even if the curve turns out unusable
            self.use(Curve(self._programs.setup(), least(self._turns)))
            trim_memory()
        return True

    def use(self, curve: Curve) -> None:
        """Makes the schedule use these step times. Raises ValueError: see `Curve.check`."""
        curve.check(self._programs.setup())
        self.curve, self._known = curve, True
        self.staircases = {rows: curve.staircase(rows) for rows in self._programs.buckets}
