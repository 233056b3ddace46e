"""Continuous batching: requests enter and leave a running batch between rounds.

One thread calls `Engine.step` again and again; any thread may submit and cancel.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import threading
import time
from collections import deque

import jax
import numpy as np

from jaxspec.decoding.curve import Curve
from jaxspec.decoding.habit import MAX_SIZES
from jaxspec.decoding.logprobs import LogProbs
from jaxspec.decoding.requests import stop_ids_of
from jaxspec.decoding.schedule import Batch
from jaxspec.decoding.state import Prefilling, Requests
from jaxspec.decoding.stats import DecodeStats
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.drafters.plain import PLAIN
from jaxspec.models.target import Target
from jaxspec.serving.config import EngineConfig
from jaxspec.serving.kept_programs import KeptPrograms
from jaxspec.serving.prefix_cache import Page
from jaxspec.serving.programs import Programs
from jaxspec.serving.readiness import Readiness
from jaxspec.serving.requests import QueueFull, Request, TokenLogProb, Update, read_logprobs
from jaxspec.serving.running import Running, RunningRows


@dataclasses.dataclass
class _Prompt:
    """The prompt in prefill.

    Attributes:
      chunk: index of the next chunk to run.
      pages: pages of its prefix in the prefix cache; None once no more can be added.
      cached: tokens taken from the prefix cache.
      waited: seconds that the request was in the queue.
      batch: its batch of one row once prefill is done and it waits for a row; else None.
    """

    running: Running
    requests: Requests
    prefilling: Prefilling | None
    waited: float
    chunk: int = 0
    pages: list[Page] | None = None
    cached: int = 0
    batch: Batch | None = None


class Engine:
    """Decodes requests as they arrive.

    A request gets the tokens of `jaxspec.generate` at its seed, whatever else is in the batch
    (in float32; with rejection sampling, other tokens of the same distribution).

    Attributes:
      config, target, drafter: as given.
      ready: its compiled programs and step times (`Readiness`).
      burst_seconds: duration of the last burst of rounds.
      rounds_by_size: rounds so far at the first, second, … verify size of their batch.
    """

    def __init__(
        self,
        target: Target,
        drafter: LoadedDrafter = PLAIN,
        config: EngineConfig = EngineConfig(),  # noqa: B008
        *,
        curve: Curve | None = None,
        kept: KeptPrograms | None = None,
    ):
        """Args: kept: store of compiled programs, not shared with another engine.

        Raises ValueError: see `EngineConfig.resolved` and `Curve.check`.
        """
        self.target, self.drafter = target, drafter
        self.config = config.resolved(target.config, drafter.drafter.size)
        self._programs = Programs(target, drafter, self.config, kept or KeptPrograms())
        self.ready = Readiness(self._programs, curve)
        self._prefixes = self._programs.prefix_cache()
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._waiting: deque[Running] = deque()
        self._cancelled: set[int] = set()
        self._prompt: _Prompt | None = None
        self._rows = RunningRows(self._programs)
        self._habit = self._programs.habit()
        self.burst_seconds = 0.0
        self.rounds_by_size = [0] * MAX_SIZES

    # Any thread.

    def submit(self, request: Request) -> int:
        """Queues a request; returns its id.

        Raises:
          ValueError: it cannot be served.
          QueueFull: too many are waiting.
        """
        request.check(self.target.config, self.config.room, self.config.top_logprobs)
        grammar = request.grammar
        if grammar is not None and self.config.rejection:
            raise ValueError(
                "this server uses rejection sampling, which grammars do not work with; leave "
                "the grammar out, or start it without --rejection"
            )
        matcher = None if grammar is None else grammar.matcher()
        if matcher is not None:
            self.ready.ask_for_grammars()
        with self._lock:
            if len(self._waiting) >= self.config.queue:
                raise QueueFull(
                    f"the queue is full ({len(self._waiting)} waiting requests); try later"
                )
            number = next(self._numbers)
            now, length = time.perf_counter(), len(request.prompt)
            stop_ids = stop_ids_of(request.sampling, self.target.config)
            self._waiting.append(Running(number, request, now, stop_ids, length, matcher))
            self.ready.wanted = max(self.ready.wanted, len(self._waiting) + self.running)
        return number

    def cancel(self, id: int) -> None:
        """Ends a request at the next step, unless it has ended."""
        with self._lock:
            self._cancelled.add(id)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests in prefill or decoding."""
        return self._rows.running + (self._prompt is not None)

    # The engine's own thread.

    def setup(self) -> dict:
        """Everything that step times depend on; a stored curve is valid for an equal setup."""
        return self._programs.setup()

    def open(self) -> None:
        """Compiles the programs for one request at a time; `ready.prepare` adds the rest."""
        self._open(few=True)

    def _open(self, *, few: bool) -> None:
        self.ready.open(self._prefixes, few=few)
        self._rows.open()

    def warm_up(self, **options) -> None:
        """Compiles all programs except those for grammars; measures the step-time curve if an
        adaptive schedule lacks one.

        Args: options: of `Readiness.measure`.
        """
        self._open(few=False)
        self.ready.wanted = self.config.slots
        while self.ready.prepare():
            pass
        while self.ready.measure(**options):
            pass

    def step(self) -> list[Update]:
        """One turn: cancellations, prompt chunks, a burst of rounds.

        Chunks take about as long as a burst, so running requests wait for prompts at most half
        of the time, or for one chunk.

        Returns:
          The requests' updates.
        """
        if self._rows.batch is None:
            self.warm_up()
        while self.ready.lacks_grammars and not self.ready.beside:
            self.ready.prepare()
        updates = self._apply_cancellations()
        updates += self._advance_prompts()
        updates += self._advance_rows()
        self._rows.fit(self.config.rounds, awaited=self._prompt is not None)
        return updates

    @property
    def busy(self) -> bool:
        """Whether `step` has something to do."""
        begins = not self.ready.beside or self._next_waiting() is not None
        waiting = self._cancelled or (self._waiting and begins)
        return bool(waiting or self._prompt or self._rows.running or self._rows.grown)

    @property
    def pressed(self) -> bool:
        """Whether a request waits for a row, or for grammar programs."""
        prompt = self._prompt
        return self.ready.lacks_grammars or (prompt is not None and prompt.batch is not None)

    def device_bytes(self) -> int:
        """Bytes of the arrays held for requests, without weights."""
        held = [self._rows.batch]
        if self._prompt is not None:
            held += [self._prompt.prefilling, self._prompt.batch]
        prefixes = self._prefixes.nbytes if self._prefixes is not None else 0
        return sum(x.nbytes for x in jax.tree.leaves(held)) + prefixes

    @property
    def prefix_pages(self) -> tuple[int, int]:
        """Pages of the prefix cache in use, and its capacity in pages."""
        prefixes = self._prefixes
        return (0, 0) if prefixes is None else (len(prefixes), prefixes.places)

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
        stopped = {
            i: Update(running.id, (), "cancelled")
            for i, running in self._rows.taken
            if running.id in cancelled
        }
        updates += self._rows.release(stopped)
        self._rows.stop(list(stopped))
        return updates

    def _advance_prompts(self) -> list[Update]:
        """Runs a chunk, and more while they have taken less time than the last burst."""
        most = math.inf if self.config.throughput else self.burst_seconds
        began = time.perf_counter()
        updates = self._advance_prompt()
        while self._prompt_runs() and time.perf_counter() - began < most:
            updates += self._advance_prompt()
        return updates

    def _prompt_runs(self) -> bool:
        """Whether there is a chunk to run, rather than a prompt that waits for a row."""
        if self._prompt is None:
            return self._next_waiting() is not None
        return self._prompt.batch is None

    def _next_waiting(self) -> Running | None:
        """The first request in the queue that may begin; those with a grammar wait until its
        programs are compiled."""
        with self._lock:
            lacking = self.ready.lacks_grammars
            every = (r for r in self._waiting if r.matcher is None or not lacking)
            return next(every, None)

    def _advance_prompt(self) -> list[Update]:
        """Runs one chunk of the current prompt, chooses its first token, or gives it a row."""
        if self._prompt is None:
            waiting = self._next_waiting()
            if waiting is None:
                return []
            prompt = self._begin_prompt(waiting)  # only this thread takes from the queue
            with self._lock:
                self._prompt = prompt
                self._waiting.remove(waiting)
        prompt, updates = self._prompt, []
        if prompt.batch is None:
            prompt.prefilling = jax.block_until_ready(
                self._programs.run_chunk(prompt.requests, prompt.chunk, prompt.prefilling)
            )
            prompt.chunk += 1
            self._keep_page(prompt)
            if prompt.chunk * self.config.chunk < len(prompt.running.request.prompt):
                return []
            updates = self._first_token(prompt)
        if self._prompt is not None:
            placed = self._rows.place(prompt.running, prompt.batch, self.ready.has)
            self._prompt = None if placed else prompt
        return updates

    def _begin_prompt(self, running: Running) -> _Prompt:
        request = running.request
        requests, prefilling = self._programs.pack(request), self._programs.begin_prompt()
        waited = time.perf_counter() - running.submitted
        prompt = _Prompt(running, requests, prefilling, waited)
        if self._prefixes is None:
            return prompt
        prompt.pages = []
        if not request.prompt_logprobs:  # they need the whole prompt to be run
            prompt.prefilling, prompt.pages = self._prefixes.begin(
                prefilling, request.prompt, request.cache_salt
            )
        prompt.chunk = len(prompt.pages)
        prompt.cached = prompt.chunk * self.config.chunk
        return prompt

    def _keep_page(self, prompt: _Prompt) -> None:
        """Caches the chunk that has just run, if it was full and those before it are cached."""
        request = prompt.running.request
        full = prompt.chunk * self.config.chunk <= len(request.prompt)
        if prompt.pages is None or not full:
            return
        kept = self._prefixes.keep(
            prompt.prefilling, prompt.pages, request.prompt, request.cache_salt
        )
        if not kept:
            prompt.pages = None

    def _first_token(self, prompt: _Prompt) -> list[Update]:
        running = prompt.running
        allowed = running.restricting and running.restricting.allowed
        prompt.batch = self._programs.end_prompt(prompt.requests, prompt.prefilling, allowed)
        prompt.prefilling = None
        state, request = prompt.batch.state, running.request
        laws = None if request.logprobs is None else state.logprobs
        tokens, laws = jax.device_get((state.tokens, laws))
        row, first = tokens[0].tolist(), running.length
        logprobs = read_logprobs(laws, 0, range(first, first + 1), row, request.logprobs)
        update = running.advance((row[first],), logprobs)
        update = dataclasses.replace(update, cached=prompt.cached, waited=prompt.waited)
        if request.prompt_logprobs:
            logprobs = read_logprobs(laws, 0, range(1, first), row, request.logprobs)
            logprobs = TokenLogProb(row[0], None, ()), *logprobs
            update = dataclasses.replace(update, prompt_logprobs=logprobs)
        if update.finish is not None:
            self._prompt = None
            update = dataclasses.replace(update, stats=DecodeStats((), 0))
        return [update]

    def _advance_rows(self) -> list[Update]:
        if not self._rows.running:
            return []
        began = time.perf_counter()
        recent, laws, length = self._burst()
        self.burst_seconds = time.perf_counter() - began
        updates, ended = [], {}
        for i, running in self._rows.taken:
            tokens = recent[i, : length[i] - running.length].tolist()
            top = running.request.logprobs
            logprobs = read_logprobs(laws, i, range(len(tokens)), tokens, top)
            update = running.advance(tokens, logprobs)
            if update.finish is not None:
                ended[i] = update
            elif update.tokens:
                updates.append(update)
        updates += self._rows.release(ended)
        self._rows.stop([i for i, update in ended.items() if update.finish == "stuck"])
        self._rows.resume()
        return updates

    def _burst(self) -> tuple[np.ndarray, LogProbs | None, np.ndarray]:
        """Runs rounds of all rows. Returns the new tokens [B, n], their log-probabilities if a
        request asks for them, and lengths [B]."""
        rows, start = self._rows, self._rows.lengths()
        matchers = [None if x is None else x.restricting for x in rows.requests]
        if any(matchers):
            rows.batch, self._habit = self._programs.restricted_round(
                rows.batch, self._habit, self.ready.staircases[len(rows)], matchers
            )
        else:
            rows.batch, self._habit = self._programs.decode(
                rows.batch,
                self._habit,
                self.ready.staircase(len(rows)),
                self.config.rounds,
            )
        state, laws = rows.batch.state, None
        recent = self._programs.recent_tokens(rows.batch, start)
        if any(running.request.logprobs is not None for _, running in rows.taken):
            laws = self._programs.recent_logprobs(rows.batch, start)
        recent, laws, length, by_size = jax.device_get(
            (recent, laws, state.length, self._habit.rounds)
        )
        self.rounds_by_size = by_size.tolist()
        return recent, laws, length
