"""The prompts that the shipped drafter's training data answers, as JSON lines.

    python examples/shipped_drafter/prompts.py --output data/prompts.jsonl
    python -m jaxspec regenerate --prompts data/prompts.jsonl --output data/answers.jsonl \
        --rows 64 --max-new-tokens 256 --max-length 640 --temperature 0.7 --sampled 0.2

Three sources, none of them an evaluation prompt: training prompts of public sets (`--folder`,
GSM8K's training questions and Arena-Hard: see Prompts in README.md), tasks made by rule
(reasoning-gym), and openings that the target completes ("Write a python function to …").
Everything follows from the seed, except that reasoning-gym's polynomials also depend on
$PYTHONHASHSEED. Rows are shuffled, so that any prefix has the same mixture.
"""

import dataclasses
import json
import random
from pathlib import Path

from jaxspec.cli import exits
from jaxspec.data.jsonl import numbered_lines

PROMPTS = Path(__file__).parents[2].parent / "shared" / "prompts" / "train"
STEPS = "\nPlease reason step by step, and put your final answer within \\boxed{}."
LONGEST = 1200  # characters of a prompt

COUNTS = dict(gsm8k=4200, arena=650, rules=1300, math=1500, code=3300, chat=1500)

TASKS = (
    "simple_equations gcd lcm fraction_simplification chain_sum simple_geometry "
    "calendar_arithmetic number_sequence prime_factorization complex_arithmetic leg_counting "
    "basic_arithmetic products dice count_primes family_relationships syllogism coin_flip "
    "simple_integration polynomial_multiplication advanced_geometry"
).split()

MATH = (
    "Find the value of $",
    "What is the remainder when $",
    "Compute $",
    "Let $f(x) =",
    "Simplify $",
    "Solve for $x$:",
    "How many positive integers",
    "What is the area of",
    "A circle",
    "In triangle $ABC$,",
    "The sum of",
    "Find all real",
    "If $",
    "Express $",
    "What is the probability that",
    "Evaluate",
    "How many different ways",
    "The equation of",
    "Let $a$ and $b$ be",
    "What is the smallest",
)
FUNCTION = (
    "Write a python function to",
    "Write a function to",
    "Write a function that",
    "Write a python function to find",
    "Write a function to check whether",
    "Write a function to find the",
    "Write a function to convert",
    "Write a function to count",
    "Write a function to remove",
    "Write a function to sort a list",
    "Write a function to calculate",
    "Write a python function to check whether the given",
    "Write a Python program that",
    "Implement a function in Python that",
)
PROBLEM = "Write a solution to the following problem and make sure that it passes the tests:\n"
VERBS = (
    "find count remove sort filter get is check sum max min reverse merge split parse".split()
)
NOUNS = (
    "numbers words string list even odd digits vowels primes pairs elements unique "
    "duplicates longest shortest common index matrix brackets prefix suffix"
).split()
ARGUMENTS = (
    "numbers: List[int]) -> int:",
    "numbers: List[int]) -> List[int]:",
    "s: str) -> str:",
    "text: str) -> int:",
    "n: int) -> int:",
    "n: int) -> bool:",
    "lst):",
    "a, b):",
    "words: List[str]) -> List[str]:",
    "x: int, y: int) -> int:",
)
CHAT = (
    "Explain",
    "What is the difference between",
    "How do I",
    "How can I",
    "Why",
    "Write a short story about",
    "Write an email to",
    "Compose a",
    "Describe",
    "What are the",
    "Can you",
    "Give me",
    "I have a",
    "Imagine you are",
    "Write a blog post about",
    "Summarize",
    "Compare",
    "Suggest",
    "Who was",
    "",
)


def rows(folder: Path, rng: random.Random) -> list[dict]:
    """Every prompt: {"turns": [text]} or {"opening": text}, with what it came from."""
    gsm8k = turns(folder / "gsm8k.jsonl")
    rng.shuffle(gsm8k)
    # Half as the evaluation words it, half as it stands.
    asked = [text + STEPS * (i % 2) for i, text in enumerate(gsm8k[: COUNTS["gsm8k"]])]
    arena = turns(folder / "arena-hard.jsonl")[: COUNTS["arena"]]
    made = [
        *({"source": "gsm8k", "turns": [text]} for text in asked),
        *({"source": "arena-hard", "turns": [text]} for text in arena),
        *({"source": f"reasoning-gym/{name}", "turns": [text]} for name, text in by_rule()),
    ]
    for source, openings in (("math", MATH), ("code", None), ("chat", CHAT)):
        for i in range(COUNTS[source]):
            opening = code(i, rng) if openings is None else openings[i % len(openings)]
            made.append({"source": f"own/{source}", "opening": opening})
            if source == "math":
                made[-1]["ending"] = STEPS
    return [row for row in made if len(row.get("turns", [""])[0]) <= LONGEST]


def turns(path: Path) -> list[str]:
    """The first turn of every row."""
    return [json.loads(line)["turns"][0] for _, line in numbered_lines(path)]


def by_rule() -> list[tuple[str, str]]:
    """Tasks of reasoning-gym, the same number of each."""
    import reasoning_gym

    each = -(-COUNTS["rules"] // len(TASKS))
    return [
        (name, item["question"] + (STEPS if i % 2 else ""))
        for name in TASKS
        for i, item in enumerate(reasoning_gym.create_dataset(name, size=each, seed=0))
    ]


def code(i: int, rng: random.Random) -> str:
    """How a coding question begins: in words, or as a signature with a docstring to come."""
    if i % 2:
        return FUNCTION[i // 2 % len(FUNCTION)]
    name = f"{rng.choice(VERBS)}_{rng.choice(NOUNS)}"
    typing = "from typing import List\n\n\n" if rng.random() < 0.5 else "\n\n"
    return f'{PROBLEM}```python\n{typing}def {name}({rng.choice(ARGUMENTS)}\n    """'


@dataclasses.dataclass(frozen=True)
class Options:
    """Options."""

    output: Path
    """File to write."""
    folder: Path = PROMPTS
    """Of the training prompts: gsm8k.jsonl and arena-hard.jsonl."""
    seed: int = 0


def main(options: Options) -> None:
    rng = random.Random(options.seed)
    try:
        made = rows(options.folder, rng)
    except ValueError as error:
        raise ValueError(f"{error}; --folder names the one of training prompts") from error
    rng.shuffle(made)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", encoding="utf-8") as lines:
        for i, row in enumerate(made):
            lines.write(json.dumps({"id": i, **row}) + "\n")
    print(f"{options.output}: {len(made)} prompts")


if __name__ == "__main__":
    exits.script(main, Options, __doc__)
