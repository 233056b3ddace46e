"""Times decoders against each other: on the same prompts, in one process, taking turns."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from jaxspec.api import generate, warm_up
from jaxspec.decoding.sampling import Sampling
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.drafters.plain import Plain
from jaxspec.models.target import Target
from jaxspec.results import Completion

# Answers one prompt, given its token ids and a sampling seed.
Run = Callable[[list[int], int], Completion]
Name = TypeVar("Name")

PLAIN_ROWS = (1, 2)  # forms of plain decoding: see `Plain.size`


def plain_forms() -> dict[str, LoadedDrafter]:
    """The forms of plain decoding, any of which may be the fastest."""
    return {f"plain, {n} row{'s' * (n > 1)}": LoadedDrafter(Plain(n)) for n in PLAIN_ROWS}


def runner(
    target: Target,
    drafter: LoadedDrafter,
    rows: Sequence[list[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    budget: int | None = None,
) -> Run:
    """A decoder as a `Run`, compiled for the longest of the prompts."""
    options = dict(drafter=drafter, sampling=sampling, budget=budget)
    capacity = warm_up(target, rows, max_new_tokens=max_new_tokens, batch_size=1, **options)

    def run(row: list[int], seed: int) -> Completion:
        (done,) = generate(
            target,
            row,
            max_new_tokens=max_new_tokens,
            seed=[seed],
            capacity=capacity,
            **options,
        )
        return done

    return run


def take_turns(
    runs: Mapping[Name, Run], rows: Sequence[list[int]], *, progress=iter
) -> dict[Name, list[Completion]]:
    """Every decoder's answer to every prompt.

    Decoders answer a prompt one after another, in a new random order each time, so that
    interference does not always hit the same one. Prompt i is sampled with seed i.
    """
    order, shuffle = list(runs), random.Random(0).shuffle
    done: dict[Name, list[Completion]] = {name: [] for name in runs}
    for seed, row in enumerate(progress(rows)):
        shuffle(order)
        for name in order:
            done[name].append(runs[name](row, seed))
    return done
