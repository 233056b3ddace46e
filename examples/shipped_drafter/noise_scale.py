"""Measures how much of the noise of sampled choices a drafter should add: `jaxspec.noise`.

The target answers prompts of the training folder, sampled, and the drafter's trees are replayed
along the answers with each factor times temperature times noise added to its logits. Factor 0
is a drafter that does not know the noise. Beside them chains that the drafter samples, accepted
by rejection sampling (other answers of the same law). Nothing is timed.

    python noise_scale.py  # 4 minutes of two cores
    python noise_scale.py --temperature 0.6 --top-p 0.95 --top-k 20
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import tyro
from tqdm import tqdm

import jaxspec
from jaxspec.cli.prompt_sets import chosen, encoded
from jaxspec.config import TreeConfig
from jaxspec.decoding.sampling import Sampling
from jaxspec.decoding.stats import DecodeStats, pooled_tau
from jaxspec.evaluation import walk
from jaxspec.noise import Noise

PROMPTS = Path(__file__).parents[3] / "shared" / "prompts" / "train"


@dataclasses.dataclass(frozen=True)
class Measure:
    prompts: tuple[str, ...] = (str(PROMPTS / "gsm8k.jsonl"), str(PROMPTS / "arena-hard.jsonl"))
    """Files of prompts, none of them of the evaluation: see Prompts in README.md."""
    count: int = 8
    """Prompts of each file, evenly spaced."""
    max_new_tokens: int = 96
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    factors: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    drafter: str = "shipped"
    target: str = "smollm2-135m"
    nodes: int = 16
    batch: int = 8


def main(options: Measure) -> None:
    texts = chosen(options.prompts, options.count, [])
    jaxspec.enable_compilation_cache()
    target = jaxspec.load_target(options.target, dtype="bfloat16")
    trees = {
        "chain": TreeConfig("chain", size=min(8, options.nodes)),
        "path_conditioned": TreeConfig("path_conditioned", size=options.nodes),
    }
    drafters = {
        name: jaxspec.load_drafter(options.drafter, target, dtype="bfloat16", tree=tree)
        for name, tree in trees.items()
    }
    new_tokens = options.max_new_tokens
    sets, _ = encoded(target, texts, thinking=None, max_new_tokens=new_tokens)
    rows = [row for prompts in sets.values() for row in prompts]
    settings = dict(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
    )
    stats: dict[tuple[str, float], list] = {}
    rejected: list[DecodeStats] = []
    for first in tqdm(range(0, len(rows), options.batch), desc="answers", unit="batch"):
        some = rows[first : first + options.batch]
        sizes = dict(batch_size=options.batch, capacity=1024)
        answers = walk.record(
            target,
            some,
            max_new_tokens=new_tokens,
            spare=1 + max(drafter.drafter.depth for drafter in drafters.values()),
            sampling=Sampling(**settings),
            seeds=range(first, first + len(some)),
            **sizes,
        )
        done = jaxspec.generate(
            target,
            some,
            drafter=drafters["chain"],
            rejection=True,
            max_new_tokens=new_tokens,
            sampling=Sampling(**settings),
            seed=list(range(first, first + len(some))),
            **sizes,
        )
        rejected += [completion.stats for completion in done]
        seen = walk.observe(
            target, [drafters["chain"]], answers, batch=options.batch, capacity=1024
        )
        for factor in options.factors:
            scale = jnp.full_like(seen.noise.scale, factor * options.temperature)
            known = dataclasses.replace(seen, noise=Noise(seen.noise.key, scale))
            for name, drafter in drafters.items():
                tables = walk.tabulate(known, answers, drafter, seen.states[0])
                stats.setdefault((name, factor), []).extend(
                    walk.walk(answer, table, trees[name].size)[0]
                    for answer, table in zip(answers, tables, strict=True)
                )
    for name in trees:
        taus = {factor: round(pooled_tau(stats[name, factor]), 3) for factor in options.factors}
        print(json.dumps(dict(settings, tree=name, prompts=len(rows), tau=taus)))
    print(json.dumps(dict(settings, tree="sampled chain", tau=round(pooled_tau(rejected), 3))))


if __name__ == "__main__":
    main(tyro.cli(Measure, description=__doc__))
