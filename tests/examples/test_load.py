"""The load generator's clocks and counts."""

import asyncio

import numpy as np
import pytest

from examples.load import Seen, arrivals, closed_loop, mix, open_loop, summarise


def test_poisson_arrivals():
    times = arrivals(4.0, 4000, seed=1)
    gaps = np.diff([0.0, *times])
    assert gaps.min() > 0
    assert gaps.mean() == pytest.approx(0.25, rel=0.05)
    assert gaps.std() == pytest.approx(0.25, rel=0.08)  # exponential: as wide as its mean
    assert arrivals(4.0, 5, seed=1) == times[:5] != arrivals(4.0, 5, seed=2)
    with pytest.raises(ValueError, match="rate is 0"):
        arrivals(0, 3)


def test_a_mix_replays_every_prompt_equally_often():
    drawn = mix("abcd", 12, seed=3)
    assert all(drawn.count(c) == 3 for c in "abcd") and drawn != list("abcd" * 3)


class Server:
    """Answers after a while; knows how many it answers at once."""

    def __init__(self, seconds=0.02):
        self.seconds, self.now, self.most = seconds, 0, 0

    async def __call__(self, tokens):
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            if tokens == 0:
                raise RuntimeError("refused")
            for _ in range(tokens):
                await asyncio.sleep(self.seconds)
                yield 1
        finally:
            self.now -= 1


def test_a_closed_loop_has_so_many_users():
    server = Server()
    seen = asyncio.run(closed_loop(server, [2] * 9, users=3))
    assert len(seen) == 9 and server.most == 3
    for one in seen:
        assert one.tokens == 2 and one.error is None
        assert one.sent + 0.02 <= one.first + 1e-3 <= one.last


def test_an_open_loop_does_not_wait_for_answers():
    server = Server(seconds=0.15)
    seen = asyncio.run(open_loop(server, [1] * 5, [0.0, 0.01, 0.02, 0.03, 0.04]))
    assert server.most == 5
    assert [one.sent for one in seen] == pytest.approx([0, 0.01, 0.02, 0.03, 0.04], abs=0.05)


def test_failures_are_counted():
    seen = asyncio.run(closed_loop(Server(0.0), [0, 3, 0], users=1))
    assert [one.error for one in seen] == [
        "RuntimeError: refused",
        None,
        "RuntimeError: refused",
    ]
    assert summarise(seen).failed == 2
    with pytest.raises(ValueError, match="none of 1 requests got a token"):
        summarise(seen[:1])


def test_summary():
    found = summarise([Seen(0.0, 1.0, 3.0, 5), Seen(1.0, 4.0, 4.0, 1), Seen(2.0, 3.0, 5.0, 3)])
    assert found.tokens_per_second == pytest.approx(9 / 5)
    assert found.first_token[0] == pytest.approx(1.0)
    assert found.per_token[0] == pytest.approx(0.75)  # of 0.5 and 1; the single token has none
    assert (found.requests, found.failed) == (3, 0)
