"""OpenAI's completion and chat responses as JSON: whole, in chunks, and errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxspec.decoding.stats import DecodeStats
from jaxspec.serving.calls import joined_calls
from jaxspec.serving.fields import BadRequest
from jaxspec.serving.logprobs import joined_logprobs


@dataclasses.dataclass(frozen=True)
class Piece:
    """Text added to a choice; the last piece of a choice says why it ended.

    Attributes:
      tokens: number of tokens of the answer so far.
      cached: prompt tokens taken from the prefix cache.
      logprobs: of the new tokens, in the answer's shape, if the request asks for them.
      thoughts: added to what the model thought before it answered.
      calls: new parts of tool calls (`CallReader`).
    """

    choice: int
    text: str
    tokens: int
    finish: str | None = None
    stats: DecodeStats | None = None
    cached: int = 0
    logprobs: dict | None = None
    thoughts: str = ""
    calls: Sequence[dict] = ()

    @property
    def says_something(self) -> bool:
        """Whether a client has to know it."""
        parts = self.text, self.finish, self.logprobs, self.thoughts, self.calls
        return any(map(bool, parts))


def joined_pieces(pieces: Sequence[Piece]) -> Piece:
    """All pieces of a choice as one."""
    logprobs = [piece.logprobs for piece in pieces if piece.logprobs is not None]
    return dataclasses.replace(
        pieces[-1],
        text="".join(piece.text for piece in pieces),
        logprobs=joined_logprobs(logprobs) if logprobs else None,
        thoughts="".join(piece.thoughts for piece in pieces),
        calls=joined_calls([call for piece in pieces for call in piece.calls]),
    )


def usage(prompt_tokens: int, completion_tokens: int, stats: DecodeStats, cached: int) -> dict:
    """The usage object; `speculation` has the counts of rounds and acceptance.

    Args: cached: prompt tokens taken from the prefix cache.
    """
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached},
        "speculation": {
            "rounds": stats.rounds,
            "nodes_verified": stats.nodes,
            "tokens_per_round": round(stats.tau, 4),
        },
    }


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None):
    """The error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def refusal_body(error: BadRequest) -> dict:
    """The error object of a refused body."""
    return error_body(str(error), "invalid_request_error", error.param, error.code)


@dataclasses.dataclass(frozen=True)
class Shape:
    """The objects of one answer, whole and in chunks; chat or plain completion."""

    chat: bool
    id: str
    created: int
    model: str

    def whole(self, answers: Sequence[Piece], usage: dict) -> dict:
        """The object of all choices, each joined to one piece."""
        choices = []
        for answer in answers:
            body = {"message": _message(answer)} if self.chat else {"text": answer.text}
            choices.append(_choice(answer, body))
        name = "chat.completion" if self.chat else "text_completion"
        return self._object(name, choices) | {"usage": usage}

    def chunk(self, piece: Piece, *, first: bool, usage: dict | None = None) -> dict:
        """The object of one piece.

        Args:
          first: whether it is the first of its choice.
          usage: included if given.
        """
        body = {"delta": _delta(piece, first=first)} if self.chat else {"text": piece.text}
        told = {} if usage is None else {"usage": usage}
        return self._object(self._chunk_name, [_choice(piece, body)]) | told

    def last(self, usage: dict) -> dict:
        """The chunk that holds the usage and no choice."""
        return self._object(self._chunk_name, []) | {"usage": usage}

    @property
    def _chunk_name(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _object(self, name: str, choices: list) -> dict:
        return {
            "id": self.id,
            "object": name,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


def _choice(piece: Piece, body: dict) -> dict:
    told = {"logprobs": piece.logprobs, "finish_reason": piece.finish}
    return {"index": piece.choice, **body, **told}


def _message(answer: Piece) -> dict:
    message = {"role": "assistant", "content": answer.text}
    if answer.thoughts:
        message["reasoning_content"] = answer.thoughts
    if answer.calls:
        message |= {"content": answer.text or None, "tool_calls": answer.calls}
    return message


def _delta(piece: Piece, *, first: bool) -> dict:
    delta: dict[str, Any] = {"role": "assistant"} if first else {}
    if piece.thoughts:
        delta["reasoning_content"] = piece.thoughts
    if piece.text or (first and not piece.thoughts and not piece.calls):
        delta["content"] = piece.text
    if piece.calls:
        delta["tool_calls"] = piece.calls
    return delta
