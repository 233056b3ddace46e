"""Measures the prefix cache on a chat of several turns with one system prompt.

    python -m jaxspec serve --room 2048 --slots 2 &
    python examples/chat_turns.py --model smollm2-135m

Runs the same chat twice, turn by turn. Once all requests share a `cache_salt`, so that every
turn starts from the last prompt's prefix; once every request has its own salt, so that every
prompt is computed in full. Works with any server that supports `cache_salt`, such as vLLM's.
"""

from __future__ import annotations

import dataclasses
import time
import uuid

try:
    import openai
except ModuleNotFoundError:
    raise SystemExit("this script needs openai: pip install openai") from None

from jaxspec.cli import exits

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
    """Options."""

    model: str
    """Model name on the server."""
    url: str = "http://localhost:8000/v1"
    """Of the server."""
    key: str = "none"
    """API key."""
    rules: int = 35
    """Sentences of the system prompt, of about 17 tokens each."""
    max_tokens: int = 48
    """Maximum tokens per answer."""


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


def main(options: Chat) -> None:
    """Runs both chats turn by turn; prints a Markdown table."""
    print(
        "| turn | prompt tokens | of them kept | first token, s | run whole, s | answer, s "
        "| run whole, s |"
    )
    print("|---|---|---|---|---|---|---|", flush=True)
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
            print(f"| {number} | {kept.prompt} | {kept.cached} | {seconds} |", flush=True)
    print("| all | | | " + " | ".join(f"{x:.2f}" for x in sums) + " |")


if __name__ == "__main__":
    exits.script(main, Chat, __doc__)
