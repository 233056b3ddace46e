"""Tokens of one answer as text, cut before the first stop text."""

from __future__ import annotations

from collections.abc import Sequence

from jaxspec.tokenizer import Tokenizer


class AnswerText:
    """Turns tokens into text that can be shown at once.

    Text that may begin a stop text is held back until that is decided.

    Attributes:
      stopped: whether a stop text was found; no text comes after it.
      taken: number of tokens read, up to the one that completed a stop text.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), *, min_tokens: int = 0):
        """Args: min_tokens: number of first tokens in whose text stop texts are ignored."""
        self._pieces, self._stops = tokenizer.stream(), tuple(stops)
        self._min_tokens = min_tokens
        self._held = ""
        self.stopped, self.taken = False, 0

    def add(self, tokens: Sequence[int]) -> str:
        """The text that becomes certain with these tokens."""
        text = ""
        for token in tokens:
            if self.stopped:
                break
            self.taken += 1
            piece = self._pieces.step(token)
            text += piece if self.taken <= self._min_tokens else self._release(piece)
        return text

    def finish(self) -> str:
        """The text held back, once no more tokens come."""
        rest = self._release(self._pieces.finish())
        rest, self._held = rest + self._held, ""
        return rest

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


class CutAnswer:
    """One answer as its tokens arrive, cut at a stop text.

    Attributes:
      start: length of its prompt, in tokens.
      text: the text that is certain so far, cut before the stop text.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], start: int, min_tokens: int):
        self._answer = AnswerText(tokenizer, stops, min_tokens=min_tokens)
        self.start, self.text = start, ""

    @property
    def seen(self) -> int:
        """Number of tokens read; the last one completes the stop text, if one was found."""
        return self._answer.taken

    def see(self, ids: Sequence[int]) -> bool:
        """Reads the new ones of all tokens so far; returns whether a stop text was found."""
        self.text += self._answer.add(ids[self.seen :])
        return self._answer.stopped

    def ended(self, ids: Sequence[int]) -> bool:
        """`see` for a complete answer: no text is held back."""
        if not self.see(ids):
            self.text += self._answer.finish()
        return self._answer.stopped


def overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of the text that is a prefix of the stop text.

    >>> overlap("abc <", "</end>"), overlap("abc", "</end>")
    (1, 0)
    """
    return next(n for n in range(min(len(text), len(stop)), -1, -1) if text.endswith(stop[:n]))
