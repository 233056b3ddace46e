"""The OpenAI completions and chat shapes: JSON bodies to requests, answers to JSON."""

from __future__ import annotations

import dataclasses
import json
import secrets
from typing import Any

from jinja2 import TemplateError

from jaxspec.decoding.sampling import Sampling
from jaxspec.decoding.stats import DecodeStats
from jaxspec.generation import Target
from jaxspec.serving.requests import Request

# Fields that change nothing here, and values at which unsupported ones change nothing.
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
NEUTRAL: dict[str, tuple] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": (None, ""),
    "logprobs": (False, None),
    "top_logprobs": (None, 0),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
}
SAMPLED = {"temperature", "top_p", "top_k", "min_p", "seed", "stop"}
LENGTHS = {"max_tokens", "max_completion_tokens"}
COMMON = {"model", "stream", "stream_options"} | SAMPLED | LENGTHS
MAX_STOPS, MAX_STOP_CHARACTERS = 4, 256
ROLES = ("system", "user", "assistant")


class BadRequest(Exception):
    """The body cannot be served.

    Attributes:
      param: the field at fault, if one is.
      status: HTTP status.
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400):
        super().__init__(message)
        self.param, self.status = param, status


@dataclasses.dataclass(frozen=True)
class Asked:
    """A body, understood."""

    request: Request
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool


def parse_body(data: bytes) -> Any:
    """The JSON value of a request's body."""
    try:
        value = json.loads(data.decode())
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON ({error})") from error
    return value


def read_completion(body: Any, target: Target, room: int) -> Asked:
    """`POST /v1/completions`: one prompt, a text or a list of token ids."""
    fields = _Fields(body, COMMON | {"prompt"})
    prompt = fields.get("prompt", None)
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        (prompt,) = prompt
    if isinstance(prompt, str):
        if not prompt:
            raise BadRequest("prompt is empty; expected some text", "prompt")
        prompt = target.tokenizer.encode(prompt)
    elif not isinstance(prompt, list) or not all(type(t) is int for t in prompt):
        raise BadRequest("prompt must be one text, or one list of token ids", "prompt")
    return _asked(fields, prompt, room, default=16)


def read_chat(body: Any, target: Target, room: int) -> Asked:
    """`POST /v1/chat/completions`: text messages."""
    fields = _Fields(body, COMMON | {"messages", "chat_template_kwargs"})
    messages = fields.get("messages", None)
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages must be a list of at least one message", "messages")
    options = fields.get("chat_template_kwargs", {})
    if not isinstance(options, dict) or set(options) - {"enable_thinking"}:
        raise BadRequest(
            "chat_template_kwargs may hold enable_thinking alone", "chat_template_kwargs"
        )
    try:
        prompt = target.tokenizer.chat(
            [_message(i, message) for i, message in enumerate(messages)],
            thinking=options.get("enable_thinking"),
        )
    except (ValueError, TemplateError) as error:  # templates refuse orders of roles
        raise BadRequest(str(error), "messages") from error
    return _asked(fields, prompt, room, default=None)


class _Fields:
    """A body whose fields are all known, or would change nothing."""

    def __init__(self, body: Any, known: set[str]):
        if not isinstance(body, dict):
            raise BadRequest("the body must be a JSON object")
        for name, value in body.items():
            if name in known or name in IGNORED or value is None:
                continue
            if name not in NEUTRAL:
                raise BadRequest(f"unknown field {name!r}", name)
            if value not in NEUTRAL[name]:
                raise BadRequest(f"{name} = {value!r} is not supported; leave it out", name)
        self._body = body

    def get(self, name: str, default: Any) -> Any:
        value = self._body.get(name)
        return default if value is None else value

    def number(self, name: str, default: float) -> float:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise BadRequest(f"{name} must be a number, not {value!r}", name)
        try:
            return float(value)
        except OverflowError as error:
            raise BadRequest(f"{name} is too large", name) from error

    def integer(self, name: str, default: int) -> int:
        value = self.get(name, default)
        if type(value) is not int:
            raise BadRequest(f"{name} must be an integer, not {value!r}", name)
        return value

    def flag(self, name: str) -> bool:
        value = self.get(name, False)
        if not isinstance(value, bool):
            raise BadRequest(f"{name} must be true or false, not {value!r}", name)
        return value


def _asked(fields: _Fields, prompt: list[int], room: int, default: int | None) -> Asked:
    left = room - len(prompt)
    if left < 1:
        raise BadRequest(
            f"the prompt has {len(prompt)} tokens; this server has room for {room} with the "
            "answer",
            "prompt",
        )
    longest = fields.integer("max_tokens", left if default is None else min(default, left))
    longest = fields.integer("max_completion_tokens", longest)
    try:
        sampling = Sampling(
            temperature=fields.number("temperature", 1.0),
            top_k=max(fields.integer("top_k", 0), 0),  # -1 keeps all, as elsewhere
            top_p=fields.number("top_p", 1.0),
            min_p=fields.number("min_p", 0.0),
        )
    except ValueError as error:
        raise BadRequest(str(error)) from error
    options = fields.get("stream_options", {})
    if not isinstance(options, dict):
        raise BadRequest("stream_options must be an object", "stream_options")
    seed = fields.integer("seed", secrets.randbelow(2**31))
    return Asked(
        request=Request(tuple(prompt), longest, sampling, seed),
        stops=_stops(fields),
        stream=fields.flag("stream"),
        include_usage=bool(options.get("include_usage")),
    )


def _stops(fields: _Fields) -> tuple[str, ...]:
    stops = fields.get("stop", [])
    stops = [stops] if isinstance(stops, str) else stops
    good = isinstance(stops, list) and all(isinstance(s, str) and s for s in stops)
    if not good or len(stops) > MAX_STOPS or any(len(s) > MAX_STOP_CHARACTERS for s in stops):
        raise BadRequest(
            f"stop must be up to {MAX_STOPS} texts of 1 … {MAX_STOP_CHARACTERS} characters",
            "stop",
        )
    return tuple(stops)


def _message(index: int, message: Any) -> dict[str, str]:
    where = f"messages[{index}]"
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise BadRequest(f"{where} must have a role, one of {ROLES}", "messages")
    content = message.get("content")
    if isinstance(content, list) and all(
        isinstance(part, dict)
        and part.get("type") == "text"
        and isinstance(part.get("text"), str)
        for part in content
    ):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise BadRequest(f"{where} must have text as its content", "messages")
    return {"role": message["role"], "content": content}


def usage(prompt_tokens: int, completion_tokens: int, stats: DecodeStats | None) -> dict:
    """The usage object; `speculation` says what the answer took."""
    stats = stats or DecodeStats((), 0)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "speculation": {
            "rounds": stats.rounds,
            "nodes_verified": stats.nodes,
            "tokens_per_round": round(stats.tau, 4),
        },
    }


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None):
    """The error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclasses.dataclass(frozen=True)
class Shape:
    """The objects of one answer, whole and in chunks; chat or plain completion."""

    chat: bool
    id: str
    created: int
    model: str

    def whole(self, text: str, finish: str, usage: dict) -> dict:
        body = (
            {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        )
        choice = {"index": 0, **body, "logprobs": None, "finish_reason": finish}
        name = "chat.completion" if self.chat else "text_completion"
        return self._object(name, [choice]) | {"usage": usage}

    def chunk(self, text: str, finish: str | None = None, *, first: bool = False) -> dict:
        if self.chat:
            delta = {"role": "assistant"} if first else {}
            body: dict[str, Any] = {
                "delta": delta | ({"content": text} if text or first else {})
            }
        else:
            body = {"text": text}
        choice = {"index": 0, **body, "logprobs": None, "finish_reason": finish}
        return self._object(self._chunk_name, [choice])

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
