"""Incremental decoding: the text of token ids that arrive one by one, once it is certain."""

from __future__ import annotations

import dataclasses

from jaxspec.tokenizer import Tokenizer

UNKNOWN_CHARACTER = "\ufffd"
BY_TOKEN = {"Replace", "Strip", "Metaspace", "WordPiece", "BPEDecoder"}  # work token by token


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How a tokenizer's decoder treats the end of an unfinished text.

    Attributes:
      grows: decoding more tokens only appends text, except to an open end.
      bytes_in_runs: adjacent byte tokens, `<0xE2>`, are decoded together, to U+FFFD each if the
        run is not UTF-8; so no part of a run is certain before its end.
      bytes_in_characters: a final U+FFFD may be a character with bytes still to come.
    """

    grows: bool
    bytes_in_runs: bool = False
    bytes_in_characters: bool = False

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Decoding:
        """Of the steps of a tokenizer's decoder; nothing is certain where they are unknown."""
        steps = tokenizer.decoder_steps
        if steps is None:
            return cls(grows=False)
        if not steps:  # tokens with blanks between them
            return cls(grows=True)
        kinds, joined = {step["type"] for step in steps}, False
        for step in steps:
            if not _grows(step, joined):
                return cls(grows=False)
            joined |= step["type"] in ("Fuse", "ByteLevel")
        return cls(True, "ByteFallback" in kinds, "ByteLevel" in kinds)


def _grows(step: dict, joined: bool) -> bool:
    """Whether text grows by appending under a decoder step. Args: joined: it sees one token."""
    if step["type"] == "Fuse":
        return True
    if not joined:
        return step["type"] in {"ByteFallback", "ByteLevel"} | BY_TOKEN
    if step["type"] == "Replace":  # longer patterns may end in text to come
        return len(step["pattern"].get("String", "  ")) == 1
    return step["type"] == "Strip" and step["stop"] == 0


class TextStream:
    """Decodes a growing sequence; its results, joined, equal `Tokenizer.decode` of all ids.

    It decodes a window of the last tokens. The window begins where no character was open, with
    tokens that have text, as decoders treat a text's first token and first blank specially.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._decoding = tokenizer, Decoding.of(tokenizer)
        self._ids: list[int] = []
        self._window = 0  # first id of the window
        self._seen = 0  # characters of the window's text already returned
        self._settled = 0  # ids up to the last place where no character was open
        self._given = 0  # characters returned in all

    def step(self, token: int) -> str:
        """The text that becomes certain with this id."""
        self._ids.append(int(token))
        decoding = self._decoding
        if not decoding.grows or (decoding.bytes_in_runs and self._ends_in_bytes()):
            return ""
        text = self._tokenizer.decode(self._ids[self._window :])
        open_end = decoding.bytes_in_characters and text.endswith(UNKNOWN_CHARACTER)
        piece = text[self._seen : len(text) - open_end]
        self._seen += len(piece)
        self._given += len(piece)
        if not open_end:
            self._settle()
        return piece

    def finish(self) -> str:
        """The text held back, once no more ids come."""
        return self._tokenizer.decode(self._ids)[self._given :]

    def _settle(self) -> None:
        if context := self._tokenizer.decode(self._ids[self._settled :]):
            self._window, self._seen = self._settled, len(context)
        self._settled = len(self._ids)

    def _ends_in_bytes(self) -> bool:
        """Whether the last token that decoding keeps is a byte."""
        shown = (self._tokenizer.shown(token) for token in reversed(self._ids))
        last = next((token for token in shown if token is not None), "")
        return len(last) == 6 and last.startswith("<0x") and last.endswith(">")
