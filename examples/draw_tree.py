"""Draws the trees of the first rounds of a real text, with what the target accepted.

    python examples/draw_tree.py "Name the planets." --drafter small:smollm2-135m --out tree.png

A small model that is the target itself drafts well; its tree shows where a temperature above 0
leaves the likeliest path.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
import tyro

import jaxspec
from jaxspec.cli import exits
from jaxspec.config import TreeKind
from jaxspec.decoding.loop import decode
from jaxspec.decoding.prefill import prefill
from jaxspec.decoding.requests import capacity_for, decoder_for, pack, request_keys
from jaxspec.decoding.round import propose
from jaxspec.decoding.state import Decoder, Params
from jaxspec.trees.draw import as_figure, as_text, follow, visible


@dataclasses.dataclass(frozen=True)
class Options:
    """Options."""

    prompt: tyro.conf.Positional[str] = "Name three planets and what they are known for."
    """A user's turn."""
    target: str = "smollm2-135m"
    """As for `jaxspec generate`."""
    drafter: str = "small:smollm2-135m"
    """As for `jaxspec generate`."""
    kind: TreeKind = "top_budget"
    """How the tree is grown."""
    size: int = 24
    """Nodes, root included."""
    width: int = 3
    """Children per expanded node (best_first)."""
    rounds: int = 3
    """Rounds to draw."""
    temperature: float = 0.8
    """Of the target; 0 takes its likeliest token."""
    seed: int = 0
    """Of the target's choices."""
    out: Path | None = None
    """Picture of the last round."""

    def __post_init__(self):
        if self.rounds < 1:
            raise ValueError(f"rounds is {self.rounds}; expected at least 1")


@functools.partial(jax.jit, static_argnames="decoder")
def draft(decoder: Decoder, params: Params, state, sampling):
    """The tree that the next round will verify."""
    return propose(decoder, params, state, sampling)[0].tree


def main(options: Options):
    tree = jaxspec.TreeConfig(options.kind, size=options.size, width=options.width)
    target = jaxspec.load_target(options.target)
    drafter = jaxspec.load_drafter(options.drafter, target, tree=tree)
    decoder, params = decoder_for(target, drafter)

    prompt = target.tokenizer.chat(options.prompt)
    new_tokens = options.rounds * (drafter.drafter.depth + 1) + 1
    requests = pack(
        decoder,
        [prompt],
        batch=1,
        capacity=capacity_for(len(prompt) + new_tokens, decoder),
        max_new_tokens=new_tokens,
        budget=options.size,
        sampling=[jaxspec.Sampling(temperature=options.temperature)],
        keys=request_keys(options.seed, 1),
    )

    def text(*tokens):
        return target.tokenizer.decode(tokens)

    def label(token):
        return visible(text(token))

    state = prefill(decoder, params, requests)
    for number in range(1, options.rounds + 1):
        if state.done[0]:
            break
        grown = draft(decoder, params, state, requests.sampling)
        before = int(state.length[0])
        state = decode(decoder, params, state, requests.sampling, np.int32(1))
        decided = state.tokens[0, before : int(state.length[0])].tolist()
        path = follow(grown, decided[:-1])  # the last one is the target's own
        print(f"round {number}: the target goes on with {text(*decided)!r}")
        print(as_text(grown, label=label, accepted=path), "\n")
    if options.out:
        as_figure(grown, label=label, accepted=path).savefig(options.out)
        print(f"drew round {number} to {options.out}")


if __name__ == "__main__":
    exits.script(main, Options, __doc__)
