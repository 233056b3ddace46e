"""Fields of a request's body: known, without effect, or refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# Fields without effect, and values at which unsupported fields have no effect.
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
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
}
# In messages: what clients add to answers that they send back, and what templates do not show.
IGNORED_IN_MESSAGES = {
    "name", "parsed", "cache_control", "reasoning_details", "provider_specific_fields",
}  # fmt: skip
NEUTRAL_IN_MESSAGES: dict[str, tuple] = {
    "type": ("text", "message"),  # lm-evaluation-harness, and items of OpenAI's Responses
    "tool_calls": ([],),
    "annotations": ([],),
    "refusal": ("",),
    "reasoning_content": ("",),
}


class BadRequest(Exception):
    """The request body is refused.

    Attributes:
      param: the field at fault, or None.
      status: HTTP status.
      code: what programs recognise the error by, or None.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        status: int = 400,
        code: str | None = None,
    ):
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


class Fields:
    """A JSON object; unknown fields are refused unless their value has no effect."""

    def __init__(
        self,
        body: Any,
        known: set[str],
        neutral: Mapping[str, tuple] = NEUTRAL,
        *,
        within: str = "",
    ):
        """Args: within: path of the object in the body; "" for the body itself."""
        if not isinstance(body, dict):
            raise BadRequest(f"{within or 'the body'} must be a JSON object", within or None)
        self._body, self._prefix = body, within and f"{within}."
        for name, value in body.items():
            if name in known or value is None or (not within and name in IGNORED):
                continue
            path = self._prefix + name
            if name not in neutral:
                raise BadRequest(f"unknown field {path!r}", path)
            if not any(same(value, one) for one in neutral[name]):
                raise BadRequest(f"{path} = {value!r} is not supported; leave it out", path)

    def part(self, name: str, known: set[str]) -> Fields:
        """A nested object; {} if it is left out."""
        return Fields(self.get(name, {}), known, {}, within=self._prefix + name)

    def get(self, name: str, default: Any) -> Any:
        value = self._body.get(name)
        return default if value is None else value

    def number(self, name: str, default: float) -> float:
        value = self.get(name, default)
        if not is_number(value):
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


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def same(value: Any, other: Any) -> bool:
    """Equality as JSON: 1 equals 1.0, but not true.

    >>> same(1, 1.0), same(0, False), same({"a": [1]}, {"a": [True]})
    (True, False, False)
    """
    if is_number(value) and is_number(other):
        return value == other
    return type(value) is type(other) and (
        json.dumps(value, sort_keys=True) == json.dumps(other, sort_keys=True)
    )
