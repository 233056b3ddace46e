"""Finds the fastest setting here: every drafter in both dtypes, fixed and adaptive.

python examples/defaults.py [--prompts FILE.jsonl] [--repeats N]

All settings answer the same prompts in turn, and each answer's minimum time over the repeats
counts: interference only adds time. Float32 answers must equal plain decoding's.
"""

import argparse
from pathlib import Path

import jaxspec
from jaxspec.data.prompts import read_prompts
from jaxspec.drafters.joined import with_survival

PROMPTS = (
    "Write a Python function that reverses a list.",
    "Why is the sky blue?",
    "Translate to French: the cat sleeps on the warm stones of the old wall.",
    "Repeat this sentence three times: the quick brown fox jumps over the lazy dog.",
)
DRAFTERS = ("none", "ngram", "shipped+ngram")


def ways(options):
    """Functions that answer a prompt, by dtype, drafter and schedule."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        target = jaxspec.load_target(options.target, dtype=dtype)
        for name in DRAFTERS:
            drafter = with_survival(jaxspec.load_drafter(name, target, nodes=options.nodes))
            shared = dict(drafter=drafter, max_new_tokens=options.max_new_tokens, batch_size=1)
            budgets = {"fixed": None}
            if drafter.drafter.size > 1:
                budgets["adaptive"] = jaxspec.measure_pace(target, options.prompts, **shared)
            for schedule, budget in budgets.items():
                run = dict(shared, budget=budget)
                if budget is None:
                    run["capacity"] = jaxspec.warm_up(target, options.prompts, **run)
                found[dtype, name, schedule] = target, run
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--prompts", type=Path, help="JSON lines; a few short ones by default")
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    options.prompts = read_prompts(options.prompts) if options.prompts else PROMPTS
    jaxspec.enable_compilation_cache()
    seconds, answers = {}, {}
    runs = ways(options)
    for _ in range(options.repeats + 1):  # the first may compile
        for prompt in options.prompts:
            for way, (target, run) in runs.items():
                (done,) = jaxspec.generate(target, [prompt], **run)
                seconds.setdefault((way, prompt), []).append(done.seconds)
                answers[way, prompt] = done
    print("| dtype | drafter | schedule | tokens/s | against plain float32 | tau | equal |")
    print("|---|---|---|---|---|---|---|")
    rates = {}
    for way in runs:
        own = [answers[way, prompt] for prompt in options.prompts]
        tokens = sum(len(done.token_ids) for done in own)
        rates[way] = tokens / sum(min(seconds[way, p][1:]) for p in options.prompts)
        plain = [answers[(way[0], "none", "fixed"), prompt] for prompt in options.prompts]
        equal = sum(x.token_ids == y.token_ids for x, y in zip(own, plain, strict=True))
        rounds = sum(done.stats.rounds for done in own)
        tau = sum(sum(done.stats.committed) for done in own) / rounds
        gain = rates[way] / rates["float32", "none", "fixed"]
        cells = (*way, f"{rates[way]:.1f}", f"{gain:.2f}x", f"{tau:.2f}", f"{equal}/{len(own)}")
        print("|", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
