"""What of an engine is ready: compiled programs, and the times of rounds.

An engine answers as soon as the programs of one request at a time are there. The rest is
compiled beside it, and rounds are timed while nobody asks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from jaxspec.decoding.curve import Curve, guessed, least
from jaxspec.serving.memory import trim_memory
from jaxspec.serving.prefix_cache import PrefixCache
from jaxspec.serving.programs import Programs, Staircase

REPEATS = 10  # of every size, when step times are measured


class Readiness:
    """Compiles and measures the programs of one engine, piece by piece.

    Attributes:
      beside: whether another thread calls `prepare`; the engine compiles nothing itself then.
      curve: step times, measured or given; None until they are, and with a fixed schedule.
      times: of a round, by number of rows; guessed where there is no curve.
    """

    def __init__(self, programs: Programs, curve: Curve | None):
        """Raises ValueError: see `Curve.check`."""
        self._programs = programs
        self._rows: list[int] = []  # whose programs are compiled
        self._few = False  # of the first rows' verify sizes
        self._restricted: set[int] = set()  # rows whose rounds grammars may restrict
        self._grammars = False  # whether such rounds are asked for
        self._turns: list[dict[int, list[float]]] = []  # of `measure`
        self._known = not programs.adaptive
        self.beside = False
        self.curve: Curve | None = None
        self.times = {rows: guessed(own) for rows, own in programs.sizes.items()}
        if curve is not None:
            self.use(curve)

    def open(self, prefixes: PrefixCache | None, *, few: bool = False) -> None:
        """Compiles what one request at a time needs; `prepare` adds the rest.

        Args: few: compiles the least and the largest verify size alone, in half the time.
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
        """Whether a batch may have so many rows."""
        return rows in self._rows

    def staircase(self, rows: int) -> Staircase:
        """The verify sizes that a round of so many rows may have by now, and their times."""
        few = self._few and rows == self._rows[0]
        return self._programs.staircase(rows, self.times[rows], few=few)

    @property
    def lacks_grammars(self) -> bool:
        """Whether requests with grammars must wait: in some of the batches that may be, they
        could not run."""
        return self._grammars and not self._restricted.issuperset(self._rows)

    def ask_for_grammars(self) -> None:
        """Has `prepare` compile what requests with grammars need as well."""
        self._grammars = True

    def prepare(self) -> bool:
        """Compiles the next programs that are missing; False if none are.

        Any thread may call it while another steps the engine. Meanwhile requests that need the
        programs wait, and no others do.
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
        if self._rows and larger:
            return functools.partial(self._add_rows, larger[0])
        return self._add_sizes if self._few else None

    def _add_grammars(self, rows: int) -> None:
        self._programs.compile_restricted(rows)
        self._restricted.add(rows)

    def _add_rows(self, rows: int) -> None:
        self._programs.compile_rows(rows)
        if self._grammars:  # of a request that runs, perhaps, so they must be there before
            self._add_grammars(rows)
        self._rows.append(rows)

    def _add_sizes(self) -> None:
        self._programs.compile_rounds(self._rows[0])
        self._few = False

    def measure(self, *, repeats: int = REPEATS) -> bool:
        """Measures rounds of every size once; False once that was done `repeats` times, if the
        step times are known, or while programs are missing."""
        if self._known or not self._rows or self._next_piece() is not None:
            return False
        self._turns.append(self._programs.turn())
        if len(self._turns) == repeats:
            self._known = True  # also if the curve is of no use
            self.use(Curve(self._programs.setup(), least(self._turns)))
            trim_memory()
        return True

    def use(self, curve: Curve) -> None:
        """Chooses by these step times. Raises ValueError: see `Curve.check`."""
        curve.check(self._programs.setup())
        self.curve, self._known = curve, True
        self.times = {rows: curve.times(rows) for rows in self._programs.buckets}
