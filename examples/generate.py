"""Plain and speculative decoding side by side: the same text, in fewer forwards.

python examples/generate.py [PROMPT] [--target T] [--drafter D] [--nodes N] [--max-new-tokens N]
"""

import argparse

from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel

import jaxspec

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
parser.add_argument("--nodes", type=int, default=8, help="verified per round, root included")
parser.add_argument("--max-new-tokens", type=int, default=200)
args = parser.parse_args()

jaxspec.enable_compilation_cache()
target = jaxspec.load_target(args.target)
tree = jaxspec.TreeConfig("path_conditioned", size=args.nodes)
runs = {}
for name in ("none", args.drafter):
    drafter = jaxspec.load_drafter(name, target, tree=tree)
    options = dict(drafter=drafter, max_new_tokens=args.max_new_tokens)
    jaxspec.warm_up(target, args.prompt, **options)
    (runs[name],) = jaxspec.generate(target, args.prompt, **options)

speed = {name: len(run.token_ids) / run.seconds for name, run in runs.items()}
console = Console()
panels = [
    Panel(run.text, title=name, subtitle=f"tau {run.stats.tau:.2f}, {speed[name]:.1f} tokens/s")
    for name, run in runs.items()
]
console.print(Panel(args.prompt, title="prompt"), Columns(panels, equal=True, expand=True))
plain, speculative = runs.values()
same = "the same tokens" if plain.token_ids == speculative.token_ids else "OTHER TOKENS"
console.print(
    f"{same}; {plain.stats.rounds} forwards became {speculative.stats.rounds}; "
    f"{speed[args.drafter] / speed['none']:.2f}x the speed of plain decoding"
)
