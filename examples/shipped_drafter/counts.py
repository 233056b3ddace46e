"""Two facts of a data set that constants rest on, counted.

How often the token after a match of 1, 2, … tokens is the target's own next
(`drafters.ngram.AGREEMENT`), and how much of held-out answers a draft vocabulary covers
(`train --draft-vocab`). Greedy answers only for the first, one tenth held out for the second.

    python examples/shipped_drafter/counts.py --data out/shipped/data.jsonl
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tyro
from tqdm import tqdm

from checkpoints import catalog
from checkpoints.gguf import load_tokenizer
from jaxspec.training.conversations import Example, encode, read
from jaxspec.training.draft_vocabulary import coverage, most_frequent

VOCAB = 49152
LONGEST = 10  # tokens of a match; longer ones count as these


@dataclasses.dataclass(frozen=True)
class Counts:
    data: Path
    """JSON lines, as `regenerate` writes them."""
    answers: int = 240
    """Greedy answers in which matches are looked for."""
    sizes: tuple[int, ...] = (4096, 8192, 12288, 16384, 24576)
    """Of draft vocabularies."""
    seed: int = 0


def main(options: Counts) -> None:
    tokenizer = load_tokenizer(catalog.smollm2())
    rows = list(read(options.data))
    np.random.default_rng(options.seed).shuffle(rows)

    def examples(rows: Iterable[dict]) -> list[Example]:
        return [example for row in rows for example in encode(tokenizer, row["conversations"])]

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
    main(tyro.cli(Counts, description=__doc__))
