"""Tool calls in answers: what the forms of calls share.

A call stands between `<tool_call>` and `</tool_call>`. The chat template teaches the model the
form of what is between; text may come before the calls, and a line feed is between two.
"""

from __future__ import annotations

import dataclasses
import re
import uuid
from collections.abc import Sequence

from jaxspec.answer_text import overlap
from jaxspec.serving.fields import BadRequest
from jaxspec.serving.formats import lark_text
from jaxspec.serving.grammars import Lead

OPEN = "<tool_call>"
LEAD = Lead(OPEN, may_end=True)  # of answers that may contain a call


@dataclasses.dataclass(frozen=True)
class Tool:
    """A function that answers may call.

    Attributes:
      schema: JSON schema of its arguments.
      strict: whether keywords of the schema that grammars do not support are refused; they are
        ignored otherwise.
      path: of the tool in the body.
    """

    name: str
    schema: dict
    strict: bool = False
    path: str = "tools"

    def refused(self, why: object) -> BadRequest:
        """The error of a schema that cannot be used."""
        remedy = "leave out strict, or " if self.strict else ""
        return BadRequest(
            f"{self.path}.function.parameters ({self.name!r}) cannot be used: {why}; "
            f"{remedy}simplify the schema",
            "tools",
        )


class CallReader:
    """Splits a growing answer into plain text and tool calls.

    Each form of calls is a subclass, which has the form's grammar too.

    Attributes:
      count: number of calls so far.
      HEAD: what stands between `<tool_call>` and the arguments; its group is the tool's name.
      SHARED: rules of the grammar that all tools' rules may use.
    """

    HEAD: re.Pattern[str]
    SHARED = ""

    @classmethod
    def rules(cls, tool: Tool, name: str) -> str:
        """The grammar's rule of what follows `<tool_call>` in a call of a tool.

        Args: name: of the rule; names of rules that only it uses begin with it.

        Raises:
          BadRequest: the tool cannot be called in this form.
        """
        raise NotImplementedError

    def __init__(self, tools: Sequence[Tool]):
        """Args: tools: those that the answer may call."""
        self._held, self._called, self._told, self.count = "", None, "", 0

    @property
    def open(self) -> bool:
        """Whether a call has begun whose arguments are not complete."""
        return self._called is not None

    def add(self, text: str, *, last: bool = False) -> tuple[str, list[dict]]:
        """The new plain text, and the new parts of calls as a stream's `tool_calls`.

        There is one part per call: the `openai` package joins only parts of different chunks.

        Args: last: no text comes after this one.
        """
        self._held += text
        said, calls = "", []
        while True:
            if self._called is not None:
                more = self._arguments(calls, last)
            else:
                found, more = self._said(last)
                said += "" if self.count else found  # after a call, it is the form's
                if more:
                    more = self._head(calls)
            if not more:
                return said, calls

    def rest(self) -> str:
        """The end of a whole answer that began like a call and is none."""
        rest, self._held = "" if self.count else self._held, ""
        return rest

    def _said(self, last: bool) -> tuple[str, bool]:
        """The text up to a call, and whether a call begins.

        Line feeds before a call belong to the form, which has one or two of them there.
        """
        if (at := self._held.find(OPEN)) >= 0:
            said, self._held = self._held[:at].rstrip("\n"), self._held[at:]
            return said, True
        keep = 0 if last else overlap(self._held, OPEN)
        said = self._held[: len(self._held) - keep]
        said = said if last else said.rstrip("\n")
        self._held = self._held[len(said) :]
        return said, False

    def _head(self, calls: list[dict]) -> bool:
        """Reads a call's name, once it is complete."""
        found = self.HEAD.match(self._held, len(OPEN))
        if found is None:
            return False
        function = {"name": found[1], "arguments": ""}
        call = {"index": self.count, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function"}
        calls.append(call | {"function": function})
        self._held, self._called, self._told = self._held[found.end() :], found[1], ""
        self.count += 1
        return True

    def _arguments(self, calls: list[dict], last: bool) -> bool:
        """Reads more of the arguments; returns whether there may be more to read in what is
        held.

        Args: last: the answer may end inside the call, which ends too if its arguments are
          complete.
        """
        raise NotImplementedError

    def _tell(self, calls: list[dict], arguments: str) -> None:
        """Adds JSON text to the arguments of the call that is being read."""
        self._told += arguments
        if calls:  # the last of them is this call's
            calls[-1]["function"]["arguments"] += arguments
        else:
            calls.append({"index": self.count - 1, "function": {"arguments": arguments}})


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


def calls_text(
    form: type[CallReader],
    tools: Sequence[Tool],
    *,
    free: bool,
    several: bool,
    instead: str | None = None,
) -> str:
    """The text of the grammar of answers with calls.

    Args:
      tools: those that may be called.
      free: the answer has the lead `LEAD`.
      several: there may be more than one call.
      instead: the text of a grammar of answers that may come instead of the calls.
    """
    more = f"({lark_text(chr(10) + OPEN)} call)*" if several else ""
    start = f"call {more}" if free else f"{lark_text(OPEN)} call {more}"
    if instead is not None:
        start += f" | instead\n{instead.replace('start:', 'instead:', 1)}"
    names = [f"call_{i}" for i in range(len(tools))]
    rules = [f"start: {start}", form.SHARED]
    rules.append("call: " + " | ".join(names))
    rules += map(form.rules, tools, names)
    return "\n".join(rules)
