"""Tokens of one answer as text, cut before the first stop text."""

from __future__ import annotations

from collections.abc import Sequence

from jaxspec.tokenizer import Tokenizer


class AnswerText:
    """Turns tokens into text that can be sent to the client.

    Text that may be the beginning of a stop text is held back until that is decided.

    Attributes:
      stopped: a stop text was found; nothing comes after it.
      taken: tokens of the answer so far, that which completed a stop text included.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), *, min_tokens: int = 0):
        """Args: min_tokens: stop texts are looked for in the text after so many tokens."""
        self._pieces, self._stops = tokenizer.stream(), tuple(stops)
        self._min_tokens = min_tokens
        self._held = ""
        self.stopped, self.taken = False, 0

    def add(self, tokens: Sequence[int]) -> str:
        """The text these tokens release."""
        text = ""
        for token in tokens:
            if self.stopped:
                break
            self.taken += 1
            piece = self._pieces.step(token)
            text += piece if self.taken <= self._min_tokens else self._release(piece)
        return text

    def finish(self) -> str:
        """What was held back, at the end of the tokens."""
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
    """One answer that a stop text may end, as its tokens arrive.

    Attributes:
      start: length of its prompt.
      text: certain so far; cut before the stop text.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], start: int, min_tokens: int):
        self._answer = AnswerText(tokenizer, stops, min_tokens=min_tokens)
        self.start, self.text = start, ""

    @property
    def seen(self) -> int:
        """Tokens read; the last of them completes the stop text, once there is one."""
        return self._answer.taken

    def see(self, ids: Sequence[int]) -> bool:
        """Reads on in all tokens of the answer so far; whether there is a stop text."""
        self.text += self._answer.add(ids[self.seen :])
        return self._answer.stopped

    def ended(self, ids: Sequence[int]) -> bool:
        """`see` for an answer that has no more tokens: nothing is held back."""
        if not self.see(ids):
            self.text += self._answer.finish()
        return self._answer.stopped


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that begins the stop text.

    >>> overlap("abc <", "</end>"), overlap("abc", "</end>")
    (1, 0)
    """
    return next(n for n in range(min(len(text), len(stop)), -1, -1) if text.endswith(stop[:n]))
