"""Tiny engines and requests, shared so that programs are compiled once."""

from __future__ import annotations

import functools

from jaxspec.api import generate
from jaxspec.config import TreeConfig
from jaxspec.decoding.curve import Curve
from jaxspec.decoding.sampling import Sampling
from jaxspec.decoding.schedule import Adaptive, Fixed
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.drafters.block import BlockDrafter
from jaxspec.drafters.ngram import PromptLookup
from jaxspec.drafters.small_model import SmallModel
from jaxspec.serving.config import EngineConfig
from jaxspec.serving.engine import Engine
from jaxspec.serving.requests import Request
from tests import tiny
from tests.drafters import cases

SMALL = tiny.target(tiny.LLAMA, seed=5)
LOOKUP = LoadedDrafter(PromptLookup(size=8, depth=5))
ITSELF = LoadedDrafter(SmallModel(tiny.QWEN3, depth=3), tiny.target().params)
DRAFTERS = {
    "lookup": LOOKUP,
    "small tree": LoadedDrafter(
        SmallModel(SMALL.config, TreeConfig("top_budget", size=8), depth=3), SMALL.params
    ),
    "itself": ITSELF,
    "survival chain": LoadedDrafter(
        BlockDrafter(cases.KINDS["dspark"], TreeConfig("chain", size=8), survival_scores=True),
        cases.params("dspark"),
    ),
    "survival tree": LoadedDrafter(
        BlockDrafter(
            cases.KINDS["rnn"],
            TreeConfig("path_conditioned", size=8, candidates=6),
            survival_scores=True,
        ),
        cases.params("rnn"),
    ),
}
CONFIG = dict(slots=4, room=60, queue=64, chunk=16, max_nodes=8, top_logprobs=5)
FEW = dict(slots=2, max_nodes=2)  # the fewest programs that show all parts
SCHEDULES = {"fixed": Fixed(), "adaptive": Adaptive()}


def staircase(engine: Engine) -> Curve:
    """Step times in which verifying more costs more: the choice depends on the survivals."""
    setup = engine.setup()
    seconds = {
        int(rows): [1 + 0.1 * total for total in totals]
        for rows, totals in setup["totals"].items()
    }
    return Curve(setup, seconds)


def cold(drafter=LOOKUP, schedule=None, **options) -> Engine:
    """An engine with the step times of `staircase` that has compiled nothing."""
    schedule = SCHEDULES["adaptive"] if schedule is None else schedule
    config = EngineConfig(**(CONFIG | dict(schedule=schedule) | options))
    made = Engine(tiny.target(), drafter, config)
    if not isinstance(schedule, Fixed):
        made = Engine(tiny.target(), drafter, config, curve=staircase(made))
    return made


def engine(drafter=LOOKUP, schedule=None, **options) -> Engine:
    """A warm engine with the step times of `staircase`."""
    made = cold(drafter, schedule, **options)
    made.warm_up()
    return made


def requests(count: int, seed: int = 0, most: int = 24) -> list[Request]:
    """Different prompts, lengths, temperatures and stop ids."""
    lengths = [1 + (7 * i) % 33 for i in range(count)]
    samplings = [
        Sampling(),
        Sampling(temperature=0.8),
        Sampling(stop_ids=(3, 7)),
        Sampling(temperature=1.2, top_k=6, top_p=0.95),
    ]
    return [
        Request(tuple(prompt), 1 + (11 * i) % most, samplings[i % 4], seed=i)
        for i, prompt in enumerate(tiny.prompts(*lengths, seed=seed))
    ]


@functools.cache
def alone(request: Request) -> tuple[int, ...]:
    """Plain decoding's answer to one request."""
    (done,) = generate(
        tiny.target(),
        [list(request.prompt)],
        max_new_tokens=request.max_new_tokens,
        sampling=request.sampling,
        seed=[request.seed],
        capacity=256,
    )
    return tuple(done.token_ids)


def drain(engine: Engine, updates: dict | None = None, steps: int = 2000) -> dict[int, list]:
    """Steps until nothing is left: the updates of every request."""
    found = {} if updates is None else updates
    for _ in range(steps):
        if not engine.busy:
            return found
        for update in engine.step():
            found.setdefault(update.id, []).append(update)
    raise AssertionError(
        f"{engine.waiting} waiting, {engine.running} running after {steps} steps"
    )


def tokens(updates: list) -> tuple[int, ...]:
    return tuple(token for update in updates for token in update.tokens)
