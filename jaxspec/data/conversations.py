"""Conversations as token ids, with the tokens that the target itself wrote marked."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxspec.data.jsonl import numbered_lines
from jaxspec.tokenizer import Messages, Tokenizer


@dataclasses.dataclass(frozen=True)
class Example:
    """One sequence.

    Attributes:
      tokens: [T] int32.
      supervised: [T] bool, tokens the target wrote, the stop id included.
    """

    tokens: np.ndarray
    supervised: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


def encode(
    tokenizer: Tokenizer,
    messages: Messages,
    *,
    thinking: bool | None = None,
    finished: bool = True,
) -> list[Example]:
    """A conversation as the target saw it when it wrote each answer.

    Which tokens are an answer follows from the chat template: from its `{% generation %}`
    marks or, without them, from what the rendering of a conversation that ends with the answer
    adds to the prompt that asked for it. Where a template renders earlier answers differently
    from the last one (Qwen3 drops their thoughts), every answer has a sequence of its own.

    Args:
      messages: {'role': …, 'content': …} each; those with the role 'assistant' are answers.
      thinking: as the answers were written.
      finished: the last answer ended by itself; otherwise its end is not supervised.

    Raises:
      ValueError: there is no answer, or the template does not put it after its prompt.
    """
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise ValueError("the conversation has no message of the role 'assistant'")
    if tokenizer.marks_answers:
        return [_marked(tokenizer, messages, finished)]
    examples: list[Example] = []
    for i in answers:
        prompt = tokenizer.chat(messages[:i], thinking=thinking)
        whole = tokenizer.render(messages[: i + 1], thinking=thinking)
        if whole[: len(prompt)] != prompt:
            raise ValueError(
                f"message {i}: the chat template does not render the answer after the prompt "
                f"that asks for it (thinking is {thinking}); was it written in another mode?"
            )
        answer = _until_stop(whole[len(prompt) :], tokenizer, finished or i != answers[-1])
        before = examples[-1] if examples else None
        if before and prompt[: len(before)] == before.tokens.tolist():
            supervised = before.supervised
            examples.pop()
        else:
            supervised = np.zeros(0, bool)
        prompted = np.zeros(len(prompt) - len(supervised), bool)
        examples.append(
            Example(
                np.array(prompt + answer, np.int32),
                np.concatenate([supervised, prompted, np.ones(len(answer), bool)]),
            )
        )
    return examples


def read(path: str | Path) -> Iterator[dict[str, Any]]:
    """Rows {"conversations": [...], …} of a JSON lines file, as `regenerate` writes them.

    Raises:
      ValueError: the file cannot be read, or a line is something else.
    """
    for number, line in numbered_lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict) or not isinstance(row.get("conversations"), list):
            raise ValueError(
                f'{path}, line {number}: expected {{"conversations": [{{"role": …, '
                f'"content": …}}, …]}}, found {line[:60]!r}'
            )
        yield row


def read_examples(
    path: str | Path, tokenizer: Tokenizer, *, max_length: int, min_supervised: int = 14
) -> list[Example]:
    """Every sequence of a file of conversations, cut at the right to `max_length` tokens.

    Those with fewer than `min_supervised` tokens of the target's are left out.

    Raises:
      ValueError: a line cannot be used, or none is left.
    """
    examples = []
    for number, row in enumerate(read(path), 1):
        try:
            encoded = encode(
                tokenizer,
                row["conversations"],
                thinking=row.get("thinking"),
                finished=row.get("finished", True),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, conversation {number}: {error}") from error
        for example in encoded:
            cut = Example(example.tokens[:max_length], example.supervised[:max_length])
            if cut.supervised.sum() >= min_supervised:
                examples.append(cut)
    if not examples:
        raise ValueError(
            f"{path}: no conversation has {min_supervised} tokens of an answer within "
            f"{max_length}; raise max_length or lower min_supervised"
        )
    return examples


def _marked(tokenizer: Tokenizer, messages: Messages, finished: bool) -> Example:
    """By the template's own marks."""
    ids, marks = tokenizer.render_marked(messages)
    tokens, supervised = np.array(ids, np.int32), np.array(marks, bool)
    if not finished:
        last = np.flatnonzero(supervised)[-1] + 1
        stops = np.isin(tokens[:last], tokenizer.eos_token_ids) & supervised[:last]
        last = np.flatnonzero(stops)[-1] if stops.any() else last
        return Example(tokens[:last], supervised[:last])
    return Example(tokens, supervised)


def _until_stop(answer: list[int], tokenizer: Tokenizer, finished: bool) -> list[int]:
    """Without what the template writes after the stop id, which the target never does."""
    stop = next((i for i, x in enumerate(answer) if x in tokenizer.eos_token_ids), None)
    return answer if stop is None else answer[: stop + finished]
