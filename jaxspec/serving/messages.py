"""Chat messages, from clients' form to that of chat templates."""

from __future__ import annotations

import json
from typing import Any

from jaxspec.serving.fields import IGNORED_IN_MESSAGES, NEUTRAL_IN_MESSAGES, BadRequest, Fields
from jaxspec.serving.thoughts import CLOSE, OPEN

THOUGHTS = "reasoning_content"  # as Qwen3's templates name it; vLLM's newer name comes second
THOUGHT_NAMES = (THOUGHTS, "reasoning")
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}


def read_messages(messages: Any) -> list[dict[str, Any]]:
    """The messages as templates take them: arguments of `tool_calls` become objects."""
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages must be a list of at least one message", "messages")
    return [_message(f"messages[{i}]", message) for i, message in enumerate(messages)]


def thoughts_in_content(message: dict[str, Any]) -> dict[str, Any]:
    """The message for templates that read thoughts in the content, and there decide what the
    model sees of them."""
    if THOUGHTS not in message:
        return message
    rest = {name: value for name, value in message.items() if name != THOUGHTS}
    content = f"{OPEN}\n{message[THOUGHTS]}\n{CLOSE}\n\n{message['content']}"
    return rest | {"content": content}


def _message(where: str, message: Any) -> dict[str, Any]:
    known = {"role", "content", *IGNORED_IN_MESSAGES}
    role = message.get("role") if isinstance(message, dict) else None
    if role == "assistant":
        known |= {"tool_calls", *THOUGHT_NAMES}
    if role == "tool":
        known.add("tool_call_id")
    fields = Fields(message, known, NEUTRAL_IN_MESSAGES, within=where)
    if not isinstance(role, str) or role not in ROLES:
        raise BadRequest(f"{where} must have a role, one of {tuple(ROLES)}", "messages")
    calls = fields.get("tool_calls", []) if role == "assistant" else []
    content = message.get("content")
    if content is None and role == "assistant":
        content = ""
    if isinstance(content, list) and all(map(_is_text, content)):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise BadRequest(f"{where} must have text as its content", "messages")
    read = {"role": ROLES[role], "content": content}
    thoughts = [fields.text(name) for name in THOUGHT_NAMES] if role == "assistant" else []
    if any(thoughts):
        read[THOUGHTS] = next(filter(None, thoughts))
    if calls:
        read["tool_calls"] = _calls(calls, f"{where}.tool_calls")
    return read


def _is_text(part: Any) -> bool:
    return (
        isinstance(part, dict)
        and part.get("type") == "text"
        and isinstance(part.get("text"), str)
    )


def _calls(calls: Any, where: str) -> list[dict]:
    if not isinstance(calls, list):
        raise BadRequest(f"{where} must be a list", "messages")
    return [_call(call, f"{where}[{i}]") for i, call in enumerate(calls)]


def _call(call: Any, where: str) -> dict:
    fields = Fields(call, {"id", "type", "function", "index"}, {}, within=where)
    # The openai package adds `parsed_arguments`, which repeat the arguments.
    function = fields.part("function", {"name", "arguments", "parsed_arguments"})
    name, arguments = function.get("name", None), function.get("arguments", "{}")
    try:
        if isinstance(arguments, str):  # clients send "" for a call without arguments
            arguments = json.loads(arguments or "{}")
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"{where}.function.arguments is not JSON", "messages") from error
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise BadRequest(
            f"{where}.function must have a name, and arguments that are a JSON object",
            "messages",
        )
    return {"type": "function", "function": {"name": name, "arguments": arguments}}
