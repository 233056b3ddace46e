"""Formats of answers as texts of grammars: JSON, regular expressions, choices.

JSON answers are spaced as by Python's `json.dumps`: `{"a": [1, 2]}`. If a grammar allowed any
number of blanks, small models would fill their answers with them.
"""

from __future__ import annotations

import json
from typing import Any

from jaxspec.serving.fields import BadRequest, Fields
from jaxspec.serving.grammars import llguidance

STYLE = dict(whitespace_flexible=False, item_separator=", ", key_separator=": ")
# What llguidance does not support of a schema is ignored; of oneOf, more than one may match.
LENIENT = dict(lenient=True, coerce_one_of=True)
# vLLM's older names of the fields of `structured_outputs`.
GUIDED = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice"}
FORMATS = {"response_format", "structured_outputs", *GUIDED}
KINDS = set(GUIDED.values()) | {"json_object"}
MAX_CHOICES = 1000


def read_format(fields: Fields) -> tuple[str, str] | None:
    """The field that sets the answer's format, and the grammar's text; None without one."""
    found = {}
    if (grammar := _response_format(fields)) is not None:
        found["response_format"] = grammar
    if fields.get("structured_outputs", None) is not None:
        found["structured_outputs"] = _structured(fields.part("structured_outputs", KINDS))
    for name, kind in GUIDED.items():
        if (value := fields.get(name, None)) is not None:
            found[name] = _of_kind(kind, value, name)
    if len(found) > 1:
        names = " and ".join(found)
        raise BadRequest(f"{names} exclude each other; give one", next(iter(found)))
    return next(iter(found.items()), None)


def _response_format(fields: Fields) -> str | None:
    """OpenAI's kinds, and Together's `regex` with a `pattern`."""
    name = "response_format"
    if fields.get(name, None) is None:
        return None
    kind = fields.part(name, {"type", "json_schema", "pattern"}).get("type", None)
    if kind == "text":
        fields.part(name, {"type"})
        return None
    if kind == "json_object":
        fields.part(name, {"type"})
        return json_text({"type": "object"}, name)
    if kind == "regex":
        pattern = fields.part(name, {"type", "pattern"}).get("pattern", None)
        return _of_kind("regex", pattern, f"{name}.pattern")
    if kind != "json_schema":
        raise BadRequest(
            f"{name}.type is {kind!r}; expected text, json_object, json_schema or regex", name
        )
    own = fields.part(name, {"type", "json_schema"}).part(
        "json_schema", {"name", "description", "schema", "strict"}
    )
    own.flag("strict", None)  # answers keep to the schema in any case
    return json_text(own.get("schema", {"type": "object"}), f"{name}.json_schema.schema")


def _structured(own: Fields) -> str:
    name = "structured_outputs"
    given = [kind for kind in sorted(KINDS) if own.get(kind, None) is not None]
    if len(given) != 1:
        raise BadRequest(f"{name} must have one of {', '.join(sorted(KINDS))}", name)
    (kind,) = given
    if kind == "json_object":
        if own.get(kind, None) is not True:
            raise BadRequest(f"{name}.{kind} must be true", f"{name}.{kind}")
        return json_text({"type": "object"}, name)
    return _of_kind(kind, own.get(kind, None), f"{name}.{kind}")


def _of_kind(kind: str, value: Any, path: str) -> str:
    if kind == "json":
        return json_text(value, path)
    if kind == "regex":
        if not isinstance(value, str) or not value:
            raise BadRequest(f"{path} must be a regular expression, not {value!r}", path)
        return regex_text(value)
    good = isinstance(value, list) and all(isinstance(one, str) and one for one in value)
    if not good or not 1 <= len(value) <= MAX_CHOICES:
        raise BadRequest(f"{path} must be a list of 1 … {MAX_CHOICES} texts", path)
    return regex_text("|".join(map(escaped, value)))


def regex_text(pattern: str) -> str:
    """The grammar of texts that a regular expression (of Rust's `regex`) matches in full."""
    (grammar,) = json.loads(llguidance().LLMatcher.grammar_from_regex(pattern))["grammars"]
    return grammar["lark_grammar"]


def escaped(text: str) -> str:
    """A regular expression that matches just this text."""
    plain = lambda c: c.isascii() and c.isalnum()  # noqa: E731
    return "".join(c if plain(c) else f"\\x{{{ord(c):x}}}" for c in text)


def json_text(schema: Any, path: str) -> str:
    """The grammar of the JSON values that match a schema, given as an object or its text."""
    if isinstance(schema, str):  # vLLM takes both
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"{path} is not JSON ({error})", path) from error
    if not isinstance(schema, dict):
        raise BadRequest(f"{path} must be a JSON schema, an object", path)
    return f"start: {lark_json(schema, path)}"


def is_json(grammar: str) -> bool:
    """Whether a grammar's texts are JSON values."""
    return grammar.startswith("start: %json ")


def lark_json(schema: dict, path: str, *, lenient: bool = False) -> str:
    """A schema as part of a grammar; overrides the schema's own rules for blanks.

    Args: lenient: ignore keywords that llguidance does not support.
    """
    options = STYLE | LENIENT if lenient else STYLE
    try:
        return f"%json {json.dumps(schema | {'x-guidance': options}, ensure_ascii=False)}"
    except RecursionError as error:
        raise BadRequest(f"{path} is nested too deeply", path) from error


def lark_text(text: str) -> str:
    """A text that is not empty, as part of a grammar."""
    return json.dumps(text)
