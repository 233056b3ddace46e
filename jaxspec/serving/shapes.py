"""OpenAI's completion and chat responses as JSON: whole, in chunks, and errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxspec.decoding.stats import DecodeStats
from jaxspec.serving.fields import BadRequest


@dataclasses.dataclass(frozen=True)
class Answer:
    """One choice.

    Attributes:
      finish: why it ended.
      thoughts: what the model thought before it answered.
      logprobs, calls: log-probabilities and tool calls, in OpenAI's format.
    """

    text: str
    finish: str | None
    thoughts: str = ""
    logprobs: dict | None = None
    calls: Sequence[dict] = ()


def _choice(index: int, body: dict, finish: str | None, logprobs: dict | None) -> dict:
    return {"index": index, **body, "logprobs": logprobs, "finish_reason": finish}


def usage(
    prompt_tokens: int, completion_tokens: int, stats: DecodeStats | None, cached: int
) -> dict:
    """The usage object; `speculation` has the counts of rounds and acceptance.

    Args: cached: prompt tokens taken from the prefix cache.
    """
    stats = stats or DecodeStats((), 0)
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

    def whole(self, answers: Sequence[Answer], usage: dict) -> dict:
        """The object of all choices."""
        choices = []
        for index, answer in enumerate(answers):
            body: dict[str, Any] = {"text": answer.text}
            if self.chat:
                message = {"role": "assistant", "content": answer.text}
                if answer.thoughts:
                    message["reasoning_content"] = answer.thoughts
                if answer.calls:
                    calls = {"content": answer.text or None, "tool_calls": answer.calls}
                    message |= calls
                body = {"message": message}
            choices.append(_choice(index, body, answer.finish, answer.logprobs))
        name = "chat.completion" if self.chat else "text_completion"
        return self._object(name, choices) | {"usage": usage}

    def chunk(
        self,
        text: str,
        finish: str | None = None,
        choice: int = 0,
        *,
        first: bool = False,
        thoughts: str = "",
        calls: Sequence[dict] = (),
        logprobs: dict | None = None,
        usage: dict | None = None,
    ) -> dict:
        """Args: thoughts, calls, logprobs, usage: included in this chunk if given."""
        if self.chat:
            delta: dict[str, Any] = {"role": "assistant"} if first else {}
            if thoughts:
                delta["reasoning_content"] = thoughts
            if text or (first and not thoughts and not calls):
                delta["content"] = text
            if calls:
                delta["tool_calls"] = list(calls)
            body: dict[str, Any] = {"delta": delta}
        else:
            body = {"text": text}
        told = {} if usage is None else {"usage": usage}
        choices = [_choice(choice, body, finish, logprobs)]
        return self._object(self._chunk_name, choices) | told

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
