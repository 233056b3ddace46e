"""A load generator: sends requests as users would, and records their latencies."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import numpy as np

Send = Callable[[Any], AsyncIterator[int]]
"""Sends one request; yields the number of new tokens whenever some arrive."""


@dataclasses.dataclass(frozen=True)
class Seen:
    """One request as its user saw it; times are in seconds since the load began.

    Attributes:
      sent, first, last: times of sending, of the first token and of the last; None without
        tokens.
      tokens: number of tokens received.
      error: why the request failed, or None.
    """

    sent: float
    first: float | None
    last: float | None
    tokens: int
    error: str | None = None

    @property
    def first_token_seconds(self) -> float:
        return self.first - self.sent

    @property
    def seconds_per_token(self) -> float | None:
        """Mean after the first token; None for a single token."""
        return (self.last - self.first) / (self.tokens - 1) if self.tokens > 1 else None


def arrivals(rate: float, count: int, *, seed: int = 0) -> list[float]:
    """Times of a Poisson process: `count` arrivals at `rate` per second, from 0 on."""
    if not rate > 0:
        raise ValueError(f"rate is {rate} requests per second; expected more than 0")
    dice = random.Random(seed)
    times, now = [], 0.0
    for _ in range(count):
        now += dice.expovariate(rate)
        times.append(now)
    return times


def mix(prompts: Sequence[Any], count: int, *, seed: int = 0) -> list[Any]:
    """`count` prompts in cycles through all of them, each cycle in a new random order."""
    dice, drawn = random.Random(seed), []
    while len(drawn) < count:
        drawn += dice.sample(list(prompts), len(prompts))
    return drawn[:count]


async def open_loop(send: Send, requests: Sequence[Any], times: Sequence[float]) -> list[Seen]:
    """Sends request i at times[i], whether or not earlier ones are answered."""
    began = time.perf_counter()

    async def one(request, at):
        await asyncio.sleep(max(0.0, at - (time.perf_counter() - began)))
        return await _watch(send, request, began)

    return await asyncio.gather(*map(one, requests, times))


async def closed_loop(send: Send, requests: Sequence[Any], users: int) -> list[Seen]:
    """Keeps `users` requests in flight: each user sends the next when the last is answered."""
    if users < 1:
        raise ValueError(f"users is {users}; expected at least 1")
    began, left, seen = time.perf_counter(), iter(requests), []

    async def user():
        for request in left:
            seen.append(await _watch(send, request, began))

    await asyncio.gather(*(user() for _ in range(users)))
    return seen


async def _watch(send: Send, request: Any, began: float) -> Seen:
    clock = lambda: time.perf_counter() - began  # noqa: E731
    sent, first, last, tokens = clock(), None, None, 0
    try:
        async for count in send(request):
            last = clock()
            first = last if first is None else first
            tokens += count
    except Exception as error:  # a failed request is a result and does not end the load
        return Seen(sent, first, last, tokens, f"{type(error).__name__}: {error}")
    return Seen(sent, first, last, tokens)


@dataclasses.dataclass(frozen=True)
class Summary:
    """Statistics of a load.

    Attributes:
      requests, failed: counts; the other fields leave failed requests out.
      tokens_per_second: all tokens over the time from the first request to the last token.
      first_token: percentiles 50, 90, 99 of seconds to the first token.
      per_token: percentiles 50, 90, 99 of seconds per token after the first.
    """

    requests: int
    failed: int
    tokens_per_second: float
    first_token: tuple[float, float, float]
    per_token: tuple[float, float, float]


def summarise(seen: Sequence[Seen]) -> Summary:
    """Statistics of a load. Raises ValueError if no request got a token."""
    good = [s for s in seen if s.error is None and s.tokens]
    if not good:
        errors = {s.error for s in seen}
        raise ValueError(f"none of {len(seen)} requests got a token; errors: {errors}")
    seconds = max(s.last for s in good) - min(s.sent for s in good)
    rates = [s.seconds_per_token for s in good if s.seconds_per_token is not None]

    def percentiles(values):
        return tuple(np.percentile(values or [np.nan], [50, 90, 99]).tolist())

    return Summary(
        requests=len(seen),
        failed=len(seen) - len(good),
        tokens_per_second=sum(s.tokens for s in good) / seconds,
        first_token=percentiles([s.first_token_seconds for s in good]),
        per_token=percentiles(rates),
    )


def to_runner(runner) -> Send:
    """A `Send` of `serving.requests.Request`s to a runner in this process."""

    async def send(request) -> AsyncIterator[int]:
        with runner.submit(request) as ticket:
            async for update in ticket:
                if update.tokens:
                    yield len(update.tokens)

    return send


def to_server(client, model: str) -> Send:
    """A `Send` of keyword arguments of a completion to an `openai.AsyncOpenAI` client.

    A chunk counts as one token; the last chunk's usage corrects the sum.
    """

    async def send(options: dict) -> AsyncIterator[int]:
        usage = {"include_usage": True}
        chunks = await client.completions.create(
            model=model, stream=True, stream_options=usage, **options
        )
        seen = 0
        async for chunk in chunks:
            if chunk.choices and chunk.choices[0].text:
                seen += 1
                yield 1
            elif chunk.usage is not None and chunk.usage.completion_tokens > seen:
                yield chunk.usage.completion_tokens - seen

    return send
