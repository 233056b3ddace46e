"""Tool calls in the form of Qwen3-Coder's and Qwen3.5's chat templates::

    <tool_call>
    <function=weather>
    <parameter=city>
    Rome
    </parameter>
    <parameter=days>
    3
    </parameter>
    </function>
    </tool_call>

Parameters come in the order of the tool's schema; optional ones may be left out. What the
schema leaves open beside its properties is not written, unless it has no properties at all.

A value is written as text, in which strings have no quotes, if its schema allows

- strings, and of every other type all values or none. Text that is JSON of one of the other
  types is that value, as null where the schema allows strings and null; all else is a string.
- a list of values (`enum`, `const`), one of them a string.

Every other value is written as JSON, even a string if, say, arrays of numbers may stand in its
place. Text is not held to `minLength`, `maxLength`, `pattern` and `format`: a strict tool's
strings with these keywords are written as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

from jaxspec.serving.calls import CallReader, Tool
from jaxspec.serving.formats import escaped, lark_json, lark_text
from jaxspec.serving.schemas import TYPES, alternatives, is_of, keywords, resolved

END, CLOSE = "\n</parameter>", "</function>\n</tool_call>"
KEY = re.compile(r"<parameter=([^>\n]+)>\n")
LISTED = {"null": [None], "boolean": [False, True]}  # types of few values
# Keywords that limit strings, values of any type, and objects.
OF_STRINGS = {"minLength", "maxLength", "pattern", "format"}
OF_ALL = {"$ref", "allOf", "anyOf", "oneOf", "not", "if", "const", "enum"}
OF_OBJECTS = {
    "patternProperties", "propertyNames", "minProperties", "maxProperties",
    "dependentRequired", "dependentSchemas", "unevaluatedProperties",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter of a tool. Without choices and types, its values are written as JSON.

    Attributes:
      key: None for any key.
      choices: values that are written as text.
      types: JSON types, strings among them, all of whose values are written as text.
    """

    key: str | None
    schema: dict
    required: bool
    choices: Sequence = ()
    types: frozenset[str] = frozenset()

    def rule(self, tool: Tool) -> str:
        """The part of the grammar that it is."""
        key = r'/[^>\n]+/ ">\n"' if self.key is None else lark_text(f"{self.key}>\n")
        times = "" if self.required else "*" if self.key is None else "?"
        return f'("<parameter=" {key} {self._value(tool)} "\\n"){times}'

    def _value(self, tool: Tool) -> str:
        if self.types:
            return "value"
        if self.choices:
            texts = "|".join(escaped(_text(choice)) for choice in self.choices)
            return f"/({texts}){escaped(END)}/"
        return f"{_lark_json(self.schema, tool)} {lark_text(END)}"

    def as_json(self, text: str) -> str:
        """The JSON text of a value that is written as this text."""
        for choice in self.choices:
            if _text(choice) == text:
                return _json(choice)
        if not self.types:
            return text
        value = _parsed(text)
        other = any(is_of(value, kind) for kind in self.types - {"string"})
        return text if other else _json(text)


def parameters(tool: Tool) -> list[Parameter]:
    """The parameters of a tool: one of any key if its schema names none.

    Raises:
      BadRequest: the schema cannot be used.
    """
    own = resolved(tool.schema, tool.schema)
    if beyond := keywords(own) & (OF_ALL | OF_OBJECTS if tool.strict else {"$ref"}):
        raise tool.refused(f"calls in this model's form ignore {', '.join(sorted(beyond))}")
    properties, required = own.get("properties", {}), own.get("required", [])
    if not isinstance(properties, dict) or not _are_texts(required):
        raise tool.refused("properties must be an object, and required a list of texts")
    more = own.get("additionalProperties", True)
    schemas = {key: properties.get(key, more) for key in [*properties, *required]}
    if not schemas and more is not False:
        schemas = {None: more}
    return [
        _parameter(key, schema, tool, required=key in required)
        for key, schema in schemas.items()
        if schema is not False or key in required
    ]


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _parameter(key: str | None, schema: Any, tool: Tool, *, required: bool) -> Parameter:
    if key is not None and not KEY.fullmatch(f"<parameter={key}>\n"):
        raise tool.refused(
            f"calls in this model's form cannot name the parameter {key!r}; expected a name "
            "without > and line feeds"
        )
    schema = {} if schema is True else schema
    if not isinstance(schema, dict):
        raise tool.refused(f"the schema of {key!r} must be an object")
    made = Parameter(key, schema, required)
    choices, types = [], set()
    for each in alternatives(schema, tool.schema):
        kind = each.get("type")
        if (values := _values(each)) is not None:
            choices += values
        elif _is_plain(each, tool):
            types.add(kind)
        else:
            return made
    if "string" not in types:
        texts = [choice for choice in choices if isinstance(choice, str)]
        if types or not texts or any(END in text for text in texts):
            return made
    choices.sort(key=lambda choice: not isinstance(choice, str))  # "1" rather than 1
    return dataclasses.replace(made, choices=choices, types=frozenset(types))


def _values(schema: dict) -> list | None:
    """The values that a schema allows, if it lists them."""
    words, kind = keywords(schema), schema.get("type")
    if kind in LISTED and words <= {"type"} | OF_STRINGS:
        return LISTED[kind]
    listed = [schema["const"]] if "const" in words else schema.get("enum")
    if not isinstance(listed, list) or len(words - {"type"}) != 1:
        return None
    if any(isinstance(value, (list, dict)) for value in listed):
        return None
    return [value for value in listed if kind is None or is_of(value, kind)]


def _is_plain(schema: dict, tool: Tool) -> bool:
    """Whether all values of the schema's type may be written as text."""
    words = keywords(schema)
    if schema.get("type") == "string":
        return not words & (OF_ALL | OF_STRINGS if tool.strict else OF_ALL)
    return schema.get("type") in TYPES and words <= {"type"} | OF_STRINGS


def _lark_json(schema: dict, tool: Tool) -> str:
    """A part of a tool's schema as part of a grammar; its references are to the whole."""
    lenient = not tool.strict
    text = lark_json(schema, "tools", lenient=lenient)
    if '"$ref": "#' not in text:
        return text
    whole = {key: value for key, value in tool.schema.items() if key != "$id"}
    text = lark_json(schema | {"$defs": {"tool": whole}}, "tools", lenient=lenient)
    return text.replace('"$ref": "#', '"$ref": "#/$defs/tool')


def _text(value: Any) -> str:
    return value if isinstance(value, str) else _json(value)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _parsed(text: str) -> Any:
    """The value whose JSON a text is; the text itself if it is not JSON."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return text


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")  # Python's reader takes NaN and Infinity


class XmlCalls(CallReader):
    """Calls with one element per argument, each streamed once it is complete."""

    HEAD = re.compile(r"\n<function=([^>]+)>\n")
    SHARED = r"value[lazy]: /(.|\n)*\n<\/parameter>/"

    @classmethod
    def rules(cls, tool: Tool, name: str) -> str:
        head = lark_text(f"\n<function={tool.name}>\n")
        own = " ".join(parameter.rule(tool) for parameter in parameters(tool))
        return f"{name}: {head} {own} {lark_text(CLOSE)}"

    def __init__(self, tools: Sequence[Tool]):
        super().__init__(tools)
        self._tools = {tool.name: tool for tool in tools}

    def _head(self, calls: list[dict]) -> bool:
        if begun := super()._head(calls):
            unknown = Tool(self._called, {})  # has any parameters
            own = parameters(self._tools.get(self._called, unknown))
            self._known = {parameter.key: parameter for parameter in own}
        return begun

    def _arguments(self, calls: list[dict], last: bool) -> bool:
        if self._held.startswith(CLOSE[:2] if last else CLOSE):
            self._tell(calls, "}" if self._told else "{}")
            self._held, self._called = self._held[len(CLOSE) :], None
            return True
        key = KEY.match(self._held)
        end = self._held.find(END + "\n", key.end()) if key else -1
        if end < 0:
            return False
        parameter = self._known[key[1] if key[1] in self._known else None]
        value = parameter.as_json(self._held[key.end() : end])
        lead = ", " if self._told else "{"
        self._tell(calls, f"{lead}{_json(key[1])}: {value}")
        self._held = self._held[end + len(END) + 1 :]
        return True
