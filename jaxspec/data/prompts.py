"""Files of prompts."""

from __future__ import annotations

import json
from pathlib import Path

from jaxspec.data.jsonl import numbered_lines, read_text


def read_prompts(path: Path) -> list[str]:
    """First turns of a JSONL file; rows are {"turns": [...]} or {"prompt": ...}."""
    rows = []
    for number, line in numbered_lines(path):
        row = _parse(line, f"{path}, line {number}")
        text = None
        if isinstance(row, dict):
            turns = row.get("turns")
            text = turns[0] if isinstance(turns, list) and turns else row.get("prompt")
        if not isinstance(text, str):
            raise ValueError(
                f'{path}, line {number}: expected {{"turns": ["text", …]}} or '
                f'{{"prompt": "text"}}, found {line[:60]!r}'
            )
        rows.append(text)
    if not rows:
        raise ValueError(f"{path} holds no prompts; expected one JSON object per line")
    return rows


def read_prompt_ids(path: Path) -> list[list[int]]:
    """A JSON list of lists of token ids."""
    rows = _parse(read_text(path), str(path))
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


def _parse(text: str, where: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
