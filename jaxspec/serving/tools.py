"""Tool calls: the tools of a request, the grammar of calls, and parsing them from the answer.

A call has the form of Qwen3's chat template::

    <tool_call>
    {"name": "weather", "arguments": {"city": "Rome"}}
    </tool_call>

Its arguments match the tool's schema: all of it if the tool is strict, else what llguidance
supports of it, so that one tool's schema does not make all others unusable.
"""

from __future__ import annotations

import dataclasses
import re
import uuid
from collections.abc import Sequence
from typing import Any

from jaxspec.answer_text import overlap
from jaxspec.serving.fields import BadRequest, Fields
from jaxspec.serving.formats import lark_json, lark_text
from jaxspec.serving.grammars import Grammars

TOOLS = {"tools", "tool_choice", "parallel_tool_calls"}
OPEN, CLOSE = "<tool_call>", "}\n</tool_call>"
HEAD = re.compile(r'\n\{"name": "([^"]*)", "arguments": ')
NAME = re.compile("[A-Za-z0-9_-]{1,64}")
MAX_TOOLS = 128
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
ANYTHING = r"""
lead[lazy]: /(.|\n)*<tool_call>/
TEXT: /(.|\n)*/ & ~/(.|\n)*<tool_call>(.|\n)*/
"""


@dataclasses.dataclass(frozen=True)
class Tool:
    """A function that answers may call.

    Attributes:
      schema: JSON schema of its arguments.
      strict: whether keywords of the schema that llguidance does not support are refused; they
        are ignored otherwise.
      path: of the tool in the body.
    """

    name: str
    schema: dict
    strict: bool = False
    path: str = "tools"


@dataclasses.dataclass(frozen=True)
class Tools:
    """The tools of a request.

    Attributes:
      offered: the tools as they were sent, for the chat template.
      callable: those that the answer may call.
      grammar: text of the grammar of answers.
      free: whether the answer may contain no call.
    """

    offered: tuple[dict, ...]
    callable: tuple[Tool, ...]
    grammar: str
    free: bool

    def check(self, grammars: Grammars) -> None:
        """Raises BadRequest for the first tool whose schema cannot be used."""
        for tool in self.callable:
            try:
                grammars.of(calls_text([tool], free=False, several=False))
            except ValueError as error:
                remedy = "leave out strict, or " if tool.strict else ""
                raise BadRequest(
                    f"{tool.path}.function.parameters ({tool.name!r}) cannot be used: {error}; "
                    f"{remedy}simplify the schema",
                    "tools",
                ) from error


def read_tools(fields: Fields) -> Tools | None:
    """Reads `tools`, `tool_choice` and `parallel_tool_calls`; None if no tool may be called, so
    that the model is shown none."""
    offered = fields.get("tools", [])
    if not isinstance(offered, list) or len(offered) > MAX_TOOLS:
        raise BadRequest(f"tools must be a list of up to {MAX_TOOLS} tools", "tools")
    tools: dict[str, Tool] = {}
    for i, each in enumerate(offered):
        tool = _tool(each, f"tools[{i}]")
        if tool.name in tools:
            raise BadRequest(f"tools has {tool.name!r} twice", "tools")
        tools[tool.name] = tool
    several = fields.flag("parallel_tool_calls", True)
    choice = fields.get("tool_choice", "auto")
    named = _named(choice, tools)
    if choice == "none" or (choice == "auto" and not tools):
        return None
    if not tools:
        raise BadRequest("tool_choice asks for a call, but tools is empty", "tool_choice")
    callable_ = (tools[named],) if named else tuple(tools.values())
    free = choice == "auto"
    grammar = calls_text(callable_, free=free, several=several and not named)
    return Tools(tuple(offered), callable_, grammar, free)


def _tool(tool: Any, where: str) -> Tool:
    fields = Fields(tool, {"type", "function"}, {}, within=where)
    if fields.get("type", None) != "function":
        raise BadRequest(f"{where}.type must be 'function'", "tools")
    own = fields.part("function", {"name", "description", "parameters", "strict"})
    name, schema = own.get("name", None), own.get("parameters", NOTHING)
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise BadRequest(f"{where}.function.name must match {NAME.pattern}", "tools")
    if not isinstance(schema, dict):
        raise BadRequest(f"{where}.function.parameters must be a JSON schema", "tools")
    return Tool(name, {"type": "object"} | schema, own.flag("strict"), where)


def _named(choice: Any, tools: dict[str, Tool]) -> str | None:
    if choice in ("none", "auto", "required"):
        return None
    name = None
    if isinstance(choice, dict) and choice.get("type") == "function":
        fields = Fields(choice, {"type", "function"}, {}, within="tool_choice")
        name = fields.part("function", {"name"}).get("name", None)
        if isinstance(name, str) and name in tools:
            return name
        raise BadRequest(f"tool_choice names {name!r}; tools have {list(tools)}", "tool_choice")
    raise BadRequest(
        f"tool_choice is {choice!r}; expected none, auto, required or one of the tools",
        "tool_choice",
    )


def calls_text(tools: Sequence[Tool], *, free: bool, several: bool) -> str:
    """The text of the grammar of answers with calls.

    Args:
      tools: those that may be called.
      free: any text may come before the calls, or instead of them.
      several: there may be more than one call.
    """
    more = f"({lark_text(chr(10) + OPEN)} call)*" if several else ""
    start = f"TEXT | lead call {more}" if free else f"{lark_text(OPEN)} call {more}"
    rules = [f"start: {start}", ANYTHING if free else ""]
    rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(tools))))
    for i, tool in enumerate(tools):
        head = lark_text(f'\n{{"name": "{tool.name}", "arguments": ')
        arguments = lark_json(tool.schema, "tools", lenient=not tool.strict)
        rules.append(f"call_{i}: {head} {arguments} {lark_text(CLOSE)}")
    return "\n".join(rules)


class CallReader:
    """Splits a growing answer into plain text and tool calls.

    Attributes:
      count: number of calls so far.
    """

    def __init__(self):
        self._held, self._inside, self.count = "", False, 0

    def add(self, text: str, *, last: bool = False) -> tuple[str, list[dict]]:
        """The new plain text, and the new parts of calls as a stream's `tool_calls`.

        There is one part per call: the `openai` package joins only parts of different chunks.

        Args: last: no text comes after this one.
        """
        self._held += text
        said, calls = "", []
        while True:
            if self._inside:
                more = self._arguments(calls, last)
            else:
                found, more = self._said(last)
                said += found
                if more:
                    more = self._head(calls)
            if not more:
                return said, calls

    def _said(self, last: bool) -> tuple[str, bool]:
        """The text up to a call, and whether a call begins."""
        if (at := self._held.find(OPEN)) >= 0:
            said, self._held = self._held[:at], self._held[at:]
            return said.removesuffix("\n"), True
        keep = 0 if last else max(overlap(self._held, end) for end in (OPEN, "\n" + OPEN))
        cut = len(self._held) - keep
        said, self._held = self._held[:cut], self._held[cut:]
        return said, False

    def _head(self, calls: list[dict]) -> bool:
        """Reads a call's name, once it is complete."""
        found = HEAD.match(self._held, len(OPEN))
        if found is None:
            return False
        function = {"name": found[1], "arguments": ""}
        call = {"index": self.count, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function"}
        calls.append(call | {"function": function})
        self._held, self._inside = self._held[found.end() :], True
        self.count += 1
        return True

    def _arguments(self, calls: list[dict], last: bool) -> bool:
        """Reads more of a call's arguments; returns whether the call has ended."""
        at = self._held.find(CLOSE)
        keep = 0 if last else overlap(self._held, CLOSE)
        cut = at if at >= 0 else len(self._held) - keep
        if cut and calls:  # the last of them is this call's
            calls[-1]["function"]["arguments"] += self._held[:cut]
        elif cut:
            function = {"arguments": self._held[:cut]}
            calls.append({"index": self.count - 1, "function": function})
        self._held = self._held[cut + (len(CLOSE) if at >= 0 else 0) :]
        self._inside = at < 0
        return at >= 0


def joined_calls(parts: list[dict]) -> list[dict]:
    """Joins a stream's parts of calls into whole calls."""
    calls: list[dict] = []
    for part in parts:
        if part["index"] == len(calls):
            calls.append({name: part[name] for name in ("id", "type")} | {"function": {}})
        function = calls[part["index"]]["function"]
        for name, text in part["function"].items():
            function[name] = function.get(name, "") + text
    return calls
