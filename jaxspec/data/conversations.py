"""Conversations as token ids, with the tokens that the target itself wrote marked.

Stored text does not say which tokens were sampled, and a chat template may change it. Every
rendering is therefore decoded again and compared with the original answers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from jaxspec.data.messages import ASSISTANT, USER
from jaxspec.tokenizer import Messages, Tokenizer


@dataclasses.dataclass(frozen=True)
class Example:
    """One sequence.

    Attributes:
      tokens: [T] int32.
      supervised: [T] bool, tokens the target wrote, the stop id included.
      thinking: mode of the chat template that the target wrote them in; None: its default.
    """

    tokens: np.ndarray
    supervised: np.ndarray
    thinking: bool | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def cut(self, length: int) -> Example:
        """Its first `length` tokens."""
        return Example(self.tokens[:length], self.supervised[:length], self.thinking)


def encode(
    tokenizer: Tokenizer,
    messages: Messages,
    *,
    thinking: bool | None = None,
    finished: bool = True,
    stop_ids: Collection[int] = (),
) -> list[Example]:
    """Tokenizes a conversation as the target saw it when it wrote each answer.

    Answer tokens are found by the chat template's `{% generation %}` marks. Without marks they
    are the tokens that rendering the conversation up to the answer adds to rendering its
    prompt. Where a template renders earlier answers differently from the last one (Qwen3 drops
    their thinking), every answer becomes a separate sequence.

    Args:
      messages: dicts {'role': …, 'content': …}; those with the role 'assistant' are answers.
      thinking: the thinking mode in which the answers were written.
      finished: whether the last answer ended with a stop id; otherwise its end is not
        supervised.
      stop_ids: token ids that end an answer, besides the tokenizer's.

    Raises:
      ValueError: there is no answer, the template does not render an answer after its prompt,
        or the rendered tokens differ from the answer's text.
    """
    answers = [i for i, message in enumerate(messages) if message["role"] == ASSISTANT]
    if not answers:
        raise ValueError(f"the conversation has no message of the role '{ASSISTANT}'")
    if not finished and not messages[answers[-1]]["content"]:
        answers.pop()  # stopped before its first token
    if not answers:
        return []
    render = _Rendering(tokenizer, thinking, {*tokenizer.eos_token_ids, *stop_ids})
    if tokenizer.marks_answers:
        return [render.marked(messages[: answers[-1] + 1], finished)]
    examples: list[Example] = []
    for i in answers:
        prompt, answer = render.answer(messages[: i + 1], finished or i != answers[-1])
        extend(examples, prompt, answer)
    return examples


def extend(examples: list[Example], prompt: Sequence[int], answer: Sequence[int]) -> None:
    """Appends an answer: to the last sequence if the prompt continues it, else as a new one."""
    before = examples[-1] if examples else None
    supervised = np.zeros(len(prompt), bool)
    if before and list(prompt[: len(before)]) == before.tokens.tolist():
        supervised[: len(before)] = before.supervised
        examples.pop()
    tokens = np.array([*prompt, *answer], np.int32)
    examples.append(Example(tokens, np.concatenate([supervised, np.ones(len(answer), bool)])))


@dataclasses.dataclass(frozen=True)
class _Rendering:
    tokenizer: Tokenizer
    thinking: bool | None
    stop_ids: Collection[int]

    def answer(self, messages: Messages, finished: bool) -> tuple[list[int], list[int]]:
        """Token ids of the last message's prompt, and of that message."""
        prompt, answer = self._split(messages, finished)
        content = messages[-1]["content"]
        if self._text(answer) != content:
            left, right = self._padding()
            self._check(left + content + right * finished, answer, len(messages) - 1)
        return prompt, answer

    def marked(self, messages: Messages, finished: bool) -> Example:
        """Tokenizes with the answer marks of the chat template."""
        ids, marks = self.tokenizer.render_marked(messages, thinking=self.thinking)
        tokens, supervised = np.array(ids, np.int32), np.array(marks, bool)
        runs = list(_runs(supervised))
        for start, stop in runs:
            last = (start, stop) == runs[-1]
            kept = len(self._until_stop(ids[start:stop], finished or not last))
            supervised[start + kept : stop] = False
        if runs and not finished:
            end = np.flatnonzero(supervised)[-1] + 1
            tokens, supervised = tokens[:end], supervised[:end]
        contents = [x["content"] for x in messages if x["role"] == ASSISTANT]
        written = [tokens[start:stop].tolist() for start, stop in _runs(supervised)]
        if "".join(map(self._text, written)) != "".join(contents):
            self._check("".join(contents), sum(written, []), len(messages) - 1)
        return Example(tokens, supervised)

    def _split(self, messages: Messages, finished: bool) -> tuple[list[int], list[int]]:
        prompt = self.tokenizer.chat(messages[:-1], thinking=self.thinking)
        whole = self.tokenizer.render(messages, thinking=self.thinking)
        if whole[: len(prompt)] != prompt:
            raise ValueError(
                f"message {len(messages) - 1}: the chat template does not render the answer "
                f"after the prompt that asks for it (thinking is {self.thinking}); was it "
                "written in another mode?"
            )
        return prompt, self._until_stop(whole[len(prompt) :], finished)

    def _until_stop(self, answer: list[int], finished: bool) -> list[int]:
        """Drops what the template adds after the stop id: the target never writes it."""
        stop = next((i for i, x in enumerate(answer) if x in self.stop_ids), None)
        return answer if stop is None else answer[: stop + finished]

    def _padding(self) -> tuple[str, str]:
        """The white space that the template puts around every answer (Llama 2's does)."""
        probe = [{"role": USER, "content": "x"}, {"role": ASSISTANT, "content": "x"}]
        left, _, right = self._text(self._split(probe, True)[1]).partition("x")
        return ("", "") if (left + right).strip() else (left, right)

    def _text(self, answer: Sequence[int]) -> str:
        ended = len(answer) and answer[-1] in self.stop_ids
        return self.tokenizer.decode(answer[:-1] if ended else answer)

    def _check(self, expected: str, answer: Sequence[int], number: int) -> None:
        found = self._text(answer)
        if found == expected:
            return
        same = next(
            (i for i, (x, y) in enumerate(zip(found, expected, strict=False)) if x != y),
            min(len(found), len(expected)),
        )
        start = max(0, same - 20)
        raise ValueError(
            f"message {number}: the chat template renders the answer as other text "
            f"({found[start : same + 20]!r} for {expected[start : same + 20]!r}; thinking is "
            f"{self.thinking})"
        )


def _runs(supervised: np.ndarray) -> Iterator[tuple[int, int]]:
    """Half-open ranges of the tokens that are supervised."""
    edges = np.flatnonzero(np.diff(supervised, prepend=False, append=False))
    return zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def answer_ranges(example: Example) -> list[tuple[int, int]]:
    """Half-open ranges of the tokens the target wrote.

    >>> answer_ranges(Example(np.arange(5), np.array([0, 1, 1, 0, 1], bool)))
    [(1, 3), (4, 5)]
    """
    return list(_runs(example.supervised))
