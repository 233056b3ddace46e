"""The load generator's clocks and counts, and the simulator against sums done by hand."""

import asyncio

import numpy as np
import pytest

from jaxspec.serving.load import Seen, arrivals, closed_loop, mix, open_loop, summarise
from jaxspec.serving.simulate import Machine, simulate


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


MACHINE = Machine(
    bytes_per_second=1.0, flops_per_second=1.0, weight_bytes=1.0, cache_bytes=0.0,
    flops_per_node=0.1, draft_seconds=(0.0, 0.0),
)  # fmt: skip


def test_a_machines_floor_is_memory_then_arithmetic():
    assert MACHINE.seconds(4, 8, drafted=False) == 1.0
    assert MACHINE.seconds(4, 40, drafted=False) == pytest.approx(4.0)
    busy = Machine(draft_seconds=(1.0, 0.5))
    drafting = busy.seconds(3, 3, drafted=True) - busy.seconds(3, 3, drafted=False)
    assert drafting == pytest.approx(2.0)


def test_simulated_plain_decoding_is_one_token_a_round():
    found = simulate(MACHINE, "none", [0.0, 0.0], slots=2, tokens=10)
    assert (found.tau, found.nodes_per_row) == (1.0, 1.0)
    assert found.tokens_per_second == pytest.approx(2.0)
    assert found.per_token == pytest.approx(1.0)


def test_simulated_acceptance_follows_the_chances():
    """Nearly certain acceptance commits depth + 1 tokens a round."""
    options = dict(slots=1, tokens=400, depth=3, acceptance=(5000.0, 5.0))
    assert simulate(MACHINE, "fixed", [0.0], **options).tau > 3.7
    options["acceptance"] = (5.0, 5000.0)
    assert simulate(MACHINE, "fixed", [0.0], **options).tau < 1.1


@pytest.mark.parametrize(("users", "seed"), [(1, 0), (16, 1)])
def test_the_adaptive_rule_is_as_good_as_the_better_fixed_one(users, seed):
    options = dict(slots=users, tokens=60, depth=3, seed=seed)
    rates = {
        rule: simulate(MACHINE, rule, [0.0] * users, **options).tokens_per_second
        for rule in ("none", "fixed", "adaptive")
    }
    assert rates["adaptive"] >= 0.97 * max(rates["none"], rates["fixed"])
    if users == 1:  # alone, drafts are free; in a crowd each node costs
        assert rates["fixed"] > 1.5 * rates["none"]


def served_one_by_one(times):
    """Mean seconds from arrival to the end of a service of 1 s: Lindley's recursion."""
    free, waits = 0.0, []
    for at in times:
        free = max(free, at) + 1.0
        waits.append(free - at)
    return np.mean(waits)


def test_simulated_requests_queue_for_a_slot():
    """One slot and one round per request are the queue M/D/1: its law, and its very waits."""
    options = dict(slots=1, tokens=1)
    waits = []
    for rate in (0.2, 0.5, 0.8):
        times = arrivals(rate, 1500, seed=5)
        waits.append(simulate(MACHINE, "none", times, **options).first_token)
        assert waits[-1] == pytest.approx(served_one_by_one(times))
    assert waits[0] < waits[1] < waits[2]
    # Pollaczek and Khinchine: 1 + rate / (2 (1 - rate)); long queues converge slowly.
    assert waits[:2] == pytest.approx([1.125, 1.5], rel=0.1)


@pytest.mark.parametrize("rule", ["none", "fixed", "adaptive"])
def test_simulated_load_over_time(rule):
    """Time to first token rises with the rate of arrivals, and so do tokens per second until
    the machine has no more."""

    def found(rate):
        times = arrivals(rate, 60, seed=2)
        return simulate(MACHINE, rule, times, slots=4, tokens=12, depth=3, seed=3)

    calm, busy, crowd = found(0.01), found(0.3), found(3.0)
    assert found(0.3) == busy  # no clock, one seed
    assert calm.first_token < busy.first_token < crowd.first_token
    assert crowd.first_token > 10 * calm.first_token
    assert calm.tokens_per_second < busy.tokens_per_second < crowd.tokens_per_second
    if rule == "adaptive":  # alone a request drafts all it can, in a crowd less
        assert calm.nodes_per_row > 3.5 > crowd.nodes_per_row
