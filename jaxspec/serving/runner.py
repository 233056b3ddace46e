"""An engine in a thread of its own; asyncio tasks wait for their requests."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable

from jaxspec.decoding.curve import Curve
from jaxspec.serving.engine import Engine
from jaxspec.serving.memory import trim_memory
from jaxspec.serving.requests import Request, Update

QUIET_SECONDS = 1.0  # idle time after which programs are prepared and memory is returned
PATIENCE = 30.0  # maximum seconds that preparing waits for idle time

log = logging.getLogger("uvicorn.error")


class EngineFailed(Exception):
    """The engine raised an error and has stopped; its requests are lost."""


class Ticket:
    """A submitted request: iterate over its updates; the last one has `finish`.

    As a context manager it cancels the request on exit, unless it has ended.
    """

    def __init__(self, runner: Runner, request: Request):
        self._runner, self._request = runner, request
        self._loop, self._news = asyncio.get_running_loop(), asyncio.Queue()
        self._open = True
        self.id = -1

    def cancel(self) -> None:
        """Ends the request at the engine's next step; its last update still comes."""
        if self._open:
            self._runner._cancel(self.id)

    def __aiter__(self):
        return self

    async def __anext__(self) -> Update:
        if not self._open:
            raise StopAsyncIteration
        update = await self._news.get()
        if isinstance(update, Exception):
            self._open = False
            raise update
        self._open = update.finish is None
        return update

    def __enter__(self) -> Ticket:
        return self

    def __exit__(self, *_) -> None:
        self.cancel()
        self._runner._forget(self.id)

    def _put(self, news: Update | Exception) -> None:
        self._loop.call_soon_threadsafe(self._news.put_nowait, news)


class Runner:
    """Calls `Engine.step` while there is something to do.

    The engine never waits for a slow reader: its unread tokens are bounded by the request's
    `max_new_tokens`.

    Attributes:
      engine: others may read its counts; only this class steps it.
      on_step: called after every step with its seconds and its number of new tokens.
    """

    def __init__(self, engine: Engine, on_curve: Callable[[Curve], object] | None = None):
        """Args:
        engine: after `warm_up` or `open`. After `open` the remaining programs are compiled
          while it serves, and step times are measured while it is idle.
        on_curve: called with the measured step times; an OSError becomes a warning.
        """
        self.engine, self._on_curve = engine, on_curve
        self.on_step: Callable[[float, int], object] = lambda seconds, tokens: None
        self._lock = threading.Lock()
        self._tickets: dict[int, Ticket] = {}
        self._wake = threading.Event()
        self._news = threading.Event()  # wakes the compiling thread: a request or a step
        self._closing = False
        self._failure: Exception | None = None
        engine.ready.beside = True
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        threading.Thread(target=self._prepare, name="compiler", daemon=True).start()

    @property
    def healthy(self) -> bool:
        """Whether requests are still served."""
        return self._failure is None and not self._closing

    @property
    def tickets(self) -> int:
        """Number of requests with a waiting client."""
        return len(self._tickets)

    def submit(self, request: Request) -> Ticket:
        """Submits a request; must be called in a running event loop.

        Raises:
          ValueError, QueueFull: see `Engine.submit`.
          EngineFailed: the engine has stopped.
        """
        ticket = Ticket(self, request)
        with self._lock:
            if not self.healthy:
                raise EngineFailed(
                    f"the engine has stopped: {self._failure or 'it was closed'}"
                )
            ticket.id = self.engine.submit(request)
            self._tickets[ticket.id] = ticket
        self._news.set()
        self._wake.set()
        return ticket

    def close(self) -> None:
        """Stops the thread after the current step; running requests fail."""
        self._closing = True
        self._news.set()
        self._wake.set()
        self._thread.join()
        self.engine.ready.beside = False

    def _failed(self) -> EngineFailed:
        error = EngineFailed(f"the engine has stopped: {self._failure or 'it was closed'}")
        error.__cause__ = self._failure
        return error

    def _cancel(self, id: int) -> None:
        self.engine.cancel(id)
        self._wake.set()

    def _forget(self, id: int) -> None:
        with self._lock:
            self._tickets.pop(id, None)

    def _run(self) -> None:
        try:
            while True:
                self._wake.clear()
                if self._closing:  # read after clearing, or its signal could be lost
                    break
                if not self.engine.busy:
                    if not self._measured() and not self._wake.wait(QUIET_SECONDS):
                        trim_memory()
                        self._wake.wait()
                    continue
                began = time.perf_counter()
                updates = self.engine.step()
                self._news.set()
                decided = sum(len(update.tokens) for update in updates)
                self.on_step(time.perf_counter() - began, decided)
                self._give_out(updates)
        except Exception as error:  # passed on to all waiting clients and to /health
            self._failure = error
        finally:
            self._closing = True
            lost = self._failed()
            with self._lock:
                waiting, self._tickets = list(self._tickets.values()), {}
            for ticket in waiting:
                _tell(ticket, lost)

    def _prepare(self) -> None:
        try:
            while not self._closing:
                self._give_way()
                if self.engine.ready.prepare():
                    self._wake.set()  # a request may wait for these programs
                    continue
                self._wake.set()  # there is time to measure
                self._news.wait()
        except Exception as error:
            self._failure = error
            self._closing = True
        self._wake.set()

    def _give_way(self) -> None:
        """Waits until the engine is idle, unless a request needs the next programs."""
        until = time.monotonic() + PATIENCE
        while True:
            self._news.clear()
            if self._closing or self.engine.pressed:
                return
            left = max(0.0, until - time.monotonic())
            most = left if self.engine.busy else min(left, QUIET_SECONDS)
            if not self._news.wait(most):
                return

    def _measured(self) -> bool:
        """Measures once, if there is something to measure; returns whether it did."""
        try:
            if not self.engine.ready.measure():
                return False
        except ValueError as error:
            log.warning("step times are unusable, the schedule keeps guessing them: %s", error)
            return False
        curve = self.engine.ready.curve
        if self._on_curve is not None and curve is not None:
            try:
                self._on_curve(curve)
            except OSError as error:
                log.warning("step times are not kept, the next start measures again: %s", error)
        return True

    def _give_out(self, updates: list[Update]) -> None:
        for update in updates:
            with self._lock:
                ticket = self._tickets.get(update.id)
                if update.finish is not None:
                    self._tickets.pop(update.id, None)
            if ticket is not None and not _tell(ticket, update):
                self.engine.cancel(update.id)


def _tell(ticket: Ticket, news: Update | Exception) -> bool:
    """Whether the ticket's event loop still runs."""
    try:
        ticket._put(news)
    except RuntimeError:  # the loop was closed while the request ran
        return False
    return True
