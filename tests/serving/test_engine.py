"""Continuous batching: every request gets what it gets alone, and nothing is left behind."""

import dataclasses
import queue
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxspec.decoding.curve import Curve
from jaxspec.decoding.sampling import Sampling
from jaxspec.decoding.schedule import Adaptive, Fixed, decode_rows, empty_rows
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.drafters.plain import Plain
from jaxspec.serving import programs, rows
from jaxspec.serving.config import EngineConfig
from jaxspec.serving.engine import Engine
from jaxspec.serving.requests import QueueFull, Request
from jaxspec.serving.runner import Runner
from tests import tiny
from tests.serving import engines
from tests.serving.engines import FEW, alone, drain, requests, tokens

WARM = {}


def warm(drafter="lookup", schedule="adaptive"):
    """One engine per kind, which must be idle between tests."""
    key = drafter, schedule
    if key not in WARM:
        few = FEW if drafter == "lookup" else FEW | dict(max_nodes=4)
        schedule_ = engines.SCHEDULES[schedule]
        WARM[key] = engines.engine(engines.DRAFTERS[drafter], schedule_, **few)
    assert not WARM[key].busy
    return WARM[key]


@pytest.mark.parametrize(
    ("drafter", "schedule"),
    [
        ("lookup", "adaptive"),
        pytest.param("survival tree", "adaptive", marks=pytest.mark.slow),
        pytest.param("survival chain", "adaptive", marks=pytest.mark.gate),
        pytest.param("lookup", "fixed", marks=pytest.mark.gate),
        pytest.param("small tree", "adaptive", marks=pytest.mark.gate),
        pytest.param("itself", "adaptive", marks=pytest.mark.gate),
    ],
)
def test_every_request_gets_what_it_would_get_alone(drafter, schedule):
    engine = warm(drafter, schedule)
    asked = requests(10)
    ids = [engine.submit(request) for request in asked]
    updates = drain(engine)
    assert sorted(updates) == sorted(ids)
    for id, request in zip(ids, asked, strict=True):
        assert tokens(updates[id]) == alone(request)
        (last,) = [u for u in updates[id] if u.finish]
        assert last is updates[id][-1]
        stops = request.sampling.stop_ids or ()
        stopped = alone(request)[-1] in stops
        assert last.finish == ("stop" if stopped else "length")
        assert sum(last.stats.committed) >= len(alone(request)) - 1
        assert last.stats.nodes >= last.stats.rounds


@pytest.mark.slow
def test_plain_decoding_needs_no_curve():
    engine = Engine(
        tiny.target(), LoadedDrafter(Plain()), EngineConfig(slots=2, room=60, chunk=16)
    )
    asked = requests(4)
    ids = [engine.submit(request) for request in asked]
    updates = drain(engine)
    assert engine.ready.curve is None
    assert [tokens(updates[i]) for i in ids] == [alone(r) for r in asked]


def test_requests_that_arrive_late_change_nothing():
    engine, asked = warm(), requests(8, seed=3)
    found, ids = {}, []
    for request in asked:
        ids.append(engine.submit(request))
        for _ in range(3):
            for update in engine.step():
                found.setdefault(update.id, []).append(update)
    drain(engine, found)
    assert [tokens(found[i]) for i in ids] == [alone(r) for r in asked]


@pytest.fixture
def still_clock(monkeypatch):
    """No burst of rounds takes any time."""
    monkeypatch.setattr(
        "jaxspec.serving.engine.time", SimpleNamespace(perf_counter=lambda: 0.0)
    )


def test_prompts_run_in_chunks_between_rounds(still_clock):
    """While a long prompt is run, a decoding row gets tokens at every step."""
    engine = warm()
    short = engine.submit(Request((1, 2), 40))
    for _ in range(3):
        engine.step()
    long = engine.submit(Request(tuple(tiny.prompts(50)[0]), 4))
    seen = []
    while not any(u.id == long for step in seen for u in step):
        seen.append(engine.step())
    assert len(seen) == 4  # 50 tokens in chunks of 16
    assert all(any(u.id == short and u.tokens for u in step) for step in seen)
    drain(engine)


def test_prompts_may_take_as_long_as_the_last_rounds_did(still_clock):
    engine = warm()
    asked = [Request(tuple(prompt), 4) for prompt in tiny.prompts(50, 40, 30)]
    ids = [engine.submit(request) for request in asked]
    engine.burst_seconds = 1.0
    found = {update.id: [update] for update in engine.step()}
    assert len(engine._rows) == engine._rows.running == 2
    assert engine.waiting == 0 and engine._prompt.batch is not None  # the third has no row
    drain(engine, found)
    assert len(found) == len(ids)


def test_a_request_alone_has_a_batch_of_one_row():
    engine = warm()
    engine.submit(requests(1)[0])
    sizes = set()
    while engine.busy:
        engine.step()
        sizes.add(engine._rows.batch.state.length.shape[0])
    assert sizes == {1}


def test_nothing_is_compiled_after_the_warm_up():
    programs = [decode_rows, rows.run_chunk, rows.begin_prompt, rows.end_prompt, rows.place_row]
    programs += [rows.move_rows, rows.stop_rows, rows.recent_tokens, empty_rows]
    engine = warm()
    before = [program._cache_size() for program in programs]
    asked = requests(12, seed=5)
    ids = [engine.submit(request) for request in asked]
    for step in range(6):
        engine.step()
        if step == 3:
            engine.cancel(ids[0])
            engine.cancel(ids[11])
    drain(engine)
    assert [program._cache_size() for program in programs] == before


def test_memory_returns_to_its_start():
    engine = warm()
    start = engine.device_bytes()
    for request in requests(9):
        engine.submit(request)
    peak = start
    while engine.busy:
        engine.step()
        peak = max(peak, engine.device_bytes())
    assert engine.device_bytes() == start
    assert start < peak <= (engine.config.slots + 1) * start  # a prompt has a row of its own


def test_cancelled_requests_leave_at_once():
    engine = warm()
    asked = [Request((1, 2, 3), 40, seed=i) for i in range(8)]
    ids = [engine.submit(request) for request in asked]
    found = {}
    for _ in range(7):
        for update in engine.step():
            found.setdefault(update.id, []).append(update)
    for id in (ids[0], ids[1], ids[7]):  # two are decoded, one waits
        engine.cancel(id)
    engine.cancel(10_000)  # never was
    for update in engine.step():
        found.setdefault(update.id, []).append(update)
    for id in (ids[0], ids[1], ids[7]):
        assert found[id][-1].finish == "cancelled"
    drain(engine, found)
    for id, request in zip(ids, asked, strict=True):
        expected = alone(request)
        if id in (ids[0], ids[1], ids[7]):
            got = tokens(found[id])
            assert len(got) < 40 and got == expected[: len(got)]
        else:
            assert tokens(found[id]) == expected
    engine.cancel(ids[3])  # has ended
    assert engine.step() == []


def test_a_full_queue_is_refused_and_loses_nothing():
    engine = engines.engine(queue=3, **FEW)  # the programs are there
    ids = [engine.submit(Request((1,), 5, seed=i)) for i in range(3)]
    with pytest.raises(QueueFull, match="full .3 waiting requests"):
        engine.submit(Request((1,), 5))
    assert sorted(drain(engine)) == ids
    engine.submit(Request((1,), 5))
    drain(engine)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request((), 5), "prompt is empty"),
        (Request((1, 11), 5), "token id 11; .* 0 … 10"),
        (Request((1, True), 5), "token id True"),
        (Request((1,), 0), "max_new_tokens is 0"),
        (Request((1,) * 40, 30), "40 tokens and 30 new ones exceed the 60 tokens"),
        (Request((1,), 5, seed=1.0), "seed is 1.0"),
        (Request((1,), 5, Sampling(stop_ids=tuple(range(9)))), "stop_ids has 9 ids"),
        (Request((1,), 5, Sampling(stop_ids=(11,))), "stop_ids has 11; .* 0 … 10"),
    ],
)
def test_requests_that_cannot_be_served(request_, message):
    with pytest.raises(ValueError, match=message):
        warm().submit(request_)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(room=600), "room is 600 .* has 512 positions"),
        (dict(slots=0), "slots is 0"),
        (dict(budget=4), "schedule is not Fixed"),
        (dict(budget=9, schedule=Fixed()), "budget is 9; .* 1 … 8"),
    ],
)
def test_bad_limits(options, message):
    with pytest.raises(ValueError, match=message):
        Engine(tiny.target(), engines.LOOKUP, EngineConfig(**options))


def test_an_adaptive_schedule_needs_a_drafter_and_older_survivals():
    with pytest.raises(ValueError, match="needs a drafter"):
        Engine(tiny.target(), config=EngineConfig(schedule=Adaptive()))
    with pytest.raises(ValueError, match="must not choose its own size"):
        Adaptive(age=0)


@pytest.mark.slow
def test_rejection_sampling_keeps_greedy_requests_exact():
    engine = engines.engine(
        engines.DRAFTERS["survival chain"], rejection=True, slots=1, max_nodes=4
    )
    asked = [Request(r.prompt, r.max_new_tokens) for r in requests(4)]
    asked.append(Request((1, 2), 12, Sampling(temperature=0.9)))
    ids = [engine.submit(request) for request in asked]
    updates = drain(engine)
    assert [tokens(updates[i]) for i in ids[:4]] == [alone(r) for r in asked[:4]]
    assert len(tokens(updates[ids[4]])) == 12


def test_the_engine_holds_the_cache_it_says():
    engine = warm()
    leaves = jax.tree.leaves(engine._rows.batch)
    assert engine.device_bytes() == sum(x.nbytes for x in leaves)


@pytest.mark.slow
def test_sampled_requests_do_not_spoil_greedy_ones():
    """The target drafts for itself: all is accepted at temperature 0, nearly nothing at 9, with
    a top-p at which drafters leave out the noise.

    A node costs so much that the sampled ones are better off without a draft.
    """
    config = EngineConfig(**engines.CONFIG | dict(schedule=Adaptive(), slots=1))
    setup = Engine(tiny.target(), engines.ITSELF, config).setup()
    seconds = [1 + 0.4 * total for total in setup["totals"]["1"]]
    curve = Curve(setup, {1: seconds})
    engine = Engine(tiny.target(), engines.ITSELF, config, curve=curve)
    engine.warm_up()

    def tau(request):
        id = engine.submit(request)
        (stats,) = [u.stats for u in drain(engine)[id] if u.stats]
        return stats.tau

    sampling = Sampling(temperature=9.0, top_p=0.7, stop_ids=())
    hot = [Request((1, i), 50, sampling, seed=i) for i in range(6)]
    assert np.mean([tau(request) for request in hot][2:]) < 1.5
    greedy = [Request((i, 2), 50, Sampling(stop_ids=())) for i in range(4)]
    assert min(tau(request) for request in greedy) > 1.5


def one_row() -> EngineConfig:
    """Of the programs that `warm` has compiled."""
    return EngineConfig(**engines.CONFIG | FEW | dict(slots=1, schedule=Adaptive()))


def test_a_missing_curve_is_measured_and_can_be_given_again(tmp_path, monkeypatch):
    found = iter([{1: [0.02, 0.03]}, {1: [0.01, 0.04]}])
    monkeypatch.setattr(programs.Programs, "turn", lambda self: next(found))
    config = one_row()
    engine = Engine(tiny.target(), engines.LOOKUP, config)
    engine.warm_up(repeats=2)
    assert engine.ready.curve.seconds == {1: [0.01, 0.03]}
    engine.ready.curve.save(tmp_path / "curve.json")
    again = Engine(
        tiny.target(), engines.LOOKUP, config, curve=Curve.load(tmp_path / "curve.json")
    )
    assert again.ready.curve == engine.ready.curve
    other = dataclasses.replace(config, room=100, slots=2)
    with pytest.raises(ValueError, match="measure it again"):
        Engine(tiny.target(), engines.LOOKUP, other, curve=engine.ready.curve)


@pytest.mark.slow
def test_it_answers_before_all_is_compiled():
    """One at a time at first; a larger batch is used once it is there."""
    config = EngineConfig(**engines.CONFIG | dict(schedule=Fixed(), slots=2))
    engine = Engine(tiny.target(), engines.LOOKUP, config)
    engine.open()
    asked = [Request((i, 2), 45, Sampling(stop_ids=())) for i in range(3)]
    ids = [engine.submit(request) for request in asked]
    updates = {}
    for _ in range(3):
        for update in engine.step():
            updates.setdefault(update.id, []).append(update)
    assert (len(engine._rows), engine.running, engine.waiting) == (1, 2, 1)
    left = iter(engine.ready.prepare, False)
    assert len(list(left)) == 2  # the larger batch, and the verify sizes between the ends
    drain(engine, updates)
    assert [tokens(updates[i]) for i in ids] == [alone(r) for r in asked]


def test_step_times_are_measured_while_nobody_asks(monkeypatch):
    monkeypatch.setattr(programs.Programs, "turn", lambda self: {1: [0.01, 0.03]})
    config = one_row()
    engine = Engine(tiny.target(), engines.LOOKUP, config)
    engine.open()
    kept = queue.Queue()
    runner = Runner(engine, kept.put)
    try:
        assert kept.get(timeout=60) == engine.ready.curve
        assert runner.healthy and engine.ready.curve.seconds == {1: [0.01, 0.03]}
    finally:
        runner.close()


def test_step_times_that_cannot_be_kept_are_used_and_told_of(monkeypatch, tmp_path):
    told = queue.Queue()
    monkeypatch.setattr("jaxspec.serving.runner.log.warning", lambda *text: told.put(text))
    monkeypatch.setattr(programs.Programs, "turn", lambda self: {1: [0.01, 0.03]})
    engine = Engine(tiny.target(), engines.LOOKUP, one_row())
    engine.open()
    runner = Runner(engine, lambda curve: curve.save(tmp_path / "nowhere" / "curve.json"))
    try:
        message, error = told.get(timeout=60)
        assert "step times are not kept" in message and isinstance(error, FileNotFoundError)
        assert runner.healthy and engine.ready.curve.seconds == {1: [0.01, 0.03]}
    finally:
        runner.close()


def test_step_times_of_no_use_are_not_used(monkeypatch):
    """They say that nodes cost nothing."""
    monkeypatch.setattr(programs.Programs, "turn", lambda self: {1: [0.01, 0.01]})
    config = one_row()
    engine = Engine(tiny.target(), engines.LOOKUP, config)
    with pytest.raises(ValueError, match="curve is flat"):
        engine.warm_up()
    assert engine.ready.curve is None and not engine.ready.measure()
