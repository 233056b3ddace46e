"""The bodies of OpenAI's completions and chats: JSON to requests."""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from jaxspec.decoding.requests import check_tokens
from jaxspec.decoding.sampling import Sampling
from jaxspec.models.target import Target
from jaxspec.serving.config import EngineConfig
from jaxspec.serving.requests import Request

# Fields that change nothing here, and values at which unsupported ones change nothing.
IGNORED = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "request_id", "priority",
}  # fmt: skip
NEUTRAL: dict[str, tuple] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "top_logprobs": (0,),
    "length_penalty": (1,),
    "typical_p": (1,),
    "bad_words": ([],),
    "use_beam_search": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
}
NEUTRAL_IN_MESSAGES: dict[str, tuple] = {
    "tool_calls": ([],),
    "annotations": ([],),
    "refusal": ("",),
    "reasoning_content": ("",),
}
SAMPLED = {"temperature", "top_p", "top_k", "min_p", "seed"}
PENALTIES = {"presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias"}
STOPS = {"stop", "stop_token_ids", "ignore_eos", "min_tokens"}
LENGTHS = {"max_tokens", "max_completion_tokens"}
COMMON = {"model", "n", "stream", "stream_options", "logprobs", "cache_salt"}
COMMON |= SAMPLED | PENALTIES | STOPS | LENGTHS
MAX_STOPS, MAX_STOP_CHARACTERS, MAX_CHOICES = 4, 256, 128
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class BadRequest(Exception):
    """The request body is refused.

    Attributes:
      param: the field at fault, if one is.
      status: HTTP status.
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400):
        super().__init__(message)
        self.param, self.status = param, status


@dataclasses.dataclass(frozen=True)
class Asked:
    """A parsed request body.

    Attributes:
      requests: of every prompt as many as there are choices, next to each other.
      prompt_tokens: of all prompts.
      echo: text that precedes the answer to every prompt.
      silent: nothing of the answers is given, only what precedes them.
    """

    requests: tuple[Request, ...]
    prompt_tokens: int
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool = False
    usage_in_every_chunk: bool = False
    echo: tuple[str, ...] = ()
    silent: bool = False

    @property
    def choices(self) -> int:
        """Answers to every prompt."""
        return len(self.requests) // len(self.echo)


def parse_body(data: bytes) -> Any:
    """The JSON value of a request's body."""
    try:
        value = json.loads(data.decode())
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON ({error})") from error
    return value


def read_completion(body: Any, target: Target, config: EngineConfig) -> Asked:
    """`POST /v1/completions`: a prompt, which is a text or a list of token ids, or a list of
    them."""
    fields = _Fields(body, COMMON | {"prompt", "echo"})
    prompts = fields.get("prompt", None)
    if not isinstance(prompts, list) or not any(isinstance(p, (str, list)) for p in prompts):
        prompts = [prompts]
    ids, top, echo = [_ids(p, target) for p in prompts], None, None
    if fields.get("logprobs", False) is not False:
        top = _top_logprobs(fields, "logprobs", config)
    if fields.flag("echo"):
        decode = target.tokenizer.decode
        echo = [p if isinstance(p, str) else decode(p) for p in prompts]
    return _asked(fields, ids, target, config, default=16, top=top, echo=echo)


def _top_logprobs(fields: _Fields, name: str, config: EngineConfig) -> int:
    top = fields.integer(name, 0)
    if not 0 <= top <= config.top_logprobs:
        raise BadRequest(f"{name} is {top}; expected 0 … {config.top_logprobs}", name)
    return top


def _ids(prompt: Any, target: Target) -> list[int]:
    if isinstance(prompt, str):
        if not prompt:
            raise BadRequest("prompt is empty; expected some text", "prompt")
        return target.tokenizer.encode(prompt)
    if not isinstance(prompt, list) or not all(type(t) is int for t in prompt) or not prompt:
        raise BadRequest("prompt must be a text or a list of token ids, or several", "prompt")
    return prompt


def read_chat(body: Any, target: Target, config: EngineConfig) -> Asked:
    """`POST /v1/chat/completions`: text messages."""
    fields = _Fields(body, COMMON | {"messages", "chat_template_kwargs", "top_logprobs"})
    messages = fields.get("messages", None)
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages must be a list of at least one message", "messages")
    options = fields.part("chat_template_kwargs", {"enable_thinking"})
    thinking = options.flag("enable_thinking", None)
    try:
        prompt = target.tokenizer.chat(
            [_message(i, message) for i, message in enumerate(messages)],
            thinking=thinking,
        )
    except (ValueError, TemplateError) as error:  # templates refuse orders of roles
        raise BadRequest(str(error), "messages") from error
    top = _top_logprobs(fields, "top_logprobs", config)
    if not fields.flag("logprobs"):
        if top:
            raise BadRequest("top_logprobs needs logprobs to be true", "top_logprobs")
        top = None
    return _asked(fields, [prompt], target, config, default=None, top=top)


class _Fields:
    """A JSON object; unknown fields are refused unless their value has no effect."""

    def __init__(
        self,
        body: Any,
        known: set[str],
        neutral: Mapping[str, tuple] = NEUTRAL,
        *,
        within: str = "",
    ):
        """Args: within: the path to it, "" for the body itself."""
        if not isinstance(body, dict):
            raise BadRequest(f"{within or 'the body'} must be a JSON object", within or None)
        self._body, self._prefix = body, within and f"{within}."
        for name, value in body.items():
            if name in known or value is None or (not within and name in IGNORED):
                continue
            path = self._prefix + name
            if name not in neutral:
                raise BadRequest(f"unknown field {path!r}", path)
            if not any(_same(value, one) for one in neutral[name]):
                raise BadRequest(f"{path} = {value!r} is not supported; leave it out", path)

    def part(self, name: str, known: set[str]) -> _Fields:
        """An object within, {} if it is left out."""
        return _Fields(self.get(name, {}), known, {}, within=self._prefix + name)

    def get(self, name: str, default: Any) -> Any:
        value = self._body.get(name)
        return default if value is None else value

    def number(self, name: str, default: float) -> float:
        value = self.get(name, default)
        if not _is_number(value):
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

    def text(self, name: str) -> str:
        value = self.get(name, "")
        if not isinstance(value, str):
            raise BadRequest(f"{name} must be a text, not {value!r}", name)
        return value

    def flag(self, name: str, default: bool | None = False) -> bool | None:
        value = self.get(name, default)
        if value is not default and not isinstance(value, bool):
            path = self._prefix + name
            raise BadRequest(f"{path} must be true or false, not {value!r}", path)
        return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _same(value: Any, other: Any) -> bool:
    """Equal as JSON: 1 and 1.0 are, 1 and true are not.

    >>> _same(1, 1.0), _same(0, False), _same({"a": [1]}, {"a": [True]})
    (True, False, False)
    """
    if _is_number(value) and _is_number(other):
        return value == other
    return type(value) is type(other) and (
        json.dumps(value, sort_keys=True) == json.dumps(other, sort_keys=True)
    )


def _asked(
    fields: _Fields,
    prompts: list[list[int]],
    target: Target,
    config: EngineConfig,
    *,
    default: int | None,
    top: int | None,
    echo: Sequence[str] | None = None,
) -> Asked:
    longest, room = max(map(len, prompts)), config.room
    left = room - longest
    if left < 1:
        raise BadRequest(
            f"the prompt has {longest} tokens; this server has room for {room} with the answer",
            "prompt",
        )
    choices = fields.integer("n", 1)
    if not 1 <= choices <= MAX_CHOICES:
        raise BadRequest(f"n is {choices}; expected 1 … {MAX_CHOICES}", "n")
    usage = fields.part("stream_options", {"include_usage", "continuous_usage_stats"})
    seed = fields.integer("seed", -1)
    if seed == -1:
        seed = secrets.randbelow(2**32)
    new_tokens = _longest(fields, left, default, least=1 if echo is None else 0)
    sampling = _sampling(fields, target)
    if sampling.min_tokens > new_tokens:
        raise BadRequest(
            f"min_tokens is {sampling.min_tokens}; expected at most as many as may be "
            f"generated, {new_tokens}",
            "min_tokens",
        )
    request = Request(
        (),
        max(new_tokens, 1),
        sampling,
        cache_salt=fields.text("cache_salt"),
        logprobs=top,
        prompt_logprobs=echo is not None and top is not None,
    )
    return Asked(
        requests=tuple(
            # Seeds of further choices are beyond those that people give.
            dataclasses.replace(request, prompt=tuple(prompt), seed=seed + (choice << 64))
            for prompt in prompts
            for choice in range(choices)
        ),
        prompt_tokens=sum(map(len, prompts)),
        stops=_stops(fields),
        stream=fields.flag("stream"),
        include_usage=usage.flag("include_usage"),
        usage_in_every_chunk=usage.flag("continuous_usage_stats"),
        echo=tuple(echo or [""] * len(prompts)),
        silent=not new_tokens,
    )


def _longest(fields: _Fields, left: int, default: int | None, least: int) -> int:
    """New tokens, at most; -1 asks for all that there is room for."""
    default = left if default is None else min(default, left)
    longest = default
    for name in sorted(LENGTHS, reverse=True):  # the newer name has the last word
        longest = fields.integer(name, longest)
        if longest == -1:
            longest = left
        if not least <= longest <= left:
            raise BadRequest(
                f"{name} is {longest}; after this prompt the server has room for {least} … "
                f"{left} tokens",
                name,
            )
    return longest


def _sampling(fields: _Fields, target: Target) -> Sampling:
    options = {
        "temperature": fields.number("temperature", 1.0),
        "top_k": max(fields.integer("top_k", 0), 0),  # -1 keeps all, as elsewhere
        "top_p": fields.number("top_p", 1.0),
        "min_p": fields.number("min_p", 0.0),
        "stop_ids": _stop_ids(fields, target),
        "min_tokens": fields.integer("min_tokens", 0),
        "logit_bias": _logit_bias(fields),
        "presence_penalty": fields.number("presence_penalty", 0.0),
        "frequency_penalty": fields.number("frequency_penalty", 0.0),
        "repetition_penalty": fields.number("repetition_penalty", 1.0),
    }
    for name, value in options.items():
        try:
            check_tokens(Sampling(**{name: value}), target.config)
        except ValueError as error:
            asked_for = "stop_token_ids" if name == "stop_ids" else name
            raise BadRequest(str(error).removeprefix("Sampling."), asked_for) from error
    return Sampling(**options)


def _logit_bias(fields: _Fields) -> dict[int, float]:
    given = fields.get("logit_bias", {})
    if not isinstance(given, dict):
        raise BadRequest(f"logit_bias must be a JSON object, not {given!r}", "logit_bias")
    biases = {}
    for token, bias in given.items():
        if not (token.isascii() and token.isdecimal() and _is_number(bias)):
            raise BadRequest(
                f"logit_bias has {token!r}: {bias!r}; expected numbers by token id",
                "logit_bias",
            )
        biases[int(token)] = bias
    return biases


def _stop_ids(fields: _Fields, target: Target) -> tuple[int, ...]:
    more = fields.get("stop_token_ids", [])
    if not isinstance(more, list) or not all(type(token) is int for token in more):
        raise BadRequest("stop_token_ids must be a list of token ids", "stop_token_ids")
    ends = () if fields.flag("ignore_eos") else target.config.eos_token_ids
    return tuple(dict.fromkeys((*ends, *more)))


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
    # Who speaks under which name is not told by chat templates, here or elsewhere.
    _Fields(message, {"role", "content", "name"}, NEUTRAL_IN_MESSAGES, within=where)
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise BadRequest(f"{where} must have a role, one of {tuple(ROLES)}", "messages")
    if isinstance(content, list) and all(map(_is_text, content)):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise BadRequest(f"{where} must have text as its content", "messages")
    return {"role": ROLES[role], "content": content}


def _is_text(part: Any) -> bool:
    return (
        isinstance(part, dict)
        and part.get("type") == "text"
        and isinstance(part.get("text"), str)
    )
