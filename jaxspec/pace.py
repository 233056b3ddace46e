"""Budgets per round that pay on this machine, from measured times and recent acceptance."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from jaxspec.arguments import integer
from jaxspec.decoding.curve import (
    Curve,
    half_full,
    least,
    setup_of,
    time_sizes,
    values_by_dtype,
)
from jaxspec.decoding.fitting import doubling_sizes
from jaxspec.decoding.habit import Habit, init_habit
from jaxspec.decoding.requests import check_budget, check_capacity, decoder_for
from jaxspec.decoding.sampling import SamplingRows
from jaxspec.decoding.schedule import (
    Adaptive,
    Batch,
    decode_rows,
    empty_rows,
    unknown_survivals,
)
from jaxspec.decoding.staircase import Staircase, VerifySize
from jaxspec.decoding.state import Decoder, DecodeState, Params
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.kept_curves import keep_curve, kept_curve
from jaxspec.loading import as_drafter
from jaxspec.models.target import Target
from jaxspec.prompts import Prompt, as_token_ids
from jaxspec.settings import on_devices_of_target
from jaxspec.sharding import beside, over_processes

REPEATS = 5  # of every size; the minimum time counts
FEWEST = 4  # smallest number of nodes per row to compile a program for


class Pace:
    """Chooses how many nodes each round of `generate` verifies; plain decoding if none pays.

    One object serves successive calls and learns from each how many drafts are accepted, as the
    server's schedule does (`decoding.schedule.Adaptive`).

    Attributes:
      decoder: the static part of decoding it was measured for.
      rows, capacity: B and S of the batches.
      budget: maximum nodes of a row in one round, root included.
      curve: seconds of a round by the nodes it verifies.
      rounds: number of rounds so far by verify size; the first size is plain decoding.
      tokens: lengths of each batch's longest answer, summed.
    """

    def __init__(self, decoder: Decoder, rows: int, capacity: int, budget: int, curve: Curve):
        self.decoder, self.rows, self.capacity = decoder, rows, capacity
        self.budget, self.curve = budget, curve
        self._staircase = curve.staircase(rows)
        self.sizes = self._staircase.sizes
        self.rounds = np.zeros(len(self.sizes), int)
        self.tokens = 0
        self._habit: Habit | None = None

    def check(self, decoder: Decoder, params: Params, capacity: int) -> None:
        """Raises ValueError unless it was measured for this decoder and these weights, and for
        rows of so many tokens or more."""
        weights = self.curve.setup["weights"]
        if decoder != self.decoder or values_by_dtype(params) != weights:
            raise ValueError(
                "the pace was measured for another target, dtype, drafter or acceptance rule; "
                "measure it again (`jaxspec.measure_pace`)"
            )
        if capacity > self.capacity:
            raise ValueError(
                f"the pace was measured for rows of {self.capacity} tokens, but these prompts "
                f"and max_new_tokens need {capacity}; measure it again with them"
            )

    def steps(
        self, params: Params, state: DecodeState, sampling: SamplingRows
    ) -> Callable[[DecodeState, int], DecodeState]:
        """A function that runs up to a number of rounds of a batch, fewer if a row finishes.

        Args:
          state: of the batch after prefill; each call returns the next call's.
        """
        survivals = unknown_survivals(self.decoder, self.rows, SCHEDULE.age)
        batch = beside(Batch(state, sampling, survivals), params)
        self._habit = self._habit or beside(_first_habit(self.decoder), params)

        def step(state: DecodeState, rounds: int) -> DecodeState:
            nonlocal batch
            batch, self._habit = decode_rows(
                self.decoder,
                params,
                dataclasses.replace(batch, state=state),
                self._habit,
                self._staircase,
                np.int32(rounds),
                schedule=SCHEDULE,
            )
            return batch.state

        return step

    def count(self, longest: int) -> None:
        """Records a finished batch, whose longest answer has `longest` tokens."""
        assert self._habit is not None
        self.rounds = np.array(self._habit.rounds)[: len(self.sizes)]
        self.tokens += longest - 1  # prefill gives the first

    @property
    def gain(self) -> float:
        """Speedup over plain decoding, by the measured times of the rounds so far."""
        seconds = self.curve.seconds[self.rows]
        spent = float(self.rounds @ np.array(seconds))
        return self.tokens * seconds[0] / spent if spent else 1.0

    def __repr__(self) -> str:
        return f"Pace({self.rows} rows of {self.capacity} tokens, budget {self.budget})"

    def __str__(self) -> str:
        if not self.rounds.any():
            return "no round of decoding ran"
        seconds, total = self.curve.seconds[self.rows], max(1, self.rounds.sum())
        usual = int(np.argmax(self.rounds[1:])) + 1
        cost = seconds[usual] / seconds[0]
        nodes, tau = self.sizes[usual].total // self.rows, self.tokens / total
        facts = f"a round of {nodes} nodes takes {cost:.2f} times a plain one"
        if self.gain > 1:
            return (
                f"speculation pays: {self.gain:.2f}x plain decoding ({tau:.2f} tokens a round; "
                f"{facts})"
            )
        share = self.rounds[0] / total
        return (
            f"speculation does not pay here: {self.gain:.2f}x plain decoding ({facts}, and too "
            f"few drafts were accepted); {share:.0%} of the rounds were plain"
        )


SCHEDULE = Adaptive()


@on_devices_of_target
def measure_pace(
    target: Target,
    prompts: Prompt | Sequence[Prompt],
    *,
    drafter: LoadedDrafter | str,
    max_new_tokens: int = 256,
    budget: int | None = None,
    batch_size: int = 8,
    raw: bool = False,
    thinking: bool | None = None,
    rejection: bool = False,
) -> Pace:
    """Compiles the programs of `generate(target, prompts, budget=pace)` and times its rounds.

    Times are kept in the cache for the next call with the same setup on this machine.

    Args: as for `generate`.

    Raises:
      ValueError: as `generate`; the drafter drafts nothing; or processes share the target.
    """
    rows = as_token_ids(target, prompts, raw=raw, thinking=thinking)
    if over_processes(target.params):
        raise ValueError(
            f"target {target.name!r} lies on devices of several processes, which would measure "
            "different times and choose different budgets; give `generate` a fixed budget"
        )
    drafter = as_drafter(target, drafter)
    if drafter.drafter.size < 2:
        raise ValueError(
            f"drafter {drafter.drafter} drafts nothing, so there is no budget to choose; call "
            "generate without a pace"
        )
    decoder, params = decoder_for(target, drafter, rejection=rejection)
    capacity = check_capacity(decoder, rows, max_new_tokens, None)
    budget = check_budget(decoder, budget)
    batch = min(integer("batch_size", batch_size, low=1), len(rows))
    setup = setup_of(target, decoder, params, {batch: sizes_of(decoder, batch)}, capacity)
    curve = kept_curve(setup)
    if curve is None:
        curve = _measured(decoder, params, batch, capacity, setup)
        keep_curve(curve)
    return Pace(decoder, batch, capacity, budget, curve)


def sizes_of(decoder: Decoder, rows: int) -> tuple[VerifySize, ...]:
    """Verify sizes of a batch: the roots alone, and all rows' whole trees, with a quarter of
    that, a sixteenth … down to `FEWEST` nodes per row in between.

    Each size is compiled before the first token.
    """
    size = decoder.drafter.size
    roots, *drafted = doubling_sizes(rows, size, rows * size)
    return roots, *(s for s in drafted[::-2][::-1] if s.total >= min(FEWEST, size) * rows)


def _measured(decoder, params, rows: int, capacity: int, setup: dict) -> Curve:
    """Times rounds of every size on half-full rows."""
    staircase = Staircase.guessed(sizes_of(decoder, rows))

    def decode(batch, habit, staircase, rounds):
        return decode_rows(
            decoder, params, batch, habit, staircase, np.int32(rounds), schedule=SCHEDULE
        )

    def turn() -> list[float]:
        empty = empty_rows(decoder, params, rows=rows, capacity=capacity, age=SCHEDULE.age)
        batch = beside(half_full(empty, decoder), params)
        return time_sizes(decode, batch, beside(_first_habit(decoder), params), staircase)

    turn()  # compiles
    return Curve(setup, least([{rows: turn()} for _ in range(REPEATS)]))


def _first_habit(decoder: Decoder) -> Habit:
    """Acceptance records before the first round."""
    return init_habit(decoder.drafter.size, decoder.drafter.depth)
