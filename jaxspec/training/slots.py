"""Throughput decoding: a fixed number of rows, where one that is done makes room for the next.

Rows are refilled between bursts of rounds. A refill runs the prompts of a few requests as a
batch of their own and copies the result into free rows of the state.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import deque
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.decoding.loop import decode
from jaxspec.decoding.prefill import prefill
from jaxspec.decoding.requests import capacity_for, decoder_for, pack, unpack
from jaxspec.decoding.sampling import Sampling
from jaxspec.decoding.stats import DecodeStats
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.drafters.plain import PLAIN
from jaxspec.models.target import Target

CHUNK = 32  # prompt tokens per forward: a refill of a few rows waits for its longest prompt


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt.

    Attributes:
      label: comes back with the answer.
      prompt: token ids.
      key: typed key, decides what is sampled.
    """

    label: Any
    prompt: list[int]
    max_new_tokens: int
    sampling: Sampling
    key: jax.Array


@dataclasses.dataclass(frozen=True)
class Answer:
    """The tokens a request got, a final stop id included."""

    label: Any
    token_ids: list[int]
    stats: DecodeStats


class Slots:
    """Decodes requests as they are added; `step` returns those that are done.

    Attributes:
      room: tokens a prompt and its answer may have together.
    """

    def __init__(
        self,
        target: Target,
        *,
        room: int,
        drafter: LoadedDrafter = PLAIN,
        rows: int = 16,
        refill: int = 4,
        rounds: int = 8,
    ):
        """Args:
        rows: decoded together.
        refill: rows filled at a time; that many must be free first.
        rounds: of a burst.
        """
        self.room, self.rows, self.refill, self.rounds = room, rows, min(refill, rows), rounds
        decoder, self._params = decoder_for(target, drafter)
        self._decoder = dataclasses.replace(decoder, chunk=CHUNK)
        self._capacity = capacity_for(room, self._decoder)
        self._waiting: deque[Request] = deque()
        self._running: dict[int, Request] = {}
        self._state = self._sampling = None

    def add(self, request: Request) -> None:
        """Queues a request.

        Raises:
          ValueError: it does not fit.
        """
        tokens = len(request.prompt) + request.max_new_tokens
        if tokens > self.room:
            raise ValueError(
                f"a prompt of {len(request.prompt)} tokens and {request.max_new_tokens} new "
                f"ones need {tokens} places; rows have {self.room}"
            )
        self._waiting.append(request)

    @property
    def busy(self) -> int:
        """Requests not yet answered."""
        return len(self._waiting) + len(self._running)

    def step(self) -> Iterator[Answer]:
        """Fills free rows, runs a burst of rounds, yields the answers that are complete."""
        while self._waiting and self.rows - len(self._running) >= min(
            self.refill, max(1, len(self._waiting))
        ):
            self._fill()
        if not self._running:
            return
        self._state = decode(
            self._decoder, self._params, self._state, self._sampling, np.int32(self.rounds)
        )
        done = jax.device_get(self._state.done)
        ready = [row for row in self._running if done[row]]
        if not ready:
            return
        lengths = [
            len(self._running[row].prompt) if row in self._running else 0
            for row in range(self.rows)
        ]
        results = unpack(self._state, lengths)
        for row in ready:
            yield Answer(self._running.pop(row).label, *results[row])

    def _fill(self) -> None:
        free = [row for row in range(self.rows) if row not in self._running]
        count = min(self.refill, len(self._waiting), len(free))
        batch = [self._waiting.popleft() for _ in range(count)]
        places = np.full(self.refill, self.rows, np.int32)  # out of range: dropped
        places[:count] = free[:count]
        self._running |= dict(zip(free, batch, strict=False))
        requests = pack(
            self._decoder,
            [request.prompt for request in batch],
            batch=self.refill,
            capacity=self._capacity,
            max_new_tokens=1,
            budget=self._decoder.drafter.size,
            sampling=[request.sampling for request in batch],
            keys=jnp.stack([request.key for request in batch]),
        )
        requests.max_new_tokens[:count] = [request.max_new_tokens for request in batch]
        fresh = prefill(self._decoder, self._params, requests)
        if self._state is None:
            self._state = _repeat(fresh, self.rows)
            self._state = dataclasses.replace(self._state, done=jnp.ones(self.rows, bool))
            self._sampling = _repeat(requests.sampling, self.rows)
        self._state, self._sampling = _place(
            (self._state, self._sampling), (fresh, requests.sampling), places
        )


def _repeat(tree: Any, rows: int) -> Any:
    """The first row, `rows` times."""
    return jax.tree.map(lambda x: jnp.repeat(x[:1], rows, axis=0), tree)


@functools.partial(jax.jit, donate_argnums=0)
def _place(tree: Any, fresh: Any, places: jax.Array) -> Any:
    """Overwrites rows of every array; every leaf has the batch in front."""
    return jax.tree.map(lambda x, new: x.at[places].set(new, mode="drop"), tree, fresh)
