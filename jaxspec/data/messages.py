"""Conversations in users' formats: OpenAI's messages, ShareGPT's turns, and pairs of a prompt
and its completion."""

from __future__ import annotations

import json
from typing import Any

USER, ASSISTANT = "user", "assistant"
SYSTEMS = ("system", "developer")
ROLES = (*SYSTEMS, USER, ASSISTANT, "tool")
SHAREGPT = {"human": USER, "gpt": ASSISTANT, "chatgpt": ASSISTANT} | {x: x for x in ROLES}
KEYS = ("conversations", "messages")  # keys of a conversation in a row
PAIRS = (("prompt", "completion"), ("question", "answer"))  # keys of a row
OURS, PROMPTS = "conversations", "prompts"
PLAIN_SHAPES = (OURS, PROMPTS)  # what this project's own files hold
TOOLS = ("tools", "functions")  # keys of a row
CALLS = ("tool_calls", "function_call")  # keys of a message, as are the next
THOUGHTS = ("reasoning_content", "reasoning", "thinking")


def shape_of(row: dict[str, Any]) -> str | None:
    """The name of a row's format, by its keys; None for an unknown one.

    >>> shape_of({"messages": [{"role": "user", "content": "Hi"}]})
    "OpenAI's messages"
    """
    key = next((key for key in KEYS if row.get(key)), None)
    if key is not None:
        first = row[key][0] if isinstance(row[key], list) else None
        if isinstance(first, dict) and "from" in first:
            return "ShareGPT's conversations"
        return OURS if key == KEYS[0] else "OpenAI's messages"
    asked, answer = pair_of(row)
    if asked in row:
        return f"{asked}s with {answer}s" if answer in row else f"{asked}s"
    return PROMPTS if "turns" in row or "opening" in row else None


def pair_of(row: dict[str, Any]) -> tuple[str, str]:
    """The keys under which a row has a prompt, and perhaps its completion.

    >>> pair_of({"question": "1 + 1?", "answer": "2"})
    ('question', 'answer')
    """
    return next((pair for pair in PAIRS if pair[0] in row), PAIRS[0])


def holds_conversation(row: dict[str, Any]) -> bool:
    """Whether a row has answers, so that `row_messages` reads it."""
    return any(key in row for key in KEYS) or all(key in row for key in pair_of(row))


def refuse_tools(row: dict[str, Any]) -> None:
    """Raises ValueError if a row has tools, which would be lost."""
    for name in TOOLS:
        if row.get(name) not in (None, [], {}, "", "[]"):
            raise ValueError(
                f"'{name}' is {_shown(row[name])}; expected a conversation without tools"
            )


def row_messages(row: dict[str, Any], *, answers: bool = True) -> list[dict[str, str]]:
    """The conversation of a row, as `read_messages` gives it.

    It is the list under "conversations" or "messages" (possibly as JSON text), or a "prompt"
    with its "completion", or a "question" with its "answer", each a text or a list of messages.

    Raises:
      ValueError: the row has no conversation, an invalid one, or one with tools.
    """
    refuse_tools(row)
    lists = (_listed(row.get(key)) for key in KEYS)
    found = next((x for x in lists if x is not None), None)
    if found is not None:
        return read_messages(found, answers=answers)
    asked, answer = pair_of(row)
    if asked in row and answer in row:
        return [
            *_messages(row[asked], USER, asked),
            *_messages(row[answer], ASSISTANT, answer),
        ]
    raise ValueError(
        "expected {'conversations': [{'role': …, 'content': …}, …]}, {'messages': […]}, "
        "{'prompt': …, 'completion': …} or {'question': …, 'answer': …}, found the keys "
        f"{sorted(map(str, row))}"
    )


def _listed(value: Any) -> list[Any] | None:
    """A list, or one that is written as JSON text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, list) else None


def _messages(value: Any, role: str, name: str) -> list[dict[str, str]]:
    """Messages of a prompt or a completion, of which text is one."""
    if isinstance(value, str):
        return [{"role": role, "content": read_text(value, f"'{name}'")}]
    if isinstance(value, list):
        return read_messages(value)
    raise ValueError(f"'{name}' is {_shown(value)}; expected text or a list of messages")


def read_messages(raw: list[Any], *, answers: bool = True) -> list[dict[str, str]]:
    """Messages {'role', 'content'}, from those or from ShareGPT's {'from', 'value'}.

    A content is text, or a list of parts {'type': 'text', 'text': …}, which are joined.

    Args:
      answers: whether the answers are used. Only then do their thoughts and weights matter.

    Raises:
      ValueError: a message has another form, or a part that would be lost: a call of a tool,
        thoughts beside the content, or a weight other than 1.

    >>> read_messages([{"from": "human", "value": "Hi"}])
    [{'role': 'user', 'content': 'Hi'}]
    """
    messages = []
    for number, message in enumerate(raw):
        where = f"message {number}"
        if not isinstance(message, dict):
            raise ValueError(f"{where} is {_shown(message)}; expected an object")
        if "role" in message:
            role, content = message["role"], message.get("content")
            known, name = dict(zip(ROLES, ROLES, strict=True)), "role"
        else:
            role, content = message.get("from"), message.get("value")
            known, name = SHAREGPT, "from"
        if not isinstance(role, str) or role not in known:
            expected = ", ".join(known)
            raise ValueError(f"{where}: '{name}' is {_shown(role)}; expected one of {expected}")
        _refuse_lost(message, where, answers)
        messages.append({"role": known[role], "content": read_text(content, where)})
    return messages


def _refuse_lost(message: dict[str, Any], where: str, answers: bool) -> None:
    """Raises ValueError for a part of a message that role and content do not hold."""
    for name in (*CALLS, *THOUGHTS) if answers else CALLS:
        if message.get(name):
            raise ValueError(
                f"{where}: '{name}' is {_shown(message[name])}; expected none: only the "
                "content of a message is read"
            )
    if answers and message.get("weight") not in (None, 1):
        raise ValueError(
            f"{where}: 'weight' is {_shown(message['weight'])}; expected 1: all answers of a "
            "conversation are used"
        )


def read_text(content: Any, where: str) -> str:
    """A message's text, from text or a list of text parts.

    Args:
      where: names the message in an error.

    Raises:
      ValueError: the content has another form, or is not valid Unicode.
    """
    if isinstance(content, list):
        for i, part in enumerate(content):
            if not (
                isinstance(part, dict)
                and part.get("type") == "text"
                and isinstance(part.get("text"), str)
            ):
                raise ValueError(
                    f"{where}: part {i} of the content is {_shown(part)}; expected "
                    "{'type': 'text', 'text': …}: only text can be read"
                )
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError(
            f"{where}: the content is {_shown(content)}; expected text, or a list of text parts"
        )
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: the content has a lone surrogate, {content[error.start]!r}; expected "
            "valid Unicode text"
        ) from error
    return content


def _shown(value: Any) -> str:
    return "null" if value is None else repr(value)[:60]
