"""Throughput and time per token against offered load, one run on this machine.

Four ways to serve the same replayed prompts, closed loop, 1 … 32 users at a time: no drafter, a
fixed chain, a fixed tree, and the adaptive schedule. Every engine runs in this process, so HTTP
is not in it. `--simulate` adds the same schedule against H100 floors, which is a simulation and
labelled as one.

    python examples/benchmark_serving.py --drafter run/drafter --output serving.json
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import platform
from pathlib import Path

import jax
import tyro

import jaxspec
from jaxspec.cli import read_prompts
from jaxspec.decoding.schedule import Adaptive, Fixed
from jaxspec.generation import PLAIN, as_token_ids
from jaxspec.serving.commands import with_survival
from jaxspec.serving.config import EngineConfig
from jaxspec.serving.engine import Engine
from jaxspec.serving.load import closed_loop, mix, summarise, to_runner
from jaxspec.serving.requests import Request
from jaxspec.serving.runner import Runner
from jaxspec.serving.simulate import Machine, simulate

PROMPTS = (
    "Why is the sky blue?",
    "List the planets of the solar system, then list them again in reverse.",
    "Repeat three times: the quick brown fox jumps over the lazy dog.",
    "Write a Python function that adds two numbers.",
)


@dataclasses.dataclass(frozen=True)
class Benchmark:
    output: Path
    """JSON of all results; beside it, with the same name, the picture."""
    drafter: str = "ngram"
    target: str = "smollm2-135m"
    tree: str = "path_conditioned"
    """Of the fixed tree and the adaptive engine; drafters without scores have their own."""
    prompts: Path | None = None
    users: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    requests_per_user: int = 4
    max_new_tokens: int = 64
    chain: int = 8
    """Nodes per row of the fixed chain, root included."""
    budget: int = 16
    """Nodes per row of the fixed tree, and the most of one row in the adaptive one."""
    max_nodes: int = 128
    room: int = 256
    simulate: bool = False


def main(options: Benchmark) -> None:
    jaxspec.enable_compilation_cache()
    target = jaxspec.load_target(options.target)
    texts = PROMPTS if options.prompts is None else read_prompts(options.prompts)
    prompts = as_token_ids(target, list(texts), raw=False, thinking=None)
    results = {
        "machine": f"{platform.machine()}, {jax.devices()[0].device_kind}",
        "options": {k: str(v) for k, v in dataclasses.asdict(options).items()},
        "measured": [],
    }
    for name, drafter, schedule, budget in ways(options, target):
        engine = Engine(
            target,
            drafter,
            EngineConfig(
                slots=max(options.users),
                room=options.room,
                queue=4 * max(options.users),
                schedule=schedule,
                budget=budget,
                max_nodes=options.max_nodes,
            ),
        )
        engine.warm_up()
        runner = Runner(engine)
        for users in options.users:
            before = list(engine.rounds_by_size)
            asked = [
                Request(tuple(prompt), options.max_new_tokens, seed=i)
                for i, prompt in enumerate(mix(prompts, users * options.requests_per_user))
            ]
            found = summarise(asyncio.run(closed_loop_of(runner, asked, users)))
            sizes = [b - a for a, b in zip(before, engine.rounds_by_size, strict=True)]
            row = {"way": name, "users": users, "rounds_by_size": sizes}
            results["measured"].append(row | dataclasses.asdict(found))
            print(
                f"{name:12} {users:3} users  {found.tokens_per_second:8.1f} tokens/s  "
                f"{1e3 * found.per_token[0]:7.1f} ms per token  "
                f"{1e3 * found.first_token[0]:7.0f} ms to the first",
                flush=True,
            )
        runner.close()
    if options.simulate:
        results["simulated, H100 floors"] = simulated(options.users)
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    draw(results, options.output.with_suffix(".png"))


def ways(options: Benchmark, target):
    """(name, drafter, schedule, budget) of every line."""
    from jaxspec import TreeConfig, load_drafter

    def load(kind, size):
        scored = options.drafter not in ("none", "ngram")
        tree = TreeConfig(kind if scored else "chain", size=size)
        return with_survival(load_drafter(options.drafter, target, tree=tree))

    yield "none", PLAIN, Fixed(), None
    yield "fixed chain", load("chain", options.chain), Fixed(), options.chain
    tree = load(options.tree, options.budget)
    yield "fixed tree", tree, Fixed(), options.budget
    yield "adaptive", tree, Adaptive(), None


async def closed_loop_of(runner, asked, users):
    return await closed_loop(to_runner(runner), asked, users)


def simulated(users) -> list[dict]:
    """The schedule's rates on an H100's floors (Qwen3-8B): not a measurement."""
    return [
        {"way": rule, "users": n}
        | dataclasses.asdict(simulate(Machine(), rule, [0.0] * (2 * n), slots=n))
        for n in (*users, 4 * max(users), 16 * max(users))
        for rule in ("none", "fixed", "adaptive")
    ]


def draw(results: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    rate, wait = figure.subplots(1, 2)
    rows = results["measured"]
    for way in dict.fromkeys(row["way"] for row in rows):
        own = [row for row in rows if row["way"] == way]
        users = [row["users"] for row in own]
        rate.plot(users, [row["tokens_per_second"] for row in own], marker="o", label=way)
        wait.plot(users, [1e3 * row["per_token"][0] for row in own], marker="o", label=way)
    rate.set(xscale="log", xlabel="users at a time", ylabel="tokens per second, all users")
    wait.set(xscale="log", xlabel="users at a time", ylabel="ms per token, median user")
    for axes in (rate, wait):
        axes.set_xticks(users, users)
        axes.grid(alpha=0.3)
    rate.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
