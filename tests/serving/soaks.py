"""A soak: many requests at once through a runner, as a server uses it, with random ends."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence

from jaxspec.serving.engine import Engine
from jaxspec.serving.requests import QueueFull, Request
from jaxspec.serving.runner import Runner


def check_soak(
    engine: Engine,
    requests: Sequence[Request],
    dice: random.Random,
    alone: Callable[[Request], tuple[int, ...]],
) -> None:
    """Nothing is lost, doubled, leaked or changed.

    Args: alone: what plain decoding answers a request.
    """
    start, runner = engine.device_bytes(), Runner(engine)
    try:
        found = asyncio.run(_answers(runner, requests, dice))
        assert runner.healthy and runner.tickets == 0
    finally:
        runner.close()
    assert sorted(found) == list(range(len(requests)))
    assert len({id for _, _, id in found.values()}) == len(requests)
    assert (engine.waiting, engine.running, engine.busy) == (0, 0, False)
    assert engine.device_bytes() == start
    assert {finish for _, finish, _ in found.values()} == {None, "stop", "length"}
    for index, (tokens, finish, _) in found.items():
        expected = alone(requests[index])
        assert tokens == (expected if finish else expected[: len(tokens)]), index


async def _answers(runner: Runner, requests, dice: random.Random):
    """Every request's tokens, its end, and whether its reader left early."""
    found = {}

    async def one(index, request, leave_after, pause):
        while True:
            try:
                ticket = runner.submit(request)
                break
            except QueueFull:
                await asyncio.sleep(0.01)
        tokens, laws, finish = [], 0, None
        with ticket:
            async for update in ticket:
                assert finish is None, "an update after the last one"
                assert len(update.tokens) or update.finish
                tokens += update.tokens
                laws += len(update.logprobs)
                finish = update.finish
                await asyncio.sleep(pause)
                if leave_after is not None and len(tokens) >= leave_after:
                    break
        assert laws == (0 if request.logprobs is None else len(tokens))
        assert index not in found
        found[index] = tuple(tokens), finish, ticket.id

    tasks = []
    for index, request in enumerate(requests):
        leave = dice.choice([None, None, None, 1, 6])
        pause = 0.1 if index % 25 == 7 else 0.0
        tasks.append(asyncio.create_task(one(index, request, leave, pause)))
        await asyncio.sleep(dice.choice([0.0, 0.0, 0.002]))
    await asyncio.gather(*tasks)
    while runner.engine.busy:
        await asyncio.sleep(0.01)
    return found
