"""Continuous batching: requests enter and leave a running batch between rounds.

One thread calls `Engine.step` again and again; any thread may submit and cancel.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections import deque

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.decoding.budget import StepTimes
from jaxspec.decoding.loop import Prefilling, Requests
from jaxspec.decoding.requests import capacity_for, pack
from jaxspec.decoding.schedule import (
    MAX_SIZES,
    Adaptive,
    Fixed,
    Schedule,
    decode_rows,
    init_habit,
    verify_sizes,
)
from jaxspec.decoding.stats import DecodeStats
from jaxspec.generation import PLAIN, LoadedDrafter, Target, bind, request_keys
from jaxspec.serving.curve import Curve, measure, setup_of
from jaxspec.serving.requests import QueueFull, Request, Update
from jaxspec.serving.rows import (
    Batch,
    begin_prompt,
    empty_rows,
    end_prompt,
    move_rows,
    place,
    recent_tokens,
    run_chunk,
    stop_rows,
)

SHRINK_AFTER = 8  # steps with too many rows


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Limits of an engine; its memory follows from them and is allocated within them.

    Attributes:
      slots: requests decoded together, at most.
      room: tokens that a prompt and its answer may have together.
      queue: requests that may wait for a slot.
      schedule: `Fixed` or `Adaptive`; None is adaptive where there is something to draft.
      budget: nodes per row, root included, with a fixed schedule; the whole tree if None.
      max_nodes: of all rows in one round, with an adaptive schedule.
      chunk: prompt tokens run between two bursts of rounds.
      rounds: of a burst, after which tokens are given out.
      rejection: see `jaxspec.generate`.
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
    implementation: str | None = None

    def __post_init__(self):
        for name in ("slots", "room", "queue", "max_nodes", "chunk", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"EngineConfig.{name} is {getattr(self, name)}; expected at least 1"
                )


@dataclasses.dataclass
class _Running:
    """The host's view of a request that has a row, or is about to."""

    id: int
    request: Request
    length: int  # tokens decided and given out, prompt included


@dataclasses.dataclass
class _Prompt:
    """The prompt being run; `batch` once it is done and waits for a row."""

    running: _Running
    requests: Requests
    prefilling: Prefilling | None
    chunk: int = 0
    batch: Batch | None = None


class Engine:
    """Decodes requests as they come.

    Whatever else is in the batch, a request's tokens are those of `jaxspec.generate` at its
    seed (in float32; with rejection sampling the law is the same and the tokens are not).

    Attributes:
      config, target: as given.
      curve: step times, measured or given; None until `warm_up`, and with a fixed schedule.
      rounds_by_size: rounds so far with the first, second, … verify size of their batch.
    """

    def __init__(
        self,
        target: Target,
        drafter: LoadedDrafter = PLAIN,
        config: EngineConfig = EngineConfig(),  # noqa: B008
        *,
        curve: Curve | None = None,
    ):
        """Raises ValueError when the room passes the target's positions, or a budget is off."""
        size = drafter.drafter.size
        schedule = config.schedule or (Adaptive() if size > 1 else Fixed())
        self._check(target, config, schedule, size)
        self.target, self.config = target, dataclasses.replace(config, schedule=schedule)
        decoder, self._params = bind(target, drafter, config.implementation, config.rejection)
        self._decoder = dataclasses.replace(decoder, chunk=config.chunk)
        self._schedule, self._age = schedule, schedule.age
        self._budget = size if config.budget is None else config.budget
        self._capacity = capacity_for(config.room, self._decoder)
        self._buckets = [1]
        while self._buckets[-1] < config.slots:
            self._buckets.append(min(2 * self._buckets[-1], config.slots))
        adaptive = isinstance(schedule, Adaptive)
        self._sizes = {
            rows: verify_sizes(
                rows,
                size if adaptive else self._budget,
                config.max_nodes if adaptive else rows * size,
            )
            for rows in self._buckets
        }
        self.curve = curve
        self._times: dict[int, StepTimes] | None = None
        if curve is not None:
            curve.check(self.setup())
            self._times = {rows: curve.times(rows) for rows in self._buckets}
        elif not adaptive:
            self._times = {rows: _unused(len(sizes)) for rows, sizes in self._sizes.items()}

        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._waiting: deque[_Running] = deque()
        self._cancelled: set[int] = set()
        self._prompt: _Prompt | None = None
        self._rows: list[_Running | None] = [None]
        self._batch: Batch | None = None
        self._habit = init_habit(size, self._decoder.drafter.depth)
        self._idle_rows = 0
        self.rounds_by_size = [0] * MAX_SIZES

    @staticmethod
    def _check(target: Target, config: EngineConfig, schedule: Schedule, size: int) -> None:
        if isinstance(schedule, Adaptive) and size < 2:
            raise ValueError("an adaptive schedule needs a drafter; use Fixed without one")
        if config.budget is not None and not isinstance(schedule, Fixed):
            raise ValueError(f"budget is {config.budget}, but the schedule is not Fixed")
        if config.budget is not None and not 1 <= config.budget <= size:
            raise ValueError(f"budget is {config.budget}; the drafter's trees have 1 … {size}")
        if config.room > target.config.max_positions:
            raise ValueError(
                f"room is {config.room} tokens per request; the target has "
                f"{target.config.max_positions} positions"
            )

    # Any thread.

    def submit(self, request: Request) -> int:
        """Queues a request; returns its id.

        Raises:
          ValueError: it cannot be served.
          QueueFull: too many are waiting.
        """
        request.check(self.target.config, self.config.room)
        with self._lock:
            if len(self._waiting) >= self.config.queue:
                raise QueueFull(
                    f"{len(self._waiting)} requests are waiting, as many as may; try later"
                )
            number = next(self._numbers)
            self._waiting.append(_Running(number, request, len(request.prompt)))
        return number

    def cancel(self, id: int) -> None:
        """Ends a request at the next step; one that has ended is left alone."""
        with self._lock:
            self._cancelled.add(id)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests whose prompt is being run or that are being decoded."""
        return sum(row is not None for row in self._rows) + (self._prompt is not None)

    # The engine's own thread.

    def setup(self) -> dict:
        """What step times depend on; a stored curve must have been measured for the same."""
        return setup_of(
            self.target,
            self._decoder,
            self._params,
            {rows: [s.total for s in sizes] for rows, sizes in self._sizes.items()},
            {rows: [s.per_row for s in sizes] for rows, sizes in self._sizes.items()},
            self._capacity,
        )

    def warm_up(self, *, repeats: int = 5) -> None:
        """Compiles every program and, for an adaptive schedule without one, measures the curve.

        Nothing is compiled after it.
        """
        adaptive, seconds = isinstance(self._schedule, Adaptive), {}
        missing = self._times is None
        for rows, sizes in self._sizes.items():
            seconds[rows] = []
            for size in range(len(sizes) if adaptive else 1):
                times = _only(sizes, size)
                batch, median = measure(
                    lambda batch, times=times, rows=rows: self._decode(batch, times, rows, 1),
                    self._half_full(rows),
                    repeats if missing else 0,
                )
                seconds[rows].append(median)
            recent_tokens(batch, np.zeros(rows, np.int32), width=self._width)
            batch = place(stop_rows(batch, np.ones(rows, bool)), self._empty(1), np.int32(0))
            bucket = self._buckets.index(rows)
            for other in self._buckets[max(bucket - 1, 0) : bucket + 2]:
                move_rows(batch, np.zeros(other, np.int32))
        request = Request((0,), 1)
        requests = self._pack(request)
        prefilling = begin_prompt(self._decoder, self._params, capacity=self._capacity)
        prefilling = run_chunk(self._decoder, self._params, requests, np.int32(0), prefilling)
        self._end_prompt(requests, prefilling)
        if missing:
            self.curve = Curve(self.setup(), seconds)
            self.curve.check(self.setup())
            self._times = {rows: self.curve.times(rows) for rows in self._buckets}
        self._habit = init_habit(self._decoder.drafter.size, self._decoder.drafter.depth)
        self._batch = self._empty(1)
        self._rows = [None]

    def step(self) -> list[Update]:
        """One turn: cancellations, at most one prompt chunk, a burst of rounds.

        Returns:
          What happened to the requests; nothing when there is nothing to do.
        """
        if self._batch is None:
            self.warm_up()
        updates = self._apply_cancellations()
        updates += self._advance_prompt()
        updates += self._advance_rows()
        self._fit_rows()
        return updates

    @property
    def busy(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self._waiting or self._prompt or any(self._rows) or len(self._rows) > 1)

    def device_bytes(self) -> int:
        """Bytes of the arrays held for requests; weights are not among them."""
        held = [self._batch]
        if self._prompt is not None:
            held += [self._prompt.prefilling, self._prompt.batch]
        return sum(x.nbytes for x in jax.tree.leaves(held))

    def _apply_cancellations(self) -> list[Update]:
        with self._lock:
            cancelled, self._cancelled = self._cancelled, set()
            gone = [r for r in self._waiting if r.id in cancelled]
            for running in gone:
                self._waiting.remove(running)
        updates = [Update(running.id, (), "cancelled") for running in gone]
        if self._prompt is not None and self._prompt.running.id in cancelled:
            updates.append(Update(self._prompt.running.id, (), "cancelled"))
            self._prompt = None
        stopped = [
            i for i, row in enumerate(self._rows) if row is not None and row.id in cancelled
        ]
        if stopped:
            updates += self._release(stopped, ["cancelled"] * len(stopped), [()] * len(stopped))
            mask = np.zeros(len(self._rows), bool)
            mask[stopped] = True
            self._batch = stop_rows(self._batch, mask)
        return updates

    def _advance_prompt(self) -> list[Update]:
        """One chunk of the prompt at hand, its first token, or its place in the batch."""
        if self._prompt is None:
            with self._lock:
                if not self._waiting:
                    return []
                running = self._waiting.popleft()
            prefilling = begin_prompt(self._decoder, self._params, capacity=self._capacity)
            self._prompt = _Prompt(running, self._pack(running.request), prefilling)
        prompt, updates = self._prompt, []
        if prompt.batch is None:
            prompt.prefilling = run_chunk(
                self._decoder,
                self._params,
                prompt.requests,
                np.int32(prompt.chunk),
                prompt.prefilling,
            )
            prompt.chunk += 1
            if prompt.chunk * self.config.chunk < len(prompt.running.request.prompt):
                return []
            updates = self._first_token(prompt)
        if self._prompt is not None and (row := self._free_row()) is not None:
            self._batch = place(self._batch, prompt.batch, np.int32(row))
            self._rows[row], self._prompt = prompt.running, None
        return updates

    def _first_token(self, prompt: _Prompt) -> list[Update]:
        prompt.batch = self._end_prompt(prompt.requests, prompt.prefilling)
        prompt.prefilling, running = None, prompt.running
        state = prompt.batch.state
        tokens, done = jax.device_get((state.tokens, state.done))
        token = int(tokens[0, running.length])
        running.length += 1
        if not done[0]:
            return [Update(running.id, (token,))]
        self._prompt = None
        finish = "length" if running.request.max_new_tokens == 1 else "stop"
        if token in self._stop_ids(running.request):
            finish = "stop"
        return [Update(running.id, (token,), finish, DecodeStats((), 0))]

    def _advance_rows(self) -> list[Update]:
        if not any(self._rows):
            return []
        rows = len(self._rows)
        start = np.array([row.length if row else 0 for row in self._rows], np.int32)
        self._batch = self._decode(self._batch, self._times[rows], rows, self.config.rounds)
        recent = recent_tokens(self._batch, start, width=self._width)
        state = self._batch.state
        recent, length, done, by_size = jax.device_get(
            (recent, state.length, state.done, self._habit.rounds)
        )
        self.rounds_by_size = by_size.tolist()
        updates, ended = [], []
        for i, running in enumerate(self._rows):
            if running is None:
                continue
            tokens = tuple(recent[i, : length[i] - running.length].tolist())
            running.length = int(length[i])
            if done[i]:
                ended.append((i, tokens))
            elif tokens:
                updates.append(Update(running.id, tokens))
        if ended:
            stops = [self._stop_ids(self._rows[i].request) for i, _ in ended]
            finish = [
                "stop" if tokens and tokens[-1] in ids else "length"
                for (_, tokens), ids in zip(ended, stops, strict=True)
            ]
            updates += self._release([i for i, _ in ended], finish, [t for _, t in ended])
        return updates

    def _release(self, rows, finish, tokens) -> list[Update]:
        """Frees rows; their last updates."""
        state = self._batch.state
        rounds, committed, nodes = jax.device_get((state.rounds, state.committed, state.nodes))
        updates = []
        for row, why, last in zip(rows, finish, tokens, strict=True):
            stats = DecodeStats(tuple(committed[row, : rounds[row]].tolist()), int(nodes[row]))
            updates.append(Update(self._rows[row].id, last, why, stats))
            self._rows[row] = None
        return updates

    def _free_row(self) -> int | None:
        """A free row, of a larger batch if need be; None when all slots are taken."""
        if all(self._rows):
            bucket = self._buckets.index(len(self._rows)) + 1
            if bucket == len(self._buckets):
                return None
            self._resize(self._buckets[bucket])
        return self._rows.index(None)

    def _fit_rows(self) -> None:
        """Shrinks a batch that has been too large for a while, or is empty."""
        bucket = self._buckets.index(len(self._rows))
        running = sum(row is not None for row in self._rows)
        if bucket == 0 or running > self._buckets[bucket - 1] or self._prompt is not None:
            self._idle_rows = 0
            return
        self._idle_rows += 1
        if self._idle_rows > SHRINK_AFTER or not running:
            self._resize(self._buckets[bucket - 1])
            self._idle_rows = 0

    def _resize(self, rows: int) -> None:
        taken = [i for i, row in enumerate(self._rows) if row is not None]
        source = np.full(rows, -1, np.int32)
        source[: len(taken)] = taken
        self._batch = move_rows(self._batch, source)
        self._rows = [self._rows[i] for i in taken] + [None] * (rows - len(taken))

    def _decode(self, batch: Batch, times: StepTimes, rows: int, rounds: int) -> Batch:
        batch, self._habit = decode_rows(
            self._decoder,
            self._params,
            batch,
            self._habit,
            times,
            np.int32(rounds),
            schedule=self._schedule,
            sizes=self._sizes[rows],
        )
        return batch

    def _end_prompt(self, requests: Requests, prefilling: Prefilling) -> Batch:
        held = prefilling.cache, prefilling.drafter
        return end_prompt(
            self._decoder, self._params, requests, prefilling.final, held, age=self._age
        )

    def _half_full(self, rows: int) -> Batch:
        batch = self._empty(rows)
        length = jnp.full(rows, self._capacity // 2, jnp.int32)
        limit = jnp.full(rows, self._capacity - self._decoder.drafter.depth - 1, jnp.int32)
        state = dataclasses.replace(
            batch.state, length=length, limit=limit, done=jnp.zeros(rows, bool)
        )
        return dataclasses.replace(batch, state=state)

    def _empty(self, rows: int) -> Batch:
        return empty_rows(
            self._decoder, self._params, rows=rows, capacity=self._capacity, age=self._age
        )

    def _pack(self, request: Request) -> Requests:
        return pack(
            self._decoder,
            [request.prompt],
            batch=1,
            capacity=self._capacity,
            max_new_tokens=request.max_new_tokens,
            budget=self._budget,
            sampling=[request.sampling],
            keys=request_keys([request.seed], 1),
        )

    def _stop_ids(self, request: Request) -> tuple[int, ...]:
        stops = request.sampling.stop_ids
        return self.target.config.eos_token_ids if stops is None else stops

    @property
    def _width(self) -> int:
        """Tokens a burst may decide per row."""
        return self.config.rounds * (self._decoder.drafter.depth + 1)


def _only(sizes, chosen: int) -> StepTimes:
    """Step times that leave one size to choose."""
    seconds = np.full(len(sizes), np.inf, np.float32)
    seconds[chosen] = 1.0
    totals, per_row = ([getattr(s, n) for s in sizes] for n in ("total", "per_row"))
    return StepTimes(np.array(totals, np.int32), np.array(per_row, np.int32), seconds)


def _unused(count: int) -> StepTimes:
    """What a fixed schedule does not look at."""
    return StepTimes(np.zeros(count, np.int32), np.zeros(count, np.int32), np.ones(count, "f4"))
