"""The compiled programs of an engine: one set per number of rows, made before it serves."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.decoding.budget import StepTimes
from jaxspec.decoding.curve import only, setup_of, take_turn
from jaxspec.decoding.fitting import VerifySize, doubling_sizes
from jaxspec.decoding.halves import draft_rows, judge_rows
from jaxspec.decoding.requests import capacity_for, decoder_for, pack
from jaxspec.decoding.schedule import Adaptive, Batch, Habit, decode_rows, init_habit
from jaxspec.decoding.state import Prefilling, Requests
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.models.target import Target
from jaxspec.serving.config import EngineConfig
from jaxspec.serving.grammars import ALL, Matcher, allowed_tokens
from jaxspec.serving.prefix_cache import PrefixCache
from jaxspec.serving.requests import Request
from jaxspec.serving.rows import (
    begin_prompt,
    empty_rows,
    end_prompt,
    move_rows,
    place_row,
    recent_logprobs,
    recent_tokens,
    run_chunk,
    stop_rows,
)
from jaxspec.sharding import beside

Staircase = tuple[tuple[VerifySize, ...], StepTimes]


class Programs:
    """The device programs of one target, drafter and configuration; it holds no request.

    Attributes:
      adaptive: whether step times decide what a round verifies.
      buckets: numbers of rows that a batch may have, ascending.
      sizes: verify sizes by number of rows.
      width: maximum tokens that a burst decides per row.
    """

    def __init__(self, target: Target, drafter: LoadedDrafter, config: EngineConfig):
        """Args: config: resolved."""
        decoder, self._params = decoder_for(
            target, drafter, config.implementation, config.rejection
        )
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
        """What step times depend on; a stored curve must have been measured for the same."""
        return setup_of(self._target, self._decoder, self._params, self.sizes, self._capacity)

    def pack(self, request: Request) -> Requests:
        return pack(
            self._decoder,
            [request.prompt],
            batch=1,
            capacity=self._capacity,
            max_new_tokens=request.max_new_tokens,
            budget=self._config.budget,
            sampling=[request.sampling],
            keys=request.keys,
            asked=request.asked,
        )

    def begin_prompt(self) -> Prefilling:
        empty = begin_prompt(self._decoder, self._params, capacity=self._capacity)
        return beside(empty, self._params)

    def run_chunk(self, requests: Requests, i: int, prefilling: Prefilling) -> Prefilling:
        return run_chunk(self._decoder, self._params, requests, np.int32(i), prefilling)

    def end_prompt(
        self, requests: Requests, prefilling: Prefilling, allowed: np.ndarray | None = None
    ) -> Batch:
        """Args: allowed: [ceil(V / 32)] uint32, bits of the tokens that may come first."""
        held = prefilling.cache, prefilling.drafter, prefilling.logprobs
        age = self._config.schedule.age
        allowed = None if allowed is None else allowed[None, None]
        return end_prompt(
            self._decoder, self._params, requests, prefilling.final, held, allowed, age=age
        )

    def prefix_cache(self) -> PrefixCache | None:
        """Room for prefixes; None where none are kept.

        Raises ValueError when the memory given is too little.
        """
        megabytes = self._config.prefix_cache_mb
        if megabytes is None:
            row = jax.eval_shape(self.begin_prompt)
            row = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(row))
            megabytes = self._config.slots * row / 2 / 2**20
        if not megabytes:
            return None
        return PrefixCache(self._decoder, self._params, self._capacity, megabytes)

    def empty(self, rows: int) -> Batch:
        """A batch whose rows are all free."""
        age, capacity = self._config.schedule.age, self._capacity
        empty = empty_rows(self._decoder, self._params, rows=rows, capacity=capacity, age=age)
        return beside(empty, self._params)

    def habit(self) -> Habit:
        """The habit before the first round."""
        unlearned = init_habit(self._decoder.drafter.size, self._decoder.drafter.depth)
        return beside(unlearned, self._params)

    def staircase(self, rows: int, times: StepTimes, *, few: bool = False) -> Staircase:
        """The verify sizes of a batch of so many rows.

        Args:
          times: of all of them.
          few: takes the least and the largest alone.
        """
        sizes = self.sizes[rows]
        if not few:
            return sizes, times
        return (sizes[0], sizes[-1]), jax.tree.map(lambda x: x[[0, -1]], times)

    def decode(
        self, batch: Batch, habit: Habit, staircase: Staircase, rounds: int
    ) -> tuple[Batch, Habit]:
        """See `decode_rows`."""
        sizes, times = staircase
        return decode_rows(
            self._decoder,
            self._params,
            batch,
            habit,
            times,
            np.int32(rounds),
            schedule=self._config.schedule,
            sizes=sizes,
        )

    def restricted_round(
        self,
        batch: Batch,
        habit: Habit,
        times: StepTimes,
        matchers: Sequence[Matcher | None],
    ) -> tuple[Batch, Habit]:
        """A round whose rows with a matcher keep to their grammars."""
        schedule, sizes = self._config.schedule, self.sizes[len(matchers)]
        decoder, params = self._decoder, self._params
        batch, drafted = draft_rows(decoder, params, batch, habit, times, schedule=schedule)
        tree = drafted.draft.tree
        tree = jax.device_get((tree.tokens, tree.parents, tree.valid))
        allowed = allowed_tokens(matchers, *tree, decoder.config.vocab_size)
        given = batch, habit, drafted, allowed, times
        return judge_rows(decoder, params, *given, schedule=schedule, sizes=sizes)

    def compile_prompts(self) -> None:
        """Runs every program of prompts once."""
        requests = self.pack(Request((0,), 1))
        self.end_prompt(requests, self.run_chunk(requests, 0, self.begin_prompt()))

    def compile_rows(self, rows: int, *, few: bool = False) -> None:
        """Runs every program of batches of so many rows once, and from and to those before.

        Args: few: as for `staircase`.
        """
        batch = self.compile_rounds(rows, few=few)
        for recent in (recent_tokens, recent_logprobs):
            recent(batch, np.zeros(rows, np.int32), width=self.width)
        batch = place_row(stop_rows(batch, np.ones(rows, bool)), self.empty(1), np.int32(0))
        move_rows(batch, np.zeros(rows, np.int32))
        for fewer in self.buckets[: self.buckets.index(rows)][-1:]:
            move_rows(self.empty(fewer), np.zeros(rows, np.int32))
            move_rows(batch, np.zeros(fewer, np.int32))

    def compile_rounds(self, rows: int, *, few: bool = False) -> Batch:
        """Runs rounds of so many rows, of every size; the batch after them."""
        (batch, _), _ = self._turn(rows, few=few)
        return batch

    def compile_restricted(self, rows: int) -> None:
        """Runs the programs of requests with grammars once, in a batch of so many rows."""
        requests = self.pack(Request((0,), 1))
        every = np.full(-(-self._decoder.config.vocab_size // 32), ALL, np.uint32)
        self.end_prompt(requests, self.run_chunk(requests, 0, self.begin_prompt()), every)
        times = only(self.sizes[rows], len(self.sizes[rows]) - 1)
        self.restricted_round(self._half_full(rows), self.habit(), times, [None] * rows)

    def turn(self) -> dict[int, list[float]]:
        """Seconds of a round by number of rows and size, once; for `curve.least`."""
        return {rows: self._turn(rows)[1] for rows in self.sizes}

    def _turn(self, rows: int, *, few: bool = False):
        """`take_turn`: one round of every size that the schedule may choose."""
        sizes, _ = self.staircase(rows, only(self.sizes[rows], 0), few=few)

        def step(size):
            staircase = sizes, only(sizes, size)
            return lambda state: self.decode(*state, staircase, 1)

        count = len(sizes) if self.adaptive else 1
        return take_turn((self._half_full(rows), self.habit()), [step(i) for i in range(count)])

    def _half_full(self, rows: int) -> Batch:
        batch = self.empty(rows)
        length = jnp.full(rows, self._capacity // 2, jnp.int32)
        limit = jnp.full(rows, self._capacity - self._decoder.drafter.depth - 1, jnp.int32)
        state = dataclasses.replace(
            batch.state, length=length, limit=limit, done=jnp.zeros(rows, bool)
        )
        return beside(dataclasses.replace(batch, state=state), self._params)
