"""Hundreds of requests with random ends: nothing lost, doubled, leaked or changed.

Through the runner, as a server uses it: tasks that read slowly, leave early or never read.
"""

import asyncio
import random

import pytest

from jaxspec.decoding.sampling import Sampling
from jaxspec.serving.config import EngineConfig
from jaxspec.serving.engine import Engine
from jaxspec.serving.requests import Request
from jaxspec.serving.runner import EngineFailed, Runner
from tests import tiny
from tests.serving import engines
from tests.serving.engines import alone
from tests.serving.soaks import check_soak


def asked(count: int, dice: random.Random) -> list[Request]:
    """Random prompts, some with a start in common, and everything that may be asked for."""
    made = []
    for i in range(count):
        (prompt,) = tiny.prompts(dice.randint(1, 34), seed=i % 60)
        if dice.random() < 0.5:
            prompt = [*tiny.prompts(33, seed=i % 4)[0], prompt[0]]
        penalised = dice.random() < 0.3
        sampling = Sampling(
            temperature=dice.choice([0.0, 0.0, 0.6, 1.3]),
            top_p=dice.choice([1.0, 0.9]),
            stop_ids=dice.choice([(), (3,), (5, 8)]),
            presence_penalty=dice.choice([0.0, 0.7]) if penalised else 0.0,
            repetition_penalty=dice.choice([1.0, 1.4]) if penalised else 1.0,
            logit_bias=dice.choice([(), ((4, 2.5),)]) if penalised else (),
        )
        length, logprobs = dice.randint(1, 25), dice.choice([None, None, 0, 3])
        whole = logprobs is not None and dice.random() < 0.5
        made.append(
            Request(
                tuple(prompt),
                length,
                sampling,
                seed=i,
                logprobs=logprobs,
                prompt_logprobs=whole,
            )
        )
    return made


@pytest.mark.slow
def test_soak():
    engine = engines.engine(prefix_cache_mb=0.1)  # eight pages, which is too few
    dice, count = random.Random(0), 520
    check_soak(engine, asked(count, dice), dice, alone)
    used, room = engine.prefix_pages
    assert used == room == 8


def test_an_engine_that_fails_tells_everyone(monkeypatch):
    engine = Engine(tiny.target(), config=EngineConfig(room=60))

    def fail():
        raise RuntimeError("out of memory")

    async def run():
        runner = Runner(engine)
        monkeypatch.setattr(engine, "step", fail)
        ticket = runner.submit(Request((1,), 3))
        with pytest.raises(EngineFailed, match="out of memory"):
            await anext(ticket)
        assert not runner.healthy
        with pytest.raises(EngineFailed, match="has stopped"):
            runner.submit(Request((1,), 3))
        runner.close()

    asyncio.run(run())
