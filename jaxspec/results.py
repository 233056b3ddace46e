"""Results of decoding."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from jaxspec.decoding.stats import DecodeStats

Finish = Literal["stop", "length", "interrupted"]


@dataclasses.dataclass(frozen=True, repr=False)
class Completion:
    """The answer to one prompt.

    Attributes:
      token_ids: the generated tokens, including a final stop id or the tokens of a stop text.
      text: their text, without special tokens, cut before a stop text; None without a
        tokenizer.
      seconds: wall-clock time of the prompt's batch, prefill included. The first call for a
        shape also compiles (see `warm_up`).
      finish: "stop" (a stop id or stop text), "length" (`max_new_tokens` reached) or
        "interrupted" (Ctrl-C).
    """

    token_ids: list[int]
    text: str | None
    stats: DecodeStats
    seconds: float
    finish: Finish

    @property
    def tokens_per_second(self) -> float:
        """Tokens of this answer over the seconds of its batch."""
        return len(self.token_ids) / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """One row of a table: `pandas.DataFrame(x.to_dict() for x in completions)`."""
        return {
            "text": self.text,
            "new_tokens": len(self.token_ids),
            "rounds": self.stats.rounds,
            "tau": self.stats.tau,
            "nodes": self.stats.nodes,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "finish": self.finish,
        }

    def __repr__(self) -> str:
        shown = repr(self.text if self.text is not None else self.token_ids)
        shown = shown if len(shown) <= 72 else f"{shown[:71]}…"
        return (
            f"Completion({shown}, {len(self.token_ids)} tokens, tau {self.stats.tau:.2f}, "
            f"{self.tokens_per_second:.1f} tokens/s, {self.finish})"
        )


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during `generate`.

    Attributes:
      completions: the answers so far, in order; the last ones may be cut short.
    """

    def __init__(self, completions: list[Completion]):
        super().__init__("interrupted")
        self.completions = completions
