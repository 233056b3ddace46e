"""Finds the fastest setting here: every drafter in both dtypes, fixed and adaptive.

    python examples/defaults.py

All settings answer the same prompts in turn, and each answer's minimum time over the repeats
counts: interference only adds time. Float32 answers must equal plain decoding's.
"""

import dataclasses
from pathlib import Path

import jaxspec
from jaxspec.cli import exits
from jaxspec.data.prompts import read_prompts
from jaxspec.drafters.joined import with_survival

PROMPTS = (
    "Write a Python function that reverses a list.",
    "Why is the sky blue?",
    "Translate to French: the cat sleeps on the warm stones of the old wall.",
    "Repeat this sentence three times: the quick brown fox jumps over the lazy dog.",
)
DRAFTERS = ("none", "ngram", "shipped+ngram")


@dataclasses.dataclass(frozen=True)
class Options:
    """Options."""

    target: str = "smollm2-135m"
    """As for `jaxspec generate`."""
    prompts: Path | None = None
    """Prompts, in any format of docs/training.md; a few short ones by default."""
    nodes: int = 8
    """Nodes verified per round, root included."""
    max_new_tokens: int = 96
    """Of an answer."""
    repeats: int = 3
    """Timed answers to each prompt."""


def ways(options: Options, prompts):
    """Targets and options of `generate`, by dtype, drafter and schedule."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        target = jaxspec.load_target(options.target, dtype=dtype)
        for name in DRAFTERS:
            drafter = with_survival(jaxspec.load_drafter(name, target, nodes=options.nodes))
            shared = dict(drafter=drafter, max_new_tokens=options.max_new_tokens, batch_size=1)
            budgets = {"fixed": None}
            if drafter.drafter.size > 1:
                budgets["adaptive"] = jaxspec.measure_pace(target, prompts, **shared)
            for schedule, budget in budgets.items():
                run = dict(shared, budget=budget)
                if budget is None:
                    run["capacity"] = jaxspec.warm_up(target, prompts, **run)
                found[dtype, name, schedule] = target, run
    return found


def main(options: Options) -> None:
    prompts = read_prompts(options.prompts) if options.prompts else PROMPTS
    jaxspec.enable_compilation_cache()
    seconds, answers = {}, {}
    runs = ways(options, prompts)
    for _ in range(options.repeats + 1):  # the first may compile
        for prompt in prompts:
            for way, (target, run) in runs.items():
                (done,) = jaxspec.generate(target, [prompt], **run)
                seconds.setdefault((way, prompt), []).append(done.seconds)
                answers[way, prompt] = done
    print("| dtype | drafter | schedule | tokens/s | against plain float32 | tau | equal |")
    print("|---|---|---|---|---|---|---|")
    rates = {}
    for way in runs:
        own = [answers[way, prompt] for prompt in prompts]
        tokens = sum(len(done.token_ids) for done in own)
        rates[way] = tokens / sum(min(seconds[way, p][1:]) for p in prompts)
        plain = [answers[(way[0], "none", "fixed"), prompt] for prompt in prompts]
        equal = sum(x.token_ids == y.token_ids for x, y in zip(own, plain, strict=True))
        rounds = sum(done.stats.rounds for done in own)
        tau = sum(sum(done.stats.committed) for done in own) / rounds
        gain = rates[way] / rates["float32", "none", "fixed"]
        cells = (*way, f"{rates[way]:.1f}", f"{gain:.2f}x", f"{tau:.2f}", f"{equal}/{len(own)}")
        print("|", " | ".join(cells), "|")


if __name__ == "__main__":
    exits.script(main, Options, __doc__)
