"""What goes into an engine and what comes out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from jaxspec.config import TargetConfig
from jaxspec.decoding.requests import request_keys, stop_ids_of
from jaxspec.decoding.sampling import Sampling
from jaxspec.decoding.stats import DecodeStats

Finish = Literal["stop", "length", "cancelled"]


class QueueFull(Exception):
    """The queue is full; try again later."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt.

    Attributes:
      prompt: token ids.
      seed: decides what is sampled, as `jaxspec.generate(seed=[seed])` does; or the typed key
        that would follow from it.
    """

    prompt: Sequence[int]
    max_new_tokens: int = 256
    sampling: Sampling = Sampling()
    seed: int | jax.Array = 0

    @property
    def key(self) -> jax.Array:
        """The typed key of its samples."""
        return request_keys([self.seed], 1)[0] if type(self.seed) is int else self.seed

    def check(self, config: TargetConfig, room: int) -> None:
        """Raises ValueError when the request cannot be served."""
        if not self.prompt:
            raise ValueError("the prompt is empty; expected at least one token")
        bad = [t for t in self.prompt if type(t) is not int or not 0 <= t < config.vocab_size]
        if bad:
            raise ValueError(
                f"the prompt has token id {bad[0]!r}; the target's vocabulary is "
                f"0 … {config.vocab_size - 1}"
            )
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; expected at least 1")
        places = len(self.prompt) + self.max_new_tokens
        if places > room:
            raise ValueError(
                f"a prompt of {len(self.prompt)} tokens and {self.max_new_tokens} new ones "
                f"need {places} places; requests have {room} here. Shorten the prompt or ask "
                "for fewer tokens"
            )
        keyed = isinstance(self.seed, jax.Array) and jnp.issubdtype(
            self.seed.dtype, jax.dtypes.prng_key
        )
        if type(self.seed) is not int and not keyed:
            raise ValueError(f"the seed is {self.seed!r}; expected an integer")
        stop_ids_of(self.sampling, config)


@dataclasses.dataclass(frozen=True)
class Update:
    """Progress of one request.

    Attributes:
      id: what `Engine.submit` returned.
      tokens: decided since the last update, a final stop id included.
      finish: why it ended; None while it goes on.
      stats: counts of the whole request, with `finish`; None before, or if it never ran.
    """

    id: int
    tokens: tuple[int, ...]
    finish: Finish | None = None
    stats: DecodeStats | None = None
