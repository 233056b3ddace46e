"""Conversations for the target to answer: given questions, or those it writes itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jaxspec.data.conversations import Example
from jaxspec.data.messages import USER
from jaxspec.data.messages import read_text as message_text
from jaxspec.data.prompts import row_turns
from jaxspec.data.sources import Source, open_source


@dataclasses.dataclass(frozen=True)
class Opening:
    """The beginning of a question that the target completes.

    Attributes:
      text: its first words; empty if the target writes the whole question.
      ending: text appended to the target's completion.
    """

    text: str = ""
    ending: str = ""

    def fits(self, question: str) -> bool:
        """Whether a question could be a completion of this opening."""
        return question.startswith(self.text.lstrip()) and question.endswith(self.ending)


@dataclasses.dataclass
class Job:
    """A conversation that the target is answering.

    Attributes:
      number: index in the input, from which its random keys are derived.
      messages: the conversation so far.
      turns: user turns still to be asked; the target itself completes an `Opening`.
      error: why the row cannot be used; "" if it can.
      prompt: token ids of the last request.
      sequences: token ids of all answers with their prompts.
      finished: whether the last answer ended with a stop id.
    """

    id: Any
    number: int
    messages: list[dict[str, str]]
    turns: list[str | Opening]
    error: str = ""
    prompt: list[int] = dataclasses.field(default_factory=list)
    sequences: list[Example] = dataclasses.field(default_factory=list)
    finished: bool = True
    new_tokens: int = 0

    def asked(self, conversation: list[dict[str, str]]) -> bool:
        """Whether a finished conversation answers this job; valid before its first turn."""
        given = [x for x in conversation if x["role"] != "assistant"]
        turns = [x["content"] for x in given[len(self.messages) :] if x["role"] == USER]
        return (
            given[: len(self.messages)] == self.messages
            and len(turns) == len(self.turns)
            and all(
                turn.fits(said) if isinstance(turn, Opening) else turn == said
                for turn, said in zip(self.turns, turns, strict=True)
            )
        )


def read_jobs(*sources: str | Path | Source) -> list[Job]:
    """Conversations to answer.

    A row is {"turns": [...]}, {"prompt": ...}, {"question": ...}, a conversation whose answers
    are dropped (`prompts.row_turns`), or {"opening": ..., "ending": ...}, a question the target
    writes between the two. A row without "id" gets its index in the source, prefixed by
    "LABEL-" if there are several sources. Any other row becomes a job with an error.

    Raises:
      ValueError: a source cannot be read, two rows have the same id, or no row can be used.
    """
    jobs: dict[Any, Job] = {}
    sources = tuple(map(open_source, sources))
    for source in sources:
        for row in source:
            name = row.number if len(sources) == 1 else f"{source.label}-{row.number}"
            job = Job(name, len(jobs), [], [])
            try:
                job.id = _id(row.fields.get("id", name))
                job.messages, job.turns = _turns(row.fields)
            except ValueError as error:
                job.error = f"{row.where}: {error}"
            if job.id in jobs:
                raise ValueError(
                    f"{row.where}: id {job.id!r} occurs twice; expected a unique id per row"
                )
            jobs[job.id] = job
    if not jobs:
        raise ValueError(
            f"{', '.join(x.name for x in sources)}: no prompts found; expected one JSON object "
            "per line"
        )
    if all(job.error for job in jobs.values()):
        raise ValueError(next(iter(jobs.values())).error)
    return list(jobs.values())


def own_questions(count: int) -> list[Job]:
    """`count` conversations whose questions the target writes itself."""
    return [Job(number, number, [], [Opening()]) for number in range(count)]


def _id(value: Any) -> str | int:
    if type(value) not in (str, int):
        raise ValueError(f"'id' is {value!r}; expected text or a whole number")
    return message_text(value, "'id'") if isinstance(value, str) else value


def _turns(row: dict[str, Any]) -> tuple[list[dict[str, str]], list[str | Opening]]:
    """System messages, and the user's turns."""
    if "opening" not in row:
        return row_turns(row)
    text, ending = (
        message_text(row.get(name, ""), f"'{name}'") for name in ("opening", "ending")
    )
    return [], [Opening(text, ending)]
