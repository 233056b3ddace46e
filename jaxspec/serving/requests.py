"""What goes into an engine and what comes out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from jaxspec.config import TargetConfig
from jaxspec.decoding.requests import MAX_STOP_IDS
from jaxspec.decoding.sampling import Sampling
from jaxspec.decoding.stats import DecodeStats

MAX_TEMPERATURE = 1e30  # float32 holds it, and a logit over it

Finish = Literal["stop", "length", "cancelled"]


class QueueFull(Exception):
    """The engine has as many waiting requests as it may have; try again later."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt.

    Attributes:
      prompt: token ids.
      seed: decides what is sampled, as `jaxspec.generate(seed=[seed])` does.
    """

    prompt: Sequence[int]
    max_new_tokens: int = 256
    sampling: Sampling = Sampling()
    seed: int = 0

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
        if type(self.seed) is not int or not 0 <= self.seed < 2**31:
            raise ValueError(f"the seed is {self.seed!r}; expected 0 … 2**31 - 1")
        self._check_sampling(config)

    def _check_sampling(self, config: TargetConfig) -> None:
        """What the arrays of a batch cannot hold would end all its requests."""
        stops = self.sampling.stop_ids
        stops = config.eos_token_ids if stops is None else stops
        if len(stops) > MAX_STOP_IDS:
            raise ValueError(f"{len(stops)} stop ids were given; at most {MAX_STOP_IDS} fit")
        bad = [t for t in stops if not 0 <= t < config.vocab_size]
        if bad:
            raise ValueError(
                f"there is stop id {bad[0]}; the target's vocabulary is "
                f"0 … {config.vocab_size - 1}"
            )
        for name, most in (("temperature", MAX_TEMPERATURE), ("top_k", 2**31 - 1)):
            if getattr(self.sampling, name) > most:
                raise ValueError(
                    f"{name} is {getattr(self.sampling, name)}; expected at most {most}"
                )


@dataclasses.dataclass(frozen=True)
class Update:
    """News of one request.

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
