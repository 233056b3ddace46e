"""Plain and speculative decoding side by side: the same text, in fewer forwards.

    python examples/generate.py "Why is the sky blue?"

First in the dtype that is fastest here, where near-ties may flip; then in float32, where the
tokens must be equal.
"""

import dataclasses

import tyro
from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel

import jaxspec
from jaxspec.cli import exits
from jaxspec.dtypes import fastest

TURNS = 2  # runs of each, alternating; the minimum time counts


@dataclasses.dataclass(frozen=True)
class Options:
    """Options."""

    prompt: tyro.conf.Positional[str] = "Write a Python function that reverses a list."
    """A user's turn."""
    target: str = "smollm2-135m"
    """As for `jaxspec generate`."""
    drafter: str = "shipped+ngram"
    """ngram, shipped, small:NAME or a trained drafter; +ngram adds prompt lookup."""
    nodes: int = 8
    """Nodes verified per round, root included."""
    max_new_tokens: int = 200
    """Of an answer."""


def both(options: Options, dtype: str, say) -> dict:
    """Plain and drafted answers in a dtype; `say` shows what is going on."""
    say(f"{dtype}: weights")
    target = jaxspec.load_target(options.target, dtype=dtype)
    drafter = jaxspec.load_drafter(options.drafter, target, nodes=options.nodes)
    runs = {"plain": dict(drafter="none"), options.drafter: dict(drafter=drafter)}
    shared = dict(batch_size=1, max_new_tokens=options.max_new_tokens)
    for name, run in runs.items():
        say(f"{dtype}: compiling {name} decoding, kept for the next time")
        jaxspec.warm_up(target, options.prompt, **shared, **run)
    say(f"{dtype}: decoding")
    done = {}
    for _ in range(TURNS):
        for name, run in runs.items():
            (answer,) = jaxspec.generate(target, options.prompt, **shared, **run)
            done[name] = min(done.get(name, answer), answer, key=lambda x: x.seconds)
    return done


def main(options: Options) -> int:
    jaxspec.enable_compilation_cache()
    console, chosen = Console(), fastest()
    console.print(Panel(options.prompt, title="prompt"))
    equal, rates = True, {}
    for dtype in dict.fromkeys((chosen.dtype, "float32")):
        with console.status("") as status:
            done = both(options, dtype, status.update)
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
    return exits.DONE if equal else exits.FAULT


if __name__ == "__main__":
    exits.script(main, Options, __doc__)
