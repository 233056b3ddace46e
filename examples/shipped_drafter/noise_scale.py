"""Measures how much of the noise of sampled choices a drafter should add: `jaxspec.noise`.

The target answers prompts of the training folder, sampled, and the drafter's trees are replayed
along the answers with each factor times temperature times noise added to its logits. Factor 0
is a drafter that does not know the noise. Beside them prompt lookup, alone and behind the nodes
of the tree, and chains that the drafter samples, accepted by rejection sampling (other answers
of the same law). Nothing is timed.

    python noise_scale.py
    python noise_scale.py --temperature 0.6 --top-p 0.95 --top-k 20
"""

from __future__ import annotations

import collections
import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
from tqdm import tqdm

import jaxspec
from jaxspec.cli import exits
from jaxspec.cli.prompt_sets import chosen, encoded
from jaxspec.config import TreeConfig
from jaxspec.decoding.sampling import Sampling
from jaxspec.decoding.stats import pooled_tau
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.drafters.joined import with_lookup
from jaxspec.drafters.ngram import PromptLookup
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
    nodes: tuple[int, ...] = (8, 16)
    batch: int = 8


def main(options: Measure) -> None:
    texts = chosen(options.prompts, options.count, [])
    jaxspec.enable_compilation_cache()
    target = jaxspec.load_target(options.target, dtype="bfloat16")
    chain, path = (
        jaxspec.load_drafter(options.drafter, target, dtype="bfloat16", tree=tree)
        for tree in (
            TreeConfig("chain", size=8),
            TreeConfig("path_conditioned", size=max(options.nodes)),
        )
    )
    new_tokens = options.max_new_tokens
    sets, _ = encoded(target, texts, thinking=None, max_new_tokens=new_tokens)
    rows = [row for prompts in sets.values() for row in prompts]
    laws = ("temperature", "top_k", "top_p", "min_p")
    settings = {name: getattr(options, name) for name in laws}
    sampled = dict(batch_size=options.batch, capacity=1024, sampling=Sampling(**settings))
    stats = collections.defaultdict(list)
    for first in tqdm(range(0, len(rows), options.batch), desc="answers", unit="batch"):
        some = rows[first : first + options.batch]
        seeds = list(range(first, first + len(some)))
        length = dict(max_new_tokens=new_tokens)
        answers = walk.record(target, some, spare=16, seeds=seeds, **length, **sampled)
        replay(target, chain, path, answers, options, stats)
        rejection = dict(drafter=chain, rejection=True, seed=seeds)
        done = jaxspec.generate(target, some, **rejection, **length, **sampled)
        stats["sampled chain", 8, None] += [completion.stats for completion in done]
    for (decoder, nodes, factor), found in stats.items():
        shown = dict(decoder=decoder, nodes=nodes, factor=factor, prompts=len(rows))
        print(json.dumps(settings | shown | dict(tau=round(pooled_tau(found), 3))))


def replay(target, chain, path, answers, options: Measure, stats) -> None:
    """Adds the rounds of every drafter, number of nodes and factor along the answers."""
    joined, lookup = with_lookup(path), LoadedDrafter(PromptLookup(size=path.drafter.size))
    seen = walk.observe(target, [joined], answers, batch=options.batch, capacity=1024)
    both = own, text = seen.states[0]
    drafters = {
        "chain": (chain, own, (8,)),
        "path": (path, own, options.nodes),
        "path and lookup": (joined, both, options.nodes),
        "lookup": (lookup, text, options.nodes),
    }
    for name, (drafter, state, budgets) in drafters.items():
        for factor in options.factors:
            scale = jnp.full_like(seen.noise.scale, factor * options.temperature)
            known = dataclasses.replace(seen, noise=Noise(seen.noise.key, scale))
            tables = walk.tabulate(known, answers, drafter, state)
            for nodes in budgets:
                stats[name, nodes, factor] += [
                    walk.walk(answer, table, nodes)[0]
                    for answer, table in zip(answers, tables, strict=True)
                ]


if __name__ == "__main__":
    exits.script(main, Measure, __doc__)
