"""Prometheus metrics of a server."""

from __future__ import annotations

import time
from collections import deque

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from jaxspec.serving.requests import Update
from jaxspec.serving.runner import Runner

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
SECONDS_PER_STEP = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
WINDOW_SECONDS = 10
SECONDS_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class ServerMetrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self, runner: Runner):
        self.registry = registry = CollectorRegistry()
        self._recent: deque[tuple[float, int]] = deque()
        self._read_from(runner)
        runner.on_step = self.step
        self.step_seconds = Histogram(
            "jaxspec_step_seconds",
            "Seconds of one turn of the engine: prompt chunks and a burst of rounds",
            buckets=SECONDS_PER_STEP,
            registry=registry,
        )
        self.requests = Counter(
            "jaxspec_requests", "Requests by how they ended", ["finish"], registry=registry
        )
        self.prompt_tokens = Counter(
            "jaxspec_prompt_tokens", "Tokens of prompts", registry=registry
        )
        self.cached_tokens = Counter(
            "jaxspec_prompt_tokens_cached",
            "Prompt tokens taken from the prefix cache",
            registry=registry,
        )
        self.tokens = Counter("jaxspec_tokens", "Tokens generated", registry=registry)
        self.rounds = Counter("jaxspec_rounds", "Rounds, summed over rows", registry=registry)
        self.nodes = Counter("jaxspec_nodes_verified", "Nodes verified", registry=registry)
        self.accepted = Counter(
            "jaxspec_accepted",
            "Rounds, summed over rows, that accepted at least this many drafted tokens",
            ["depth"],
            registry=registry,
        )
        self.queue_seconds = Histogram(
            "jaxspec_queue_seconds",
            "Seconds from the request to the start of its prefill",
            buckets=SECONDS,
            registry=registry,
        )
        self.first_token = Histogram(
            "jaxspec_first_token_seconds",
            "Seconds from the request to its first token",
            buckets=SECONDS,
            registry=registry,
        )
        self.token_seconds = Histogram(
            "jaxspec_seconds_per_token",
            "Seconds per token after the first, of one request",
            buckets=SECONDS_PER_TOKEN,
            registry=registry,
        )

    def _read_from(self, runner: Runner) -> None:
        """Registers gauges that are read from the runner on each request of /metrics."""

        def gauge(name: str, text: str, read):
            Gauge(name, text, registry=self.registry).set_function(read)

        gauge("jaxspec_waiting", "Requests in the queue", lambda: runner.engine.waiting)
        gauge("jaxspec_running", "Requests being decoded", lambda: runner.engine.running)
        gauge("jaxspec_healthy", "1 while requests are served", lambda: int(runner.healthy))
        gauge(
            "jaxspec_burst_seconds",
            "Seconds of the last burst of rounds",
            lambda: runner.engine.burst_seconds,
        )
        gauge(
            "jaxspec_tokens_per_second",
            f"Tokens decided in the last {WINDOW_SECONDS} seconds, per second",
            self._tokens_per_second,
        )
        for i, state in enumerate(("used", "room")):
            gauge(
                f"jaxspec_prefix_pages_{state}",
                "Pages of the prefix cache: in use, and its capacity",
                lambda i=i: runner.engine.prefix_pages[i],
            )

    def step(self, seconds: float, tokens: int) -> None:
        """Counts one turn of the engine and its new tokens; called by the engine's thread."""
        self.step_seconds.observe(seconds)
        self._recent.append((time.perf_counter(), tokens))
        while self._recent[0][0] < time.perf_counter() - WINDOW_SECONDS:
            self._recent.popleft()

    def _tokens_per_second(self) -> float:
        since = time.perf_counter() - WINDOW_SECONDS
        return sum(tokens for at, tokens in list(self._recent) if at >= since) / WINDOW_SECONDS

    def refused(self, why: str) -> None:
        """Counts a request that never reached the engine."""
        self.requests.labels(why).inc()

    def text(self) -> bytes:
        """The metrics in Prometheus' exposition format."""
        return generate_latest(self.registry)

    def follow(self, *, counts_prompt: bool = True) -> Watch:
        """Watches one request. Args: counts_prompt: it is the first choice of its prompt."""
        return Watch(self, counts_prompt)


class Watch:
    """Times one request."""

    def __init__(self, metrics: ServerMetrics, counts_prompt: bool):
        self._metrics, self._began = metrics, time.perf_counter()
        self._counts_prompt = counts_prompt
        self._first: float | None = None
        self._count, self._ended = 0, False

    def see(self, update: Update) -> None:
        metrics, now = self._metrics, time.perf_counter()
        if self._counts_prompt:  # once, as in the counter of all prompt tokens
            metrics.cached_tokens.inc(update.cached)
        if update.waited is not None:
            metrics.queue_seconds.observe(update.waited)
        if update.tokens:
            if self._first is None:
                self._first = now
                metrics.first_token.observe(now - self._began)
            self._count += len(update.tokens)
            metrics.tokens.inc(len(update.tokens))
        if update.finish is None:
            return
        if self._count > 1:
            metrics.token_seconds.observe((now - self._first) / (self._count - 1))
        if update.stats is not None:
            metrics.rounds.inc(update.stats.rounds)
            metrics.nodes.inc(update.stats.nodes)
            accepted = [tokens - 1 for tokens in update.stats.committed]
            for depth in range(1, max(accepted, default=0) + 1):
                metrics.accepted.labels(str(depth)).inc(sum(n >= depth for n in accepted))

    def end(self, finish: str) -> None:
        """Records how the request ended; only the first call counts."""
        if not self._ended:
            self._metrics.requests.labels(finish).inc()
        self._ended = True
