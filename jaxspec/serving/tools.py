"""The tools of a request, and the form in which the target's chat template teaches calls."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from jaxspec.serving.calls import LEAD, CallReader, Tool, calls_text
from jaxspec.serving.fields import BadRequest, Fields
from jaxspec.serving.grammars import Grammars, Lead
from jaxspec.serving.json_calls import JsonCalls
from jaxspec.serving.xml_calls import XmlCalls
from jaxspec.tokenizer import Tokenizer

TOOLS = {"tools", "tool_choice", "parallel_tool_calls"}
NAME = re.compile("[A-Za-z0-9_-]{1,64}")
MAX_TOOLS = 128
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclasses.dataclass(frozen=True)
class Tools:
    """The tools of a request.

    Attributes:
      offered: the tools as they were sent, for the chat template.
      callable: those that the answer may call.
      form: of calls.
      grammar: text of the grammar of answers.
      free: whether the answer may contain no call.
      instead: text of the grammar of an answer without calls, if it has a format.
    """

    offered: tuple[dict, ...]
    callable: tuple[Tool, ...]
    form: type[CallReader]
    grammar: str
    free: bool
    instead: str | None = None

    @property
    def lead(self) -> Lead | None:
        """What may come before a call, if it may be any text."""
        return LEAD if self.free and self.instead is None else None

    def check(self, grammars: Grammars) -> None:
        """Raises BadRequest for the first tool whose schema cannot be used."""
        for tool in self.callable:
            try:
                grammars.of(calls_text(self.form, [tool], free=False, several=False))
            except ValueError as error:
                raise tool.refused(error) from error

    def reader(self) -> CallReader:
        """A reader of one answer's calls."""
        return self.form(self.callable)


def call_form(tokenizer: Tokenizer) -> type[CallReader]:
    """The form of calls that the chat template teaches."""
    return XmlCalls if tokenizer.template_has("<function=") else JsonCalls


def read_tools(
    fields: Fields, form: type[CallReader], instead: str | None = None
) -> Tools | None:
    """Reads `tools`, `tool_choice` and `parallel_tool_calls`; None if no tool may be called, so
    that the model is shown none.

    Args: instead: text of the grammar of answers without calls; None: they are any text.
    """
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
    instead = instead if free else None
    own = dict(free=free and instead is None, several=several and not named, instead=instead)
    grammar = calls_text(form, callable_, **own)
    return Tools(tuple(offered), callable_, form, grammar, free, instead)


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
