"""Throughput and time per token under load, in one run on this machine.

Serves the same prompts in several ways, closed loop, with 1 … 32 users: no drafter, a fixed
chain, fixed trees, and the adaptive schedule. At every load the ways take turns in a rotating
order, so that a slow phase of the machine affects all of them. Every engine runs in this
process, without HTTP; they share weights, and an idle engine keeps one row of caches.

With the shipped drafter and one fixed tree it takes about half an hour on two cores; its
engines compile for ten minutes. `--turns`, `--max-new-tokens` and `--users` make it shorter.

    python examples/benchmark_serving.py --drafter shipped+ngram --output serving.json
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import jax
from load import closed_loop, mix, summarise, to_runner  # the module beside this script

import jaxspec
from jaxspec.cli import exits
from jaxspec.data.prompts import read_prompts
from jaxspec.decoding.schedule import Adaptive, Fixed
from jaxspec.drafters.joined import with_survival
from jaxspec.drafters.plain import PLAIN
from jaxspec.drafters.registry import LOOKUP_TOO
from jaxspec.evaluation.plots import check_matplotlib
from jaxspec.prompts import as_token_ids
from jaxspec.serving.config import EngineConfig
from jaxspec.serving.engine import Engine
from jaxspec.serving.formats import json_text
from jaxspec.serving.grammars import Grammar, Grammars
from jaxspec.serving.requests import Request
from jaxspec.serving.runner import Runner

PROMPTS = (
    "Why is the sky blue?",
    "List the planets of the solar system, then list them again in reverse.",
    "Repeat three times: the quick brown fox jumps over the lazy dog.",
    "Write a Python function that adds two numbers.",
)
ADAPTIVE = "adaptive"


@dataclasses.dataclass(frozen=True)
class Benchmark:
    output: Path
    """JSON file of all results; a picture with the same name is written beside it."""
    drafter: str = "ngram"
    target: str = "smollm2-135m"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    tree: str = "path_conditioned"
    """Kind of tree of the fixed and the adaptive engine; ignored by drafters without scores."""
    prompts: tuple[Path, ...] = ()
    """JSON lines; the first `--count` of each. By default a few questions of our own."""
    count: int = 8
    users: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    turns: int = 5
    """Of every way at every load, half of them from 16 users on, where a turn is long. Medians
    are reported, and their spread."""
    requests_per_user: int = 2
    """In one turn."""
    max_new_tokens: int = 64
    chain: int = 8
    """Nodes per row of the fixed chain, root included. It is the drafter's own: `+ngram`, which
    would make two chains of it, is left out."""
    trees: tuple[int, ...] = (8, 16)
    """Nodes per row of the fixed trees; the largest is the most of an adaptive row."""
    max_nodes: int = 128
    rounds: int = 4
    """Decode rounds per burst, in every way."""
    room: int = 256
    top_logprobs: int = 20
    """As the server's default; no request here asks for them."""
    schema: Path | None = None
    """File of a JSON schema for all answers, as a request's `response_format`."""


def main(options: Benchmark) -> None:
    check_matplotlib()
    began = time.perf_counter()
    jaxspec.enable_compilation_cache()
    target = jaxspec.load_target(options.target, dtype=options.dtype)
    texts = [text for path in options.prompts for text in read_prompts(path)[: options.count]]
    prompts = as_token_ids(target, texts or list(PROMPTS), raw=False, thinking=None)
    for prompt in prompts:  # before anything is compiled
        Request(tuple(prompt), options.max_new_tokens).check(
            target.config, options.room, options.top_logprobs
        )
    grammar = grammar_of(options.schema, target)
    runners = {}
    for name, engine in engines(options, target):
        engine.warm_up()
        runners[name] = Runner(engine)
        first = requests(options, prompts, grammar, 4)[:4]
        measure(runners[name], first, 4)  # a warm-up load
        print(f"{name}: ready after {time.perf_counter() - began:.0f} s", flush=True)
    turns = list(take_turns(options, prompts, grammar, runners))
    for runner in runners.values():
        runner.close()
    rows, ratios = medians(turns), ratios_of(turns)
    results = {
        "machine": f"{platform.machine()}, {jax.devices()[0].device_kind}",
        "options": {k: str(v) for k, v in dataclasses.asdict(options).items()},
        "seconds": time.perf_counter() - began,
        "curve": dataclasses.asdict(runners[ADAPTIVE].engine.ready.curve),
        "measured": rows,
        "ratios": ratios,
        "turns": turns,
    }
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    print(table(rows, ratios))
    draw(rows, options.output.with_suffix(".png"))


def engines(options: Benchmark, target) -> Iterator[tuple[str, Engine]]:
    """The engine of every way, with the way's name."""
    from jaxspec import TreeConfig, load_drafter

    def load(kind, size):
        name = options.drafter.removesuffix(LOOKUP_TOO) if kind == "chain" else options.drafter
        tree = TreeConfig(kind if name not in ("none", "ngram") else "chain", size=size)
        return with_survival(load_drafter(name, target, tree=tree, dtype=options.dtype))

    def engine(drafter, schedule, budget=None):
        config = EngineConfig(
            slots=max(options.users),
            room=options.room,
            queue=4 * max(options.users),
            schedule=schedule,
            budget=budget,
            max_nodes=options.max_nodes,
            rounds=options.rounds,
            top_logprobs=options.top_logprobs,
        )
        return Engine(target, drafter, config)

    yield "none", engine(PLAIN, Fixed())
    yield "fixed chain", engine(load("chain", options.chain), Fixed(), options.chain)
    trees = {size: load(options.tree, size) for size in options.trees}
    for size, tree in trees.items():
        yield f"fixed tree of {size}", engine(tree, Fixed(), size)
    yield ADAPTIVE, engine(trees[max(trees)], Adaptive())


def grammar_of(schema: Path | None, target) -> Grammar | None:
    if schema is None:
        return None
    text = json_text(json.loads(schema.read_text()), str(schema))
    return Grammars(target.tokenizer, target.config).of(text)


def take_turns(
    options: Benchmark, prompts, grammar, runners: dict[str, Runner]
) -> Iterator[dict]:
    """One row per turn; the order of ways rotates by one between turns of one load."""
    names = list(runners)
    for load, users in enumerate(options.users):
        for turn in range(options.turns if users < 16 else -(-options.turns // 2)):
            first = (load + turn) % len(names)
            for name in names[first:] + names[:first]:
                asked = requests(options, prompts, grammar, users)
                row = {"way": name, "users": users, "turn": turn}
                row |= measure(runners[name], asked, users)
                yield row
                print(
                    f"{users:3} users, turn {turn + 1}  {name:16} "
                    f"{row['tokens_per_second']:8.1f} tokens/s",
                    flush=True,
                )


def requests(options: Benchmark, prompts, grammar, users: int) -> list[Request]:
    return [
        Request(tuple(prompt), options.max_new_tokens, seed=i, grammar=grammar)
        for i, prompt in enumerate(mix(prompts, users * options.requests_per_user))
    ]


def measure(runner: Runner, asked: Sequence[Request], users: int) -> dict:
    """Runs a closed loop, then waits until the engine is idle."""
    before = list(runner.engine.rounds_by_size)
    seen = asyncio.run(closed_loop_of(runner, asked, users))
    while runner.engine.busy and runner.healthy:  # it gives its caches back
        time.sleep(0.01)
    found = summarise(seen)
    if found.failed:
        errors = {one.error for one in seen if one.error}
        raise RuntimeError(f"{found.failed} of {found.requests} requests failed: {errors}")
    after = runner.engine.rounds_by_size
    sizes = [b - a for a, b in zip(before, after, strict=True)]
    return {**dataclasses.asdict(found), "rounds_by_size": sizes}


async def closed_loop_of(runner, asked, users):
    return await closed_loop(to_runner(runner), asked, users)


def medians(turns: Sequence[dict]) -> list[dict]:
    """One row per load and way: medians of its turns; `…_spread` is the lowest and highest."""
    groups: dict[tuple, list[dict]] = {}
    for row in turns:
        groups.setdefault((row["users"], row["way"]), []).append(row)
    rows = []
    for (users, way), own in groups.items():
        values = {
            "tokens_per_second": [row["tokens_per_second"] for row in own],
            "ms_per_token": [1e3 * row["per_token"][0] for row in own],
            "ms_to_first": [1e3 * row["first_token"][0] for row in own],
        }
        row = {"users": users, "way": way}
        for name, found in values.items():
            row[name] = statistics.median(found)
            row[f"{name}_spread"] = [min(found), max(found)]
        rows.append(row)
    order = list(
        dict.fromkeys(row["way"] for row in turns if row["users"] == turns[0]["users"])
    )
    return sorted(rows, key=lambda row: (row["users"], order.index(row["way"])))


def ratios_of(turns: Sequence[dict]) -> list[dict]:
    """Throughput of the adaptive way relative to the best other way, at each load.

    The best has the largest median. Each turn is compared with the same turn of the best, which
    ran beside it; the ratio is the median of these.
    """
    rows, ratios = medians(turns), []
    for users in dict.fromkeys(row["users"] for row in rows):
        fixed = [row for row in rows if row["users"] == users and row["way"] != ADAPTIVE]
        best = max(fixed, key=lambda row: row["tokens_per_second"])["way"]
        rate = {
            (row["way"], row["turn"]): row["tokens_per_second"]
            for row in turns
            if row["users"] == users
        }
        by_turn = [rate[ADAPTIVE, t] / rate[best, t] for way, t in rate if way == ADAPTIVE]
        spread = [min(by_turn), max(by_turn)]
        ratio = statistics.median(by_turn)
        ratios.append({"users": users, "best_fixed": best, "ratio": ratio, "spread": spread})
    return ratios


def table(rows: Sequence[dict], ratios: Sequence[dict]) -> str:
    """Markdown: medians, with the lowest and highest turn in brackets."""

    def cell(row, name):
        low, high = row[f"{name}_spread"]
        return f"{row[name]:.1f} ({low:.1f} … {high:.1f})"

    lines = [
        "",
        "| users | way | tokens/s | ms per token | ms to the first |",
        "|" + "---|" * 5,
    ]
    for row in rows:
        cells = (cell(row, n) for n in ("tokens_per_second", "ms_per_token", "ms_to_first"))
        lines.append(f"| {row['users']} | {row['way']} | {' | '.join(cells)} |")
    lines += ["", "| users | best fixed way | adaptive, times its tokens/s |", "|" + "---|" * 3]
    for row in ratios:
        low, high = row["spread"]
        lines.append(
            f"| {row['users']} | {row['best_fixed']} | "
            f"{row['ratio']:.2f} ({low:.2f} … {high:.2f}) |"
        )
    return "\n".join(lines)


def draw(rows: Sequence[dict], path: Path) -> None:
    """Medians as lines, spreads as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    names = {
        "tokens_per_second": "tokens per second, all users",
        "ms_per_token": "ms per token, median user",
    }
    for axes, (name, label) in zip(figure.subplots(1, 2), names.items(), strict=True):
        for way in dict.fromkeys(row["way"] for row in rows):
            own = [row for row in rows if row["way"] == way]
            users, middle = ([row[k] for row in own] for k in ("users", name))
            low = [row[name] - row[f"{name}_spread"][0] for row in own]
            high = [row[f"{name}_spread"][1] - row[name] for row in own]
            axes.errorbar(users, middle, (low, high), marker="o", capsize=2, label=way)
        axes.set_xscale("log", base=2)
        axes.set_xticks(users, users)
        axes.set(xlabel="users at a time", ylabel=label, ylim=(0, None))
        axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    exits.script(main, Benchmark, __doc__)
