"""Files of prompts."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxspec.data.jsonl import read_text
from jaxspec.data.messages import (
    ASSISTANT,
    KEYS,
    SYSTEMS,
    USER,
    pair_of,
    read_messages,
    refuse_tools,
    row_messages,
)
from jaxspec.data.messages import read_text as message_text
from jaxspec.data.sources import Source, open_source

EXPECTED = (
    'expected {"turns": ["text", …]}, {"prompt": "text"}, {"question": "text"}, or '
    '{"conversations": […]} or {"messages": […]} with a user\'s message'
)


def read_prompts(source: str | Path | Source, refused: list[str] | None = None) -> list[str]:
    """First turns of the rows of a source; rows are as `row_turns` reads them.

    Args:
      refused: receives a line per row that cannot be used, which includes rows with a system
        message; without it, the first such row raises an error.

    Raises:
      ValueError: the source cannot be read, or has no prompts.
    """
    source = open_source(source)
    prompts, bad = [], []
    for found in read_rows(source):
        if isinstance(found, ValueError):
            if refused is None:
                raise found
            bad.append(str(found))
        else:
            prompts.append(found)
    if not prompts:
        reason = bad[0] if bad else "expected one JSON object per line"
        raise ValueError(f"{source.name} holds no prompts; {reason}")
    if refused is not None:
        refused += bad
    return prompts


def read_rows(source: str | Path | Source) -> Iterator[str | ValueError]:
    """The first turn of every row, or the error of an unusable one; see `read_prompts`."""
    for row in open_source(source):
        try:
            system, turns = row_turns(row.fields)
            if system:
                raise ValueError("the row has a system message; expected only user turns")
            yield turns[0]
        except ValueError as error:
            yield ValueError(f"{row.where}: {error}")


def row_turns(row: dict[str, Any]) -> tuple[list[dict[str, str]], list[str]]:
    """System messages and the user's turns of a row; answers are dropped.

    A row is {"turns": [...]}, {"prompt": ...} or {"question": ...} with text or messages, or a
    conversation (`messages.row_messages`).

    Raises:
      ValueError: the row has another form, no turn with text, tools, or a message between the
        turns that is no answer.
    """
    refuse_tools(row)
    asked = row.get(pair_of(row)[0])
    if any(key in row for key in KEYS) or ("turns" not in row and isinstance(asked, list)):
        system, turns = _turns(
            row_messages(row, answers=False)
            if any(key in row for key in KEYS)
            else read_messages(asked, answers=False)
        )
    else:
        found = row["turns"] if "turns" in row else [asked]
        if not isinstance(found, list) or not all(isinstance(turn, str) for turn in found):
            raise ValueError(f"{EXPECTED}, found {_shown(row)}")
        system, turns = [], [message_text(turn, f"turn {i}") for i, turn in enumerate(found)]
    if not turns or not all(turn.strip() for turn in turns):
        raise ValueError(f"{EXPECTED}, found no text in {_shown(row)}")
    return system, turns


def _turns(messages: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[str]]:
    """The system's messages, which come first, and the user's turns."""
    system = list(itertools.takewhile(lambda x: x["role"] in SYSTEMS, messages))
    for number, message in enumerate(messages[len(system) :], len(system)):
        if message["role"] not in (USER, ASSISTANT):
            raise ValueError(
                f"message {number}: the role is {message['role']!r}; expected the system's "
                "messages first, then only a user's and an assistant's"
            )
    return system, [x["content"] for x in messages if x["role"] == USER]


def _shown(row: dict[str, Any]) -> str:
    return json.dumps(row, default=str)[:60]


def read_prompt_ids(path: Path) -> list[list[int]]:
    """A JSON list of lists of token ids."""
    try:
        rows = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    good = (
        isinstance(rows, list)
        and rows
        and all(
            isinstance(row, list) and all(type(token) is int for token in row) for row in rows
        )
    )
    if not good:
        raise ValueError(f"{path}: expected a JSON list of lists of token ids, [[1, 2, …], …]")
    return rows


def spread(rows: list, count: int) -> list:
    """`count` of the rows, evenly spaced; all if `count` is 0.

    >>> spread([0, 1, 2, 3, 4, 5], 3)
    [0, 2, 4]
    """
    if not 0 < count < len(rows):
        return rows
    return [rows[i * len(rows) // count] for i in range(count)]
