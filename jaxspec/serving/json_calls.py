"""Tool calls in the form of Qwen3's chat template::

    <tool_call>
    {"name": "weather", "arguments": {"city": "Rome"}}
    </tool_call>

The arguments match the tool's schema: all of it if the tool is strict, else what llguidance
supports of it, so that one tool's schema does not make all others unusable.
"""

from __future__ import annotations

import json
import re

from jaxspec.answer_text import overlap
from jaxspec.serving.calls import CallReader, Tool
from jaxspec.serving.formats import lark_json, lark_text

CLOSE = "}\n</tool_call>"


class JsonCalls(CallReader):
    """Calls as JSON objects. Arguments are streamed as they are written."""

    HEAD = re.compile(r'\n\{"name": "([^"]*)", "arguments": ')

    @classmethod
    def rules(cls, tool: Tool, name: str) -> str:
        head = lark_text(f'\n{{"name": "{tool.name}", "arguments": ')
        arguments = lark_json(tool.schema, "tools", lenient=not tool.strict)
        return f"{name}: {head} {arguments} {lark_text(CLOSE)}"

    def _arguments(self, calls: list[dict], last: bool) -> bool:
        at = self._held.find(CLOSE)
        if at < 0 and last:  # only the JSON tells whose the last brace is
            at = _length(self._told + self._held) - len(self._told)
        keep = 0 if last else overlap(self._held, CLOSE)
        cut = at if at >= 0 else len(self._held) - keep
        if cut:
            self._tell(calls, self._held[:cut])
        self._held = self._held[cut + (len(CLOSE) if at >= 0 else 0) :]
        if at >= 0:
            self._called = None
        return at >= 0


def _length(text: str) -> int:
    """Characters of the JSON value that a text begins with; -1 if it is not complete."""
    try:
        return json.JSONDecoder().raw_decode(text)[1]
    except (ValueError, RecursionError):
        return -1
