"""What keeping prompts' prefixes is worth: a chat of several turns behind one system prompt.

    python -m jaxspec serve --room 2048 --slots 2 &
    python examples/chat_turns.py --model smollm2-135m

The same chat is held twice in turn. Once all its requests share a `cache_salt`, so that every
turn begins where the last prompt ended; once every request has one of its own, so that nothing
is found and every prompt is run whole. Works with any server that knows `cache_salt`, vLLM's
too.
"""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Iterator

import openai
import tyro

RULES = "Answer in plain words, name what you are not sure of, and never repeat the question. "
QUESTIONS = (
    "Why is the sky blue?",
    "And why is it red in the evening?",
    "What would it look like from the Moon?",
    "Who found out about this first?",
    "Explain it to a child of six.",
    "What would change on Mars?",
    "Does the sea have its colour from the sky?",
    "Sum up what we have said.",
)


@dataclasses.dataclass(frozen=True)
class Chat:
    """Measure a running server."""

    model: str
    """As the server calls it."""
    url: str = "http://localhost:8000/v1"
    key: str = "none"
    """API key."""
    rules: int = 35
    """Sentences of the system prompt, of about 17 tokens each."""
    max_tokens: int = 48
    """Of an answer."""


@dataclasses.dataclass(frozen=True)
class Turn:
    """One request as its user saw it."""

    prompt: int
    cached: int
    first: float  # seconds to the first token
    total: float
    text: str


def ask(client: openai.OpenAI, options: Chat, messages: list[dict], salt: str) -> Turn:
    began, first, pieces, usage = time.perf_counter(), None, [], None
    stream = client.chat.completions.create(
        model=options.model,
        messages=messages,
        max_tokens=options.max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"cache_salt": salt},
    )
    for chunk in stream:
        usage = chunk.usage or usage
        text = chunk.choices[0].delta.content if chunk.choices else None
        if text:
            first = first or time.perf_counter() - began
            pieces.append(text)
    details = usage.prompt_tokens_details
    cached = details.cached_tokens if details else 0
    total = time.perf_counter() - began
    return Turn(usage.prompt_tokens, cached or 0, first or total, total, "".join(pieces))


def main(options: Chat) -> Iterator[str]:
    """Holds both chats turn by turn; the rows of a table in Markdown."""
    yield (
        "| turn | prompt tokens | of them kept | first token, s | run whole, s | answer, s "
        "| run whole, s |"
    )
    yield "|---|---|---|---|---|---|---|"
    messages = [{"role": "system", "content": RULES * options.rules}]
    shared, sums = uuid.uuid4().hex, [0.0] * 4
    with openai.OpenAI(base_url=options.url, api_key=options.key, timeout=600) as client:
        for number, question in enumerate(QUESTIONS, 1):
            messages.append({"role": "user", "content": question})
            whole = ask(client, options, messages, uuid.uuid4().hex)
            kept = ask(client, options, messages, shared)
            if whole.text != kept.text:
                print(f"turn {number}: the answers differ, as they may in bfloat16")
            messages.append({"role": "assistant", "content": kept.text})
            times = [kept.first, whole.first, kept.total, whole.total]
            sums = [x + y for x, y in zip(sums, times, strict=True)]
            seconds = " | ".join(f"{x:.2f}" for x in times)
            yield f"| {number} | {kept.prompt} | {kept.cached} | {seconds} |"
    yield "| all | | | " + " | ".join(f"{x:.2f}" for x in sums) + " |"


if __name__ == "__main__":
    for row in main(tyro.cli(Chat)):
        print(row, flush=True)
