"""Thoughts apart from the answer: what a model writes between <think> and </think>."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from jaxspec.answer_text import overlap
from jaxspec.serving.grammars import Lead
from jaxspec.tokenizer import Tokenizer

OPEN, CLOSE = "<think>", "</think>"
BEGIN = f"{OPEN}\n"  # as templates write it
LEAD = Lead(CLOSE, may_end=False)

# Where thoughts begin: in the prompt, as with Qwen3.5's template, or in the answer, if at all.
Start = Literal["prompt", "answer"]


def start_of(tokenizer: Tokenizer, prompt: Sequence[int]) -> Start | None:
    """Where the thoughts begin of the answer to a chat; None if the model has none."""
    if not tokenizer.template_has(CLOSE):
        return None
    if CLOSE not in tokenizer.decode(tokenizer.encode(CLOSE, special=False)):
        return None  # decoding omits it, so that the end would not be seen
    last = tokenizer.decode(prompt[-len(OPEN) - 2 :])
    return "prompt" if last.rstrip().endswith(OPEN) else "answer"


def after_thoughts(grammar: str) -> str:
    """The text of a grammar of answers that have thoughts before them, `LEAD`."""
    return 'start: "\\n\\n" answer\n' + grammar.replace("start:", "answer:", 1)


class ThoughtReader:
    """Splits a growing answer into thoughts and what follows them.

    Line feeds around thoughts are left out.
    """

    def __init__(self, start: Start, ends: Sequence[str] = ()):
        """Args: ends: texts that end thoughts as </think> does, but belong to what follows."""
        self._ends = (CLOSE, *ends)
        self._held, self._thinking = "", start == "prompt"
        self._begun = self._thinking  # whether it is known that there are thoughts, or none
        self._fresh = True  # no text but line feeds since the last mark

    def add(self, text: str, *, last: bool = False) -> tuple[str, str]:
        """The new thoughts and the new text after them. Args: last: no text comes after it."""
        self._held += text
        if not self._begun and not self._begin(last):
            return "", ""
        thoughts = self._thoughts(last) if self._thinking else ""
        return thoughts, "" if self._thinking else self._rest()

    def _begin(self, last: bool) -> bool:
        """Whether it is decided that the answer begins with thoughts, or not."""
        begin = self._held.lstrip()
        if OPEN.startswith(begin) and begin != OPEN and not last:
            return False
        self._begun, self._thinking = True, begin.startswith(OPEN)
        if self._thinking:
            self._held = begin.removeprefix(OPEN)
        self._fresh = self._thinking
        return True

    def _thoughts(self, last: bool) -> str:
        self._skip_line_feeds()
        found = [(at, end) for end in self._ends if (at := self._held.find(end)) >= 0]
        if found:
            at, end = min(found)
            thoughts, self._held = self._held[:at], self._held[at:].removeprefix(CLOSE)
            self._thinking, self._fresh = False, True
            return thoughts.rstrip("\n")
        keep = 0 if last else max(overlap(self._held, end) for end in self._ends)
        thoughts = self._held[: len(self._held) - keep].rstrip("\n")
        self._held = self._held[len(thoughts) :]
        return thoughts

    def _rest(self) -> str:
        self._skip_line_feeds()
        rest, self._held = self._held, ""
        return rest

    def _skip_line_feeds(self) -> None:
        if self._fresh:
            self._held = self._held.lstrip("\n")
            self._fresh = not self._held
