"""Fits how much a copy of earlier text counts beside a drafter: `drafters.ngram.WEIGHTS`.

The target answers questions of the training data, each with another instruction after it, so
that the drafter has not seen the answers. After every token of an answer the drafter scores
the next ones given the true tokens before. The weights, one per length of the match, are those
under which the mixture of copy and drafter (`jaxspec.trees.copies`) makes the answers
likeliest.

    xz -dkc data-2.jsonl.xz > out/questions.jsonl
    python copy_weights.py --questions out/questions.jsonl --drafter shipped     # 5 minutes
"""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import jaxspec
from jaxspec.cli import exits
from jaxspec.cli.prompt_sets import encoded
from jaxspec.data.jsonl import numbered_lines, parse_object
from jaxspec.decoding.sampling import Sampling
from jaxspec.drafters.joined import with_lookup
from jaxspec.drafters.ngram import WEIGHTS
from jaxspec.evaluation import walk
from jaxspec.trees.copies import find_copies
from jaxspec.trees.tree import ancestors, chain, unpack_bits

LENGTHS = len(WEIGHTS)  # of matches; longer ones count as the last
INSTRUCTION = " Explain your answer in a few sentences."
UNKNOWN = np.log(1e-6)  # of a token outside the draft vocabulary
STEPS = 100


@dataclasses.dataclass(frozen=True)
class Fit:
    questions: Path
    """JSON lines of conversations, as `regenerate` writes them; first turns are used."""
    drafter: str = "shipped"
    target: str = "smollm2-135m"
    dtype: str = "bfloat16"
    count: int = 96
    """Questions."""
    max_new_tokens: int = 192
    temperature: float = 0.0
    batch: int = 24
    seed: int = 0


def main(options: Fit) -> None:
    jaxspec.enable_compilation_cache()
    target = jaxspec.load_target(options.target, dtype=options.dtype)
    drafter = jaxspec.load_drafter(options.drafter, target, dtype=options.dtype)
    rows = [parse_object(line) for _, line in numbered_lines(options.questions)]
    texts = [row["conversations"][0]["content"] + INSTRUCTION for row in rows]
    random.Random(options.seed).shuffle(texts)
    chosen = {"questions": texts[: options.count]}
    length = options.max_new_tokens
    sets, _ = encoded(target, chosen, thinking=None, max_new_tokens=length)
    prompts = sets["questions"]
    parts = [
        observations(target, drafter, prompts[first : first + options.batch], options)
        for first in tqdm(range(0, len(prompts), options.batch), desc="answers")
    ]
    length, right, log_q = (np.concatenate(x) for x in zip(*parts, strict=True))
    weights = fitted(length, right, np.exp(log_q))
    print(json.dumps(dict(tokens=len(length), weights=[round(float(w), 3) for w in weights])))
    for what, w in (("drafter alone", np.zeros(LENGTHS)), ("mixture", weights)):
        log_p = np.log(mixed(np.append(0.0, w)[length], right, np.exp(log_q))).mean()
        print(f"{what}: mean log-probability of a token {log_p:.3f}")


def observations(target, drafter, prompts, options):
    """For every drafted place: length of the match, whether its copy is right, log q."""
    both = with_lookup(drafter)
    answers = walk.record(
        target,
        prompts,
        max_new_tokens=options.max_new_tokens,
        spare=drafter.drafter.depth + 1,
        sampling=Sampling(temperature=options.temperature),
        batch_size=len(prompts),
    )
    observed = walk.observe(target, [both], answers, batch=len(prompts))
    found = walk.at_every_anchor(scored, observed, answers, both, observed.states[0])
    inside = np.arange(found["real"].shape[1]) < [[answer.new_tokens] for answer in answers]
    counted = found["real"] & inside[..., None]
    return [found[name][counted] for name in ("length", "right", "log_q")]


def scored(joined, params, state, anchor, position, path, noise):
    """Of every place of a block along the true path, [B, P]."""
    drafter, (own, text) = joined.parts[0], state
    path, vocabulary = path[:, : drafter.depth], params[0].vocabulary
    index, known = vocabulary.index(path)

    def choose(slot, logits):
        return index[:, slot], jax.nn.log_softmax(logits, axis=-1)

    _, log_q = drafter.rollout(params[0], own, anchor, position, choose)
    log_q = jnp.take_along_axis(log_q, index[..., None], axis=-1)[..., 0]
    text = text.at[jnp.arange(len(anchor)), position].set(anchor)
    tree = chain(anchor, path, jnp.full_like(anchor, drafter.depth))
    above = unpack_bits(ancestors(tree), tree.size)
    copies = find_copies(tree, above, text, position, longest=LENGTHS, depth=drafter.depth)
    length = copies.length[:, :-1]
    return {
        "real": path >= 0,
        "length": length,
        "right": (copies.tokens[:, :-1, 0] == path) & (length > 0),
        "log_q": jnp.where(known, jnp.maximum(log_q, UNKNOWN), UNKNOWN),
    }


def fitted(length, right, q) -> np.ndarray:
    """The likeliest weights after matches of 1 … `LENGTHS` tokens, by EM."""
    weights = np.append(0.0, np.full(LENGTHS, 0.5))
    for _ in range(STEPS):
        w = weights[length]
        copied = w * right / mixed(w, right, q)
        for n in range(1, LENGTHS + 1):
            if (length == n).any():
                weights[n] = copied[length == n].mean()
    return weights[1:]


def mixed(weight, right, q):
    """Probability of the true tokens."""
    return weight * right + (1 - weight) * q


if __name__ == "__main__":
    exits.script(main, Fit, __doc__)
