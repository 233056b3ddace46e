"""Conversations as people's files write them: OpenAI's messages and ShareGPT's turns."""

from __future__ import annotations

from typing import Any

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
ROLES = (SYSTEM, "developer", USER, ASSISTANT, "tool")
SHAREGPT = {"human": USER, "gpt": ASSISTANT, "chatgpt": ASSISTANT} | {x: x for x in ROLES}
KEYS = ("conversations", "messages")  # of a row that holds a conversation


def row_messages(row: dict[str, Any]) -> list[dict[str, str]]:
    """The conversation of a row, as `read_messages` gives it.

    Raises:
      ValueError: the row holds none, or one that cannot be read.
    """
    found = next((row[key] for key in KEYS if isinstance(row.get(key), list)), None)
    if found is None:
        raise ValueError(
            "expected {'conversations': [{'role': …, 'content': …}, …]} or {'messages': […]}, "
            f"found the keys {sorted(map(str, row))}"
        )
    return read_messages(found)


def read_messages(raw: list[Any]) -> list[dict[str, str]]:
    """Messages {'role', 'content'}, from those or from ShareGPT's {'from', 'value'}.

    A content is text, or a list of parts {'type': 'text', 'text': …}, which are joined.

    Raises:
      ValueError: a message is something else; it names which, and what was found.

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
        messages.append({"role": known[role], "content": read_text(content, where)})
    return messages


def read_text(content: Any, where: str) -> str:
    """A message's text, from text or a list of text parts.

    Args:
      where: names the message in an error.

    Raises:
      ValueError: it is something else, or no Unicode text.
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
            f"{where}: the content holds half a surrogate pair, {content[error.start]!r}; "
            "expected characters"
        ) from error
    return content


def _shown(value: Any) -> str:
    return "null" if value is None else repr(value)[:60]
