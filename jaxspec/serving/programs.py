"""The compiled programs of an engine, one set per number of rows."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import numpy as np

from jaxspec.decoding.curve import half_full, setup_of, time_sizes
from jaxspec.decoding.fitting import doubling_sizes
from jaxspec.decoding.habit import Habit, init_habit
from jaxspec.decoding.halves import draft_rows, judge_rows
from jaxspec.decoding.logprobs import LogProbs
from jaxspec.decoding.requests import capacity_for, decoder_for, pack
from jaxspec.decoding.schedule import Adaptive, Batch, decode_rows, empty_rows
from jaxspec.decoding.staircase import Staircase
from jaxspec.decoding.state import Prefilling, Requests
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.models.target import Target
from jaxspec.serving.config import EngineConfig
from jaxspec.serving.kept_programs import KeptPrograms
from jaxspec.serving.matcher import ALL, Matcher, restrict
from jaxspec.serving.prefix_cache import PrefixCache
from jaxspec.serving.requests import Request
from jaxspec.serving.rows import (
    begin_prompt,
    end_prompt,
    move_rows,
    place_row,
    recent_logprobs,
    recent_tokens,
    resume_row,
    run_chunk,
    stop_rows,
)
from jaxspec.sharding import beside


class Programs:
    """The device programs of one target, drafter and configuration; holds no request state.

    Attributes:
      adaptive: whether step times choose the verify size of a round.
      buckets: numbers of rows that a batch may have, ascending.
      sizes: verify sizes by number of rows.
      width: maximum new tokens of a row per burst.
      kept: store of all programs except those of grammars.
    """

    def __init__(
        self,
        target: Target,
        drafter: LoadedDrafter,
        config: EngineConfig,
        kept: KeptPrograms,
    ):
        """Args: config: from `EngineConfig.resolved`."""
        self.kept = kept
        decoder, params = decoder_for(target, drafter, rejection=config.rejection)
        self._params = kept.bind(params)
        self._decoder = dataclasses.replace(
            decoder, chunk=config.chunk, top_logprobs=config.top_logprobs
        )
        self._target, self._config = target, config
        self._capacity = capacity_for(config.room, self._decoder)
        self.adaptive = isinstance(config.schedule, Adaptive)
        self.width = config.rounds * (drafter.drafter.depth + 1)
        self.buckets = [config.slots if config.throughput else 1]
        while self.buckets[-1] < config.slots:
            self.buckets.append(min(2 * self.buckets[-1], config.slots))
        size = drafter.drafter.size
        self.sizes = {
            rows: doubling_sizes(rows, size, config.max_nodes)
            if self.adaptive
            else doubling_sizes(rows, config.budget, rows * size)
            for rows in self.buckets
        }

    def setup(self) -> dict[str, Any]:
        """Everything that step times depend on; a stored curve is valid for an equal setup."""
        return setup_of(self._target, self._decoder, self._params, self.sizes, self._capacity)

    def pack(self, request: Request) -> Requests:
        return pack(
            self._decoder,
            [request.prompt],
            batch=1,
            capacity=self._capacity,
            max_new_tokens=request.max_new_tokens,
            budget=self._config.budget,
            sampling=[request.sampling_before_grammar(self._decoder.config)],
            keys=request.keys,
            asked=request.asked,
        )

    @functools.cached_property
    def _prompt(self) -> Prefilling:
        """The shapes of `begin_prompt`."""
        make = functools.partial(begin_prompt, self._decoder, capacity=self._capacity)
        return jax.eval_shape(make, self._params)

    def begin_prompt(self) -> Prefilling:
        empty = self._run(begin_prompt, (), self._prompt, self._params, capacity=self._capacity)
        return beside(empty, self._params)

    def run_chunk(self, requests: Requests, i: int, prefilling: Prefilling) -> Prefilling:
        return self._run(
            run_chunk, (), prefilling, self._params, requests, np.int32(i), prefilling
        )

    def end_prompt(
        self, requests: Requests, prefilling: Prefilling, allowed: np.ndarray | None = None
    ) -> Batch:
        """Args: allowed: [ceil(V / 32)] uint32, bits of the allowed first tokens."""
        return self._run(
            end_prompt,
            allowed is None,
            self._row,
            self._params,
            requests,
            prefilling.final,
            (prefilling.cache, prefilling.drafter, prefilling.logprobs),
            None if allowed is None else allowed[None, None],
            age=self._config.schedule.age,
        )

    def prefix_cache(self) -> PrefixCache | None:
        """An empty prefix cache; None if the configuration has none.

        Raises ValueError if its memory does not hold one page.
        """
        megabytes = self._config.prefix_cache_mb
        if megabytes is None:
            row = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self._prompt))
            megabytes = self._config.slots * row / 2 / 2**20
        if not megabytes:
            return None
        return PrefixCache(
            self._decoder, self._params, self._capacity, megabytes, kept=self.kept
        )

    def empty(self, rows: int) -> Batch:
        """A batch whose rows are all free."""
        empty = self._run(
            empty_rows,
            rows,
            self._row,
            self._params,
            rows=rows,
            capacity=self._capacity,
            age=self._config.schedule.age,
        )
        return beside(empty, self._params)

    @functools.cached_property
    def _row(self) -> Batch:
        """Shapes of a batch of one row."""
        age, capacity = self._config.schedule.age, self._capacity
        make = functools.partial(empty_rows, self._decoder, rows=1, capacity=capacity, age=age)
        return jax.eval_shape(make, self._params)

    def habit(self) -> Habit:
        """Acceptance records before the first round."""
        unlearned = init_habit(self._decoder.drafter.size, self._decoder.drafter.depth)
        return beside(unlearned, self._params)

    def decode(
        self, batch: Batch, habit: Habit, staircase: Staircase, rounds: int
    ) -> tuple[Batch, Habit]:
        """See `decode_rows`."""
        return self._run(
            decode_rows,
            (_rows_of(batch), len(staircase.sizes)),
            (batch, habit),
            self._params,
            batch,
            habit,
            staircase,
            np.int32(rounds),
            schedule=self._config.schedule,
        )

    def place_row(self, batch: Batch, fresh: Batch, row: int) -> Batch:
        """See `rows.place_row`; the next methods too are those of `rows`."""
        arrays = batch, fresh, np.int32(row)
        return self.kept.call(place_row, _rows_of(batch), batch, (), arrays)

    def move_rows(self, batch: Batch, rows: np.ndarray) -> Batch:
        which = _rows_of(batch), len(rows)
        return self.kept.call(move_rows, which, batch, (), (batch, rows))

    def stop_rows(self, batch: Batch, stopped: np.ndarray) -> Batch:
        return self.kept.call(stop_rows, len(stopped), batch, (), (batch, stopped))

    def recent_tokens(self, batch: Batch, start: np.ndarray) -> jax.Array:
        return self._recent(recent_tokens, batch.state.tokens, batch, start)

    def recent_logprobs(self, batch: Batch, start: np.ndarray) -> LogProbs | None:
        return self._recent(recent_logprobs, batch.state.logprobs, batch, start)

    def _recent(self, function: Callable, like: Any, batch: Batch, start: np.ndarray):
        arrays = batch, start
        return self.kept.call(function, len(start), like, (), arrays, width=self.width)

    def _run(
        self, function: Callable, which: Hashable, like: Any, *arrays: Any, **options: Any
    ) -> Any:
        return self.kept.call(function, which, like, (self._decoder,), arrays, **options)

    def restricted_round(
        self,
        batch: Batch,
        habit: Habit,
        staircase: Staircase,
        matchers: Sequence[Matcher | None],
    ) -> tuple[Batch, Habit]:
        """One round in which rows with a matcher follow their grammars."""
        decoder, params, schedule = self._decoder, self._params, self._config.schedule
        forced = any(matcher is not None and matcher.forces for matcher in matchers)
        batch, drafted = draft_rows(
            decoder, params, batch, habit, staircase, np.bool_(forced), schedule=schedule
        )
        draft = restrict(
            matchers,
            jax.device_get(drafted.tree),
            self._config.budget,
            decoder.drafter.depth,
            decoder.config.vocab_size,
        )
        return judge_rows(
            decoder, params, batch, habit, drafted, draft, staircase, schedule=schedule
        )

    def resume_row(self, batch: Batch, request: Request, row: int) -> Batch:
        """Lets a row go on that stopped where its grammar begins."""
        sampling = self.pack(dataclasses.replace(request, grammar=None)).sampling
        return resume_row(batch, sampling, np.int32(row))

    def compile_prompts(self) -> None:
        """Compiles the prompt programs by running each once."""
        requests = self.pack(Request((0,), 1))
        self.end_prompt(requests, self.run_chunk(requests, 0, self.begin_prompt()))

    def compile_rows(self, rows: int, *, few: bool = False) -> None:
        """Compiles the programs of batches of `rows` rows, and those that move rows between
        them and the next smaller batches.

        Args: few: only the smallest and the largest verify size.
        """
        batch = self.compile_rounds(rows, few=few)
        for recent in (self.recent_tokens, self.recent_logprobs):
            recent(batch, np.zeros(rows, np.int32))
        batch = self.place_row(self.stop_rows(batch, np.ones(rows, bool)), self.empty(1), 0)
        self.move_rows(batch, np.zeros(rows, np.int32))
        for fewer in self.buckets[: self.buckets.index(rows)][-1:]:
            self.move_rows(self.empty(fewer), np.zeros(rows, np.int32))
            self.move_rows(batch, np.zeros(fewer, np.int32))

    def compile_rounds(self, rows: int, *, few: bool = False) -> Batch:
        """Compiles the rounds' program by running it on finished rows, which it returns."""
        staircase = self._guessed(rows).only(0)
        staircase = staircase.ends() if few else staircase
        return self.decode(self.empty(rows), self.habit(), staircase, 1)[0]

    def compile_restricted(self, rows: int) -> None:
        """Compiles the programs of requests with grammars for batches of `rows` rows."""
        request = Request((0,), 1)
        requests = self.pack(request)
        every = np.full(-(-self._decoder.config.vocab_size // 32), ALL, np.uint32)
        self.end_prompt(requests, self.run_chunk(requests, 0, self.begin_prompt()), every)
        staircase = self._guessed(rows).only(-1)
        batch = self.resume_row(self._half_full(rows), request, 0)
        self.restricted_round(batch, self.habit(), staircase, [None] * rows)

    def turn(self) -> dict[int, list[float]]:
        """Times one round per number of rows and verify size, in seconds; for `curve.least`."""
        return {
            rows: time_sizes(
                self.decode, self._half_full(rows), self.habit(), self._guessed(rows)
            )
            for rows in self.sizes
        }

    def _guessed(self, rows: int) -> Staircase:
        return Staircase.guessed(self.sizes[rows])

    def _half_full(self, rows: int) -> Batch:
        return beside(half_full(self.empty(rows), self._decoder), self._params)


def _rows_of(batch: Batch) -> int:
    return batch.state.done.shape[0]
