"""Are training data and evaluation prompts disjoint?

Two texts overlap if their normalised words (lower case, no punctuation) are equal, or share a
run of `NGRAM` words. Text that several evaluation prompts share ("please reason step by step
…") is format, not content, and does not count.
"""

from __future__ import annotations

import collections
import dataclasses
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxspec.data.messages import holds_conversation, row_messages
from jaxspec.data.prompts import row_turns
from jaxspec.data.sources import Source, open_source

NGRAM = 13  # words; the length GPT-3's decontamination used
FORMAT_NGRAM, FORMAT_PROMPTS = 6, 3
SHORTEST = 5  # words of content, or the n-gram's; of shorter prompts only equal texts count
# Characters of Chinese and Japanese, whose words no spaces divide: each counts as a word.
UNDIVIDED = "々-〇ぁ-ゖゝ-ゟァ-ヺー-ヿ\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff"
WORD = re.compile(rf"[{UNDIVIDED}]|[^\W{UNDIVIDED}]+")

Words = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Overlap:
    """A text that overlaps with a prompt.

    Attributes:
      text: index of the text.
      prompt: index of the first prompt that it overlaps with.
      words: the shared words; the whole text if the texts are equal.
    """

    text: int
    prompt: int
    words: str


def words(text: str) -> Words:
    """Normalised words: lower case, NFKC, without punctuation.

    >>> words("How many  CLIPS, then?")
    ('how', 'many', 'clips', 'then')
    >>> words("GPT是什么？")
    ('gpt', '是', '什', '么')
    """
    return tuple(WORD.findall(unicodedata.normalize("NFKC", text).lower()))


class Index:
    """An index of evaluation prompts, to search other texts for."""

    def __init__(self, prompts: Sequence[str], *, ngram: int = NGRAM):
        """Args: ngram: shortest run of shared words that counts."""
        split = [words(prompt) for prompt in prompts]
        self.whole: dict[Words, int] = {}
        self.grams: dict[int, dict[Words, int]] = collections.defaultdict(dict)
        shared = _format(split)
        for number, row in enumerate(split):
            self.whole.setdefault(row, number)
            for run in _content(row, shared):
                size = min(ngram, len(run))
                if size >= min(SHORTEST, ngram):
                    for gram in _grams(run, size):
                        self.grams[size].setdefault(gram, number)

    def find(self, text: str) -> tuple[int, str] | None:
        """(prompt, shared words) of the first overlap with a text, or None."""
        row = words(text)
        if row in self.whole:
            return self.whole[row], " ".join(row)
        for size, known in self.grams.items():
            for gram in _grams(row, size):
                if gram in known:
                    return known[gram], " ".join(gram)
        return None


def overlaps(
    texts: Iterable[Sequence[str]], prompts: Sequence[str], *, ngram: int = NGRAM
) -> Iterator[Overlap]:
    """Texts that overlap with a prompt.

    Args:
      texts: each given as its parts (a conversation's messages).
    """
    index = Index(prompts, ngram=ngram)
    for number, parts in enumerate(texts):
        for part in parts:
            if found := index.find(part):
                yield Overlap(number, *found)
                break


@dataclasses.dataclass(frozen=True)
class Texts:
    """The texts of a row.

    Attributes:
      where: its source and line or row.
      row: its fields.
      parts: every message of a conversation, or every user's turn of a prompt.
    """

    where: str
    row: dict[str, Any]
    parts: list[str]


def texts_of(
    source: str | Path | Source, refused: list[str], *, answers: bool = True
) -> Iterator[Texts]:
    """The texts of a source's rows: conversations (`messages.row_messages`) or prompts
    (`prompts.row_turns`).

    Args:
      refused: receives a line per unreadable row.
      answers: whether answers count too; if not, conversations are read as prompts.

    Raises:
      ValueError: the source, or every row of it, is unreadable.
    """
    source, read, bad = open_source(source), 0, []
    for row in source:
        try:
            if answers and holds_conversation(row.fields):
                parts = [message["content"] for message in row_messages(row.fields)]
            else:
                parts = row_turns(row.fields)[1]
        except ValueError as error:
            bad.append(f"{row.where}: {error}")
            continue
        read += 1
        yield Texts(row.where, row.fields, parts)
    if not read:
        raise ValueError(bad[0] if bad else f"{source.name} holds no rows")
    refused += bad


def _format(rows: Sequence[Words]) -> set[Words]:
    """Runs of words that several prompts share: their format."""
    seen = collections.Counter(gram for row in rows for gram in set(_grams(row, FORMAT_NGRAM)))
    return {gram for gram, count in seen.items() if count >= FORMAT_PROMPTS}


def _content(row: Words, shared: set[Words]) -> list[Words]:
    """The runs of a prompt between pieces of its format."""
    ours = [True] * len(row)
    for start, gram in enumerate(_grams(row, FORMAT_NGRAM)):
        if gram in shared:
            ours[start : start + FORMAT_NGRAM] = [False] * FORMAT_NGRAM
    runs: list[Words] = [()]
    for word, mine in zip(row, ours, strict=True):
        if mine:
            runs[-1] += (word,)
        elif runs[-1]:
            runs.append(())
    return runs


def _grams(row: Words, size: int) -> Iterator[Words]:
    return (row[start : start + size] for start in range(len(row) - size + 1))
