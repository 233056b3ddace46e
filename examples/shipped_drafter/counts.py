"""Counts in a data set: how much the target wrote, and the data behind constants.

Of a question only the target's own tokens count, not the opening from `--prompts`. The
constants: how often the token after a match of 1, 2, … tokens is the target's next token
(`drafters.ngram.AGREEMENT`; greedy answers only), and the share of held-out answers (one tenth)
that a draft vocabulary covers (`train --draft-vocab`).

    python examples/shipped_drafter/counts.py --data out/shipped/data.jsonl \
        --prompts out/shipped/prompts.jsonl
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from jaxspec.checkpoints import catalog
from jaxspec.checkpoints.gguf import load_tokenizer
from jaxspec.cli import exits
from jaxspec.data.conversations import Example
from jaxspec.data.jsonl import numbered_lines, parse_object
from jaxspec.data.rows import row_examples
from jaxspec.training.draft_vocabulary import coverage, most_frequent

VOCAB = 49152
LONGEST = 10  # tokens of a match; longer ones count as these


@dataclasses.dataclass(frozen=True)
class Counts:
    data: Path
    """JSON lines, as `regenerate` writes them."""
    prompts: Path | None = None
    """What they answer, as `prompts.py` writes it; needed to count questions."""
    answers: int = 240
    """Greedy answers in which matches are looked for."""
    sizes: tuple[int, ...] = (4096, 8192, 12288, 16384, 24576)
    """Of draft vocabularies."""
    seed: int = 0


def main(options: Counts) -> None:
    tokenizer = load_tokenizer(catalog.smollm2())
    rows = [parse_object(line) for _, line in numbered_lines(options.data)]
    answered = sum(row["metadata"]["new_tokens"] for row in rows)
    print(f"{len(rows):,} conversations, {answered:,} tokens of answers by the target")
    if options.prompts is not None:
        prompts = [json.loads(line) for _, line in numbered_lines(options.prompts)]
        asked = question_tokens(tokenizer, rows, {prompt["id"]: prompt for prompt in prompts})
        print(f"{asked:,} tokens of questions by the target, {answered + asked:,} in all")
    np.random.default_rng(options.seed).shuffle(rows)

    def examples(rows: Iterable[dict]) -> list[Example]:
        return [x for row in rows for x in row_examples(row, tokenizer, vocab=VOCAB)]

    greedy = [row for row in rows if not row["metadata"]["temperature"]][: options.answers]
    matches, agreed = agreement(examples(greedy))
    print("length of match  places  next token agrees")
    for length in range(LONGEST + 1):
        share = agreed[length] / max(matches[length], 1)
        print(f"{length:15d}  {matches[length]:6d}  {share:17.3f}")

    seen = examples(rows)
    tenth = len(seen) // 10
    print("draft vocabulary  held-out tokens covered")
    for size in options.sizes:
        kept = most_frequent(seen[tenth:], size, vocab=VOCAB)
        print(f"{size:16d}  {coverage(seen[:tenth], kept, vocab=VOCAB):23.4f}")


def question_tokens(tokenizer, rows: list[dict], prompts: dict[int, dict]) -> int:
    """Tokens that the target wrote between a prompt's opening and ending; 0 for a given one.

    Raises:
      ValueError: a conversation's question is not of its prompt.
    """
    total = 0
    for row in rows:
        prompt, asked = prompts.get(row["id"]), row["conversations"][0]["content"]
        if prompt is None:
            raise ValueError(f"conversation {row['id']} answers none of the prompts")
        if "opening" not in prompt:
            continue
        start, end = prompt["opening"].lstrip(), prompt.get("ending", "")
        if not asked.startswith(start) or not asked.endswith(end):
            raise ValueError(f"conversation {row['id']} does not begin with {start!r}")
        total += len(tokenizer.encode(asked[len(start) : len(asked) - len(end)]))
    return total


def agreement(examples: Iterable[Example]) -> tuple[np.ndarray, np.ndarray]:
    """Places by the length of their longest earlier match, the latest of equally long ones, and
    those where what followed the match follows again: [LONGEST + 1] each."""
    matches, agreed = np.zeros((2, LONGEST + 1), int)
    for example in tqdm(examples, unit="answer"):
        tokens = example.tokens
        for last in np.flatnonzero(example.supervised) - 1:  # never 0: a prompt is longer
            length = np.zeros(last, int)  # of the match that ends at each earlier place
            unbroken = np.ones(last, bool)
            for back in range(min(LONGEST, last)):
                unbroken[:back] = False
                unbroken[back:] &= tokens[: last - back] == tokens[last - back]
                length += unbroken
            end = last - 1 - np.argmax(length[::-1])
            matches[length[end]] += 1
            agreed[length[end]] += tokens[end + 1] == tokens[last + 1]
    return matches, agreed


if __name__ == "__main__":
    exits.script(main, Counts, __doc__)
