"""Measures an OpenAI-compatible server under load: tokens per second, and waiting times.

    python -m jaxspec serve --port 8000 &
    python examples/load_server.py --url http://localhost:8000/v1 --model smollm2-135m \
        --users 1 4 16 --rates 0.5 2

`--users` sends a new request whenever one is answered; `--rates` sends requests at random
times, with this mean rate per second, however long answers take. Works with any server that
streams completions, such as vLLM's, so that servers can be compared.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from pathlib import Path

# The module beside this script.
from load import Summary, arrivals, closed_loop, mix, open_loop, summarise, to_server

from jaxspec.cli import exits
from jaxspec.data.prompts import read_prompts

try:
    import openai
except ModuleNotFoundError:
    raise SystemExit("this script needs openai: pip install openai") from None

PROMPTS = ("Why is the sky blue?", "Name three prime numbers.", "What is a tree?")


@dataclasses.dataclass(frozen=True)
class Load:
    """Measure a running server."""

    model: str
    """Model name on the server."""
    url: str = "http://localhost:8000/v1"
    key: str = "none"
    """API key."""
    prompts: Path | None = None
    """JSON lines of prompts, each sent equally often; a few questions if left out."""
    users: tuple[int, ...] = (1, 4)
    """Numbers of users who each wait for their answer before they ask again."""
    rates: tuple[float, ...] = ()
    """Requests per second that arrive independently of the answers."""
    requests: int = 32
    """Sent at each load."""
    max_new_tokens: int = 64
    temperature: float = 0.0


def main(options: Load) -> str:
    """Runs every load in turn; the table of results, in Markdown."""
    texts = list(PROMPTS) if options.prompts is None else read_prompts(options.prompts)
    asked = [
        dict(prompt=text, max_tokens=options.max_new_tokens, temperature=options.temperature)
        for text in mix(texts, options.requests)
    ]
    rows = asyncio.run(measured(options, asked))
    lines = ["| load | tokens/s | s to the first token, 50/90/99% | ms per token | failed |"]
    lines.append("|" + "---|" * 5)
    for name, found in rows:
        first = " / ".join(f"{x:.2f}" for x in found.first_token)
        each = " / ".join(f"{1e3 * x:.1f}" for x in found.per_token)
        rate = f"{found.tokens_per_second:.1f}"
        lines.append(f"| {name} | {rate} | {first} | {each} | {found.failed} |")
    return "\n".join(lines)


async def measured(options: Load, asked: Sequence[dict]) -> list[tuple[str, Summary]]:
    rows = []
    async with openai.AsyncOpenAI(base_url=options.url, api_key=options.key) as client:
        send = to_server(client, options.model)
        for users in options.users:
            seen = await closed_loop(send, asked, users)
            rows.append((f"{users} users", summarise(seen)))
        for rate in options.rates:
            seen = await open_loop(send, asked, arrivals(rate, len(asked)))
            rows.append((f"{rate:g} requests/s", summarise(seen)))
    return rows


if __name__ == "__main__":
    exits.script(lambda options: print(main(options)), Load, __doc__)
