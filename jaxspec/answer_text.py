"""Tokens of one answer as text, cut before the first stop text."""

from __future__ import annotations

from collections.abc import Sequence

from jaxspec.text_stream import TextStream
from jaxspec.tokenizer import Tokenizer


class AnswerText:
    """Turns tokens into text that can be shown at once.

    Text that may begin a stop text is held back until that is decided.

    Attributes:
      text: all text so far that is certain.
      stopped: whether a stop text was found; no text comes after it.
      taken: number of tokens read, up to the one that completed a stop text.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), *, min_tokens: int = 0):
        """Args: min_tokens: number of first tokens in whose text stop texts are ignored."""
        self._pieces, self._stops = TextStream(tokenizer), tuple(stops)
        self._min_tokens = min_tokens
        self._held = ""
        self.text, self.stopped, self.taken = "", False, 0

    def add(self, tokens: Sequence[int]) -> str:
        """The text that becomes certain with these tokens."""
        text = ""
        for token in tokens:
            if self.stopped:
                break
            self.taken += 1
            text += self._release(self._pieces.step(token))
        self.text += text
        return text

    def see(self, ids: Sequence[int]) -> str:
        """`add` for the new ones of all tokens so far."""
        return self.add(ids[self.taken :])

    def finish(self) -> str:
        """The text held back, once no more tokens come."""
        rest = self._release(self._pieces.finish())
        rest, self._held = rest + self._held, ""
        self.text += rest
        return rest

    def _release(self, text: str) -> str:
        """The part of new text that can be shown."""
        if self.stopped:
            return ""
        if self.taken <= self._min_tokens:
            return text
        text = self._held + text
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of the text that is a prefix of the stop text.

    >>> overlap("abc <", "</end>"), overlap("abc", "</end>")
    (1, 0)
    """
    return next(n for n in range(min(len(text), len(stop)), -1, -1) if text.endswith(stop[:n]))
