"""Plain and speculative decoding side by side: the same text, in fewer forwards.

python examples/generate.py [PROMPT] [--target T] [--drafter D] [--nodes N] [--max-new-tokens N]

First in the dtype that is fastest here, where near-ties may flip; then in float32, where the
tokens must be equal.
"""

import argparse
import sys

from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel

import jaxspec
from jaxspec.dtypes import fastest

TURNS = 2  # runs of each, alternating; the minimum time counts


def both(args, dtype, say):
    """Plain and drafted answers in a dtype; `say` shows what is going on."""
    say(f"{dtype}: weights")
    target = jaxspec.load_target(args.target, dtype=dtype)
    drafter = jaxspec.load_drafter(args.drafter, target, nodes=args.nodes)
    runs = {"plain": dict(drafter="none"), args.drafter: dict(drafter=drafter)}
    shared = dict(batch_size=1, **args.length)
    for name, options in runs.items():
        say(f"{dtype}: compiling {name} decoding, kept for the next time")
        jaxspec.warm_up(target, args.prompt, **shared, **options)
    say(f"{dtype}: decoding")
    done = {}
    for _ in range(TURNS):
        for name, options in runs.items():
            (answer,) = jaxspec.generate(target, args.prompt, **shared, **options)
            done[name] = min(done.get(name, answer), answer, key=lambda x: x.seconds)
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "prompt", nargs="?", default="Write a Python function that reverses a list."
    )
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument(
        "--drafter",
        default="shipped+ngram",
        help="ngram | shipped | small:NAME | a trained drafter; +ngram adds lookup",
    )
    parser.add_argument(
        "--nodes", type=int, default=8, help="verified per round, root included"
    )
    parser.add_argument("--max-new-tokens", type=int, default=200)
    args = parser.parse_args()
    args.length = {"max_new_tokens": args.max_new_tokens}

    jaxspec.enable_compilation_cache()
    console, chosen = Console(), fastest()
    console.print(Panel(args.prompt, title="prompt"))
    equal, rates = True, {}
    for dtype in dict.fromkeys((chosen.dtype, "float32")):
        with console.status("") as status:
            done = both(args, dtype, status.update)
        plain, drafted = done.values()
        speed = plain.seconds / len(plain.token_ids) * len(drafted.token_ids) / drafted.seconds
        if dtype == chosen.dtype:
            panels = []
            for name, answer in done.items():
                rate, tau = answer.tokens_per_second, answer.stats.tau
                below = f"{rate:.1f} tokens/s, tau {tau:.2f}"
                panels.append(Panel(answer.text, title=f"{name}, {dtype}", subtitle=below))
            console.print(Columns(panels, equal=True, expand=True))
        rates[dtype] = plain.tokens_per_second, drafted.tokens_per_second
        same = plain.token_ids == drafted.token_ids
        equal &= same or dtype != "float32"
        tokens = "the same tokens" if same else "other tokens (near-ties)"
        if dtype == "float32":
            tokens = "the same tokens, as it must be" if same else "OTHER TOKENS: a fault"
        console.print(
            f"{dtype}: {plain.stats.rounds} forwards became {drafted.stats.rounds}, "
            f"{speed:.2f}x plain decoding's speed; {tokens}"
        )
    plain, drafted = (max(column) for column in zip(*rates.values(), strict=True))
    console.print(
        f"fastest of both: plain {plain:.1f} tokens/s, drafted {drafted:.1f}: "
        f"{drafted / plain:.2f}x"
    )
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
