"""Every program is compiled once, before a request needs it, and beside those that do not."""

import asyncio
import collections
import dataclasses
import threading
import types

import jax
import pytest

from jaxspec.decoding.sampling import Sampling
from jaxspec.decoding.schedule import Adaptive
from jaxspec.serving import runner as serving_runner
from jaxspec.serving.config import EngineConfig
from jaxspec.serving.engine import Engine
from jaxspec.serving.formats import regex_text
from jaxspec.serving.kept_programs import KeptPrograms
from jaxspec.serving.programs import Programs
from jaxspec.serving.requests import Request
from jaxspec.serving.runner import Runner
from tests import tiny
from tests.serving import engines
from tests.serving.structured import grammars, target

OPTIONS = dict(slots=2, room=60, chunk=16, max_nodes=4, top_logprobs=3, prefix_cache_mb=1.0)
LONG = tuple(range(2, 36))  # two pages of a prefix, and a rest
GRAMMAR = "(ab|cd){2,9}[0-9]*!"
PROMPTS = ["begin_prompt", "run_chunk", "end_prompt", "save_page", "load_pages"]
ROWS = ["empty_rows", "decode_rows", "place_row", "stop_rows", "recent_tokens"]
RESTRICTED = ["draft_rows", "judge_rows"]


@pytest.fixture(scope="module")
def engine():
    """Not yet open; its weights are bound to a device, as those that are read from files."""
    bound = jax.device_put(target().params, jax.devices()[0])
    own = dataclasses.replace(target(), params=bound)
    config = EngineConfig(**OPTIONS, schedule=Adaptive())
    setup = Engine(own, engines.LOOKUP, config)
    return Engine(own, engines.LOOKUP, config, curve=engines.staircase(setup))


@pytest.fixture
def compiled():
    """How often each program has been, so far."""
    found = collections.Counter()

    def note(event, seconds, fun_name="", **_):
        if event.endswith("backend_compile_duration"):
            found[fun_name.removeprefix("jit(").removesuffix(")")] += 1

    jax.monitoring.register_event_duration_secs_listener(note)
    yield found
    jax.monitoring.unregister_event_duration_listener(note)


def restricted(**options) -> Request:
    return Request(LONG, 12, grammar=grammars().of(regex_text(GRAMMAR)), **options)


@pytest.mark.slow
def test_every_program_is_compiled_once(engine, compiled):
    engine.open()
    assert {name: compiled[name] for name in PROMPTS + ROWS} == dict.fromkeys(PROMPTS + ROWS, 1)
    while engine.ready.prepare():
        pass
    expected = dict.fromkeys(PROMPTS, 1) | dict.fromkeys(ROWS, 2)
    expected["decode_rows"] += 1  # one row: first with few verify sizes, then with all
    assert {name: compiled[name] for name in expected} == expected
    before = dict(compiled)
    for seed in range(4):
        engine.submit(Request(LONG, 12, seed=seed, logprobs=2 if seed == 1 else None))
    engines.drain(engine)
    assert {name: n for name, n in compiled.items() if n != before.get(name)} == {}
    assert not compiled["draft_rows"]


@pytest.mark.slow
def test_grammars_are_compiled_beside_the_requests_without(engine, compiled, monkeypatch):
    """By the thread of the runner that compiles; here, when it is allowed to."""
    compile_, allowed = Programs.compile_restricted, threading.Event()

    def once_allowed(self, rows):
        assert allowed.wait(60) and threading.current_thread().name == "compiler"
        compile_(self, rows)

    monkeypatch.setattr(Programs, "compile_restricted", once_allowed)

    async def tokens(ticket) -> tuple[int, ...]:
        with ticket:
            return engines.tokens([update async for update in ticket])

    async def ask(runner):
        with runner.submit(restricted(seed=1)) as left:  # by its client, before it begins
            first = tokens(runner.submit(restricted()))
            free = [await tokens(runner.submit(Request(LONG, 12))) for _ in range(3)]
            left.cancel()
            assert [update.finish async for update in left] == ["cancelled"]
        assert not runner.engine.busy and runner.engine.waiting == 1
        allowed.set()
        return await first, free

    if not engine.ready.has(1):
        engine.warm_up()
    runner = Runner(engine)
    try:
        found, free = asyncio.run(ask(runner))
    finally:
        runner.close()
    assert {len(answer) for answer in free} == {12}
    assert {name: compiled[name] for name in RESTRICTED} == dict.fromkeys(RESTRICTED, 2)

    before = dict(compiled)
    for i in range(3):
        engine.submit(restricted() if i else Request(LONG, 12))
    again = engines.drain(engine)
    assert sorted(map(engines.tokens, again.values())) == sorted([free[0], found, found])
    assert compiled == before


def test_a_request_that_waits_for_a_row_presses():
    made = engines.cold(**engines.FEW)
    made.open()
    made.ready.beside = True
    prompt = tuple(tiny.prompts(34)[0])
    made.submit(Request(prompt, 20))
    made.step()
    assert not made.pressed
    waits = made.submit(Request(prompt, 12))
    while not made.pressed:
        assert all(update.id != waits or not update.finish for update in made.step())
    made.ready.prepare()
    updates = engines.drain(made)
    assert not made.pressed and len(engines.tokens(updates[waits])) <= 12


@pytest.mark.parametrize("comes", [dict(pressed=True), dict(busy=False)], ids=str)
def test_preparing_gives_way_to_requests(monkeypatch, comes):
    monkeypatch.setattr(serving_runner, "PATIENCE", 3600)
    runner = Runner.__new__(Runner)
    runner._closing, runner._news = False, threading.Event()
    runner.engine = types.SimpleNamespace(busy=True, pressed=False)
    prepares = threading.Thread(target=runner._give_way, daemon=True)
    prepares.start()
    prepares.join(0.2)
    assert prepares.is_alive()
    vars(runner.engine).update(comes)
    runner._news.set()  # as after every step
    prepares.join(60)
    assert not prepares.is_alive()


@pytest.mark.slow
def test_the_next_start_compiles_nothing(engine, compiled, tmp_path):
    options = OPTIONS | dict(slots=1, max_nodes=2)
    found = []
    for _ in range(2):
        kept = KeptPrograms(tmp_path / "programs")
        kept.expect("this start")
        made = Engine(engine.target, engines.LOOKUP, EngineConfig(**options), kept=kept)
        made.open()
        kept.remember("this start")
        found.append((made, kept.loaded, kept.compiled))
    (first, *cold), (second, *warm) = found
    others = ["empty_pool", "recent_logprobs", "move_rows"]
    count = len(PROMPTS + ROWS + others)
    assert (cold, warm) == ([0, count], [count, 0])

    def answers(made) -> list[tuple[int, ...]]:
        for options in (dict(seed=3), dict(logprobs=2)):
            made.submit(Request(LONG, 12, Sampling(temperature=0.8), **options))
        return sorted(map(engines.tokens, engines.drain(made).values()))

    expected, before = answers(engine), dict(compiled)
    assert [answers(made) for made in (first, second)] == [expected] * 2 and len(expected) == 2
    assert {name: n for name, n in compiled.items() if name in before} == before


@pytest.mark.slow
def test_an_engine_that_nobody_compiles_for_does_so_itself():
    engine = Engine(target(), config=EngineConfig(**OPTIONS | dict(slots=1)))
    id = engine.submit(restricted())
    text = target().tokenizer.decode(engines.tokens(engines.drain(engine)[id]))
    assert text.startswith(("ab", "cd"))
