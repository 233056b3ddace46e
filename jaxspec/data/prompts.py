"""Files of prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxspec.data.jsonl import numbered_lines, parse_object, read_text
from jaxspec.data.messages import KEYS, USER, row_messages
from jaxspec.data.messages import read_text as message_text

EXPECTED = (
    'expected {"turns": ["text", …]}, {"prompt": "text"}, or {"conversations": […]} or '
    '{"messages": […]} with a user\'s message'
)


def read_prompts(path: Path) -> list[str]:
    """First turns of a JSONL file; its rows are as `row_turns` reads them.

    Raises:
      ValueError: the file cannot be read, or a row is something else or has a system message.
    """
    prompts = []
    for number, line in numbered_lines(path):
        try:
            system, turns = row_turns(parse_object(line))
            if system:
                raise ValueError("there is a system message; a prompt is a user's turn alone")
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        prompts.append(turns[0])
    if not prompts:
        raise ValueError(f"{path} holds no prompts; expected one JSON object per line")
    return prompts


def row_turns(row: dict[str, Any]) -> tuple[list[dict[str, str]], list[str]]:
    """System messages and the user's turns of a row; answers are dropped.

    A row is {"turns": [...]}, {"prompt": ...}, or a conversation (`messages.row_messages`).

    Raises:
      ValueError: it is something else, or has no turn with text in it.
    """
    if any(key in row for key in KEYS):
        messages = row_messages(row)
        system = [x for x in messages if x["role"] in ("system", "developer")]
        turns = [x["content"] for x in messages if x["role"] == USER]
    else:
        found = row["turns"] if "turns" in row else [row.get("prompt")]
        if not isinstance(found, list) or not all(isinstance(turn, str) for turn in found):
            raise ValueError(f"{EXPECTED}, found {json.dumps(row)[:60]}")
        system, turns = [], [message_text(turn, f"turn {i}") for i, turn in enumerate(found)]
    if not turns or not all(turn.strip() for turn in turns):
        raise ValueError(f"{EXPECTED}, found no text in {json.dumps(row)[:60]}")
    return system, turns


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
    """`count` of the rows, evenly apart; all if it is 0.

    >>> spread([0, 1, 2, 3, 4, 5], 3)
    [0, 2, 4]
    """
    if not 0 < count < len(rows):
        return rows
    return [rows[i * len(rows) // count] for i in range(count)]
