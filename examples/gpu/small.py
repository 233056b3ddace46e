"""Times the real small target with the shipped drafter: plain decoding and every tree.

    python examples/gpu/small.py --prompts prompts.jsonl --trees chain8 top_budget64

Prompts one after the other (batch 1), greedy; tokens per second of the whole generation, prompt
included. In float32 every output must equal plain decoding's; bfloat16 may flip near-ties, and
the row says how many outputs are equal.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import sys
from pathlib import Path

import jax.numpy as jnp
import timing
from shapes import MODELS, Weights, block_drafter, case_parts, dtype_here

import jaxspec
from jaxspec.api import generate, warm_up
from jaxspec.config import TREE_KINDS, TreeConfig
from jaxspec.data.prompts import read_prompts, spread
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.drafters.plain import PLAIN
from jaxspec.models.target import Target

BUILT_IN = (
    "Natalia sold clips to 48 of her friends in April, and half as many in May. How many clips "
    "did she sell altogether in April and May?",
    "Write a Python function that returns the n-th Fibonacci number, with an example.",
    "Explain in three sentences why the sky is blue.",
    "List the planets of the solar system in order, and one fact about each.",
)
WIDTH = 4


def completions(target: Target, prompts: list, drafter: LoadedDrafter, new_tokens: int):
    """Each prompt's completion, the median time of its repeats and the programs' capacity."""
    options = dict(drafter=drafter, max_new_tokens=new_tokens)
    capacity = warm_up(target, prompts, batch_size=1, **options)
    found = []
    for prompt in prompts:
        runs = [
            generate(target, prompt, capacity=capacity, **options)[0]
            for _ in range(1 + timing.REPEATS)
        ][1:]
        found.append((runs[0], statistics.median(run.seconds for run in runs)))
    return found


def row(found: list, plain: list | None, strict: bool) -> dict:
    tokens = sum(len(done.token_ids) for done, _ in found)
    rounds = sum(done.stats.rounds for done, _ in found)
    seconds = sum(spent for _, spent in found)
    made = dict(
        tokens=tokens,
        tokens_per_second=round(tokens / seconds, 1),
        # A prompt's own forward decides its first token.
        tau=round((tokens - len(found)) / rounds, 3),
        ms=round(1e3 * seconds / rounds, 4),
    )
    if plain is not None:
        pairs = zip(found, plain, strict=True)
        equal = sum(ours.token_ids == right.token_ids for (ours, _), (right, _) in pairs)
        if strict and equal < len(found):
            raise AssertionError(f"{len(found) - equal} outputs differ from plain decoding's")
        # Of tokens per second: in bfloat16 outputs may differ, and then their lengths do.
        usual = sum(len(done.token_ids) for done, _ in plain) / sum(s for _, s in plain)
        speedup = tokens / seconds / usual
        made |= dict(equal=f"{equal} of {len(found)}", speedup=round(speedup, 2))
    return made


def load(options) -> tuple[Target, LoadedDrafter, list]:
    """The target, its drafter, and prompts for it."""
    if options.model == "tiny":
        weights = Weights(MODELS["tiny"], jnp.dtype(options.dtype))
        drafter = block_drafter(weights.config, "path_conditioned", 16)
        target = Target("tiny", weights.config, weights.target)
        prompts = [list(range(n)) for n in range(3, 3 + options.count)]
        return target, LoadedDrafter(drafter, weights.params(drafter).drafter), prompts
    target = jaxspec.load_target(options.model, dtype=options.dtype)
    drafter = jaxspec.load_drafter("shipped", target, dtype=options.dtype)
    prompts = read_prompts(options.prompts) if options.prompts else list(BUILT_IN)
    return target, drafter, spread(prompts, options.count)


def grown(loaded: LoadedDrafter, tree: TreeConfig) -> LoadedDrafter:
    return dataclasses.replace(loaded, drafter=dataclasses.replace(loaded.drafter, tree=tree))


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    rows = timing.Rows("small", options, rates=False)
    target, shipped, prompts = load(options)
    strict = options.dtype == "float32"
    settings = dict(
        model=options.model,
        dtype=options.dtype,
        prompts=len(prompts),
        new_tokens=options.new_tokens,
    )
    plain: list = []

    def find_plain():
        plain.extend(completions(target, prompts, PLAIN, options.new_tokens))
        return row(plain, None, strict)

    def find(tree: TreeConfig):
        if not plain:
            find_plain()
        found = completions(target, prompts, grown(shipped, tree), options.new_tokens)
        return row(found, plain, strict)

    rows.measure(find_plain, **settings, tree="plain", nodes=1)
    for name in options.trees:
        kind, nodes = case_parts(name)
        tree = TreeConfig(kind, size=nodes, width=WIDTH)
        rows.measure(functools.partial(find, tree), **settings, tree=kind, nodes=nodes)
    return rows.finish()


def parse(arguments: list[str] | None):
    parser = timing.parser(__doc__.splitlines()[0], "small")
    parser.add_argument("--model", choices=("smollm2-135m", "tiny"), default="smollm2-135m")
    parser.add_argument("--prompts", type=Path, help="a JSONL file; a few are built in")
    parser.add_argument("--count", type=int, default=8, help="prompts of it")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default=dtype_here().name)
    usual = ["chain8", *(f"{kind}{n}" for kind in TREE_KINDS[2:4] for n in (16, 64, 128))]
    parser.add_argument("--trees", nargs="+", default=usual, help="kind and nodes")
    tiny = dict(count=2, new_tokens=12, trees=["path_conditioned8"])
    options = timing.parse(parser, arguments, **tiny)
    for name in options.trees:
        kind, nodes = case_parts(name)
        if kind not in TREE_KINDS or nodes < 2:
            parser.error(f"tree {name!r}: expected one of {TREE_KINDS} and a number of nodes")
    return options


if __name__ == "__main__":
    sys.exit(main())
