"""Times the steps of decoding on this machine, each beside its floor.

    python examples/gpu/steps.py
    python examples/gpu/steps.py --model qwen3-32b --cases plain verify64 best_first64
    python examples/gpu/steps.py --batch 1 8 64 --length 900 --cases plain chain16
    python examples/gpu/steps.py --cases plain --profile plain

Cases, with a number of nodes (or of tokens) behind them:

    plain          one round of plain decoding
    verify64       one forward over 64 given nodes, without drafting
    prefill512     the whole prompt, in chunks of 512
    pass           the drafter's pass over a block, logits included
    draft-chain16  pass and growth of a tree of 16 nodes
    chain16        a whole round; so best_first64, top_budget64, transitions64 and
                   path_conditioned64 (the last two with a Markov head of rank 256)

The floor is the larger of two times, at rates measured in the same run: reading every necessary
byte at a copy's rate, and computing every product at a large product's rate.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys

import jax
import jax.numpy as jnp
import kernels
import timing
from shapes import MODELS, Branches, Weights, block_drafter, case_parts, dtype_here, requests

from jaxspec.decoding.loop import decode
from jaxspec.decoding.prefill import prefill
from jaxspec.decoding.state import Decoder
from jaxspec.drafters.plain import Plain
from jaxspec.drafters.weights import bind
from jaxspec.planning.floors import Floor, draft_floor, program_floor, target_floor
from jaxspec.planning.setup import Setup
from jaxspec.trees.tree import root_only

# Batch, tokens behind, cases: the table of docs/h100.md.
TABLE = (
    (
        1,
        3500,
        "plain verify16 verify64 verify128 verify256 prefill512 prefill2048 pass draft-chain16 "
        "draft-best_first64 draft-path_conditioned64 chain16 best_first64 path_conditioned64",
    ),
    (1, 32_000, "plain verify64 prefill512 best_first64"),
    (8, 900, "plain chain16"),
    (32, 900, "plain verify8"),
)
TINY = "plain verify4 prefill512 pass path_conditioned8"  # cases of the tiny model
CHUNK = 512  # prompt tokens at a time, and the unit of capacities
ROOM = 1024  # cache rows for new tokens
ROUNDS, DRAFTS, PROFILED = 32, 32, 8


@dataclasses.dataclass(frozen=True)
class Place:
    """The batch that steps are timed on: rows, and tokens before each step."""

    batch: int
    length: int

    @property
    def capacity(self) -> int:
        return -(-(self.length + ROOM) // CHUNK) * CHUNK


@functools.partial(jax.jit, static_argnames="drafter")
def drafts(drafter, params, state, anchor, position, budget, times):
    """Drafts repeatedly, each from a token of the previous draft."""

    def again(_, tree):
        anchor = tree.tokens[:, min(1, drafter.size - 1)]
        return drafter.draft(params, state, anchor, position, budget)[0]

    return jax.lax.fori_loop(0, times, again, root_only(anchor, size=drafter.size))


@functools.partial(jax.jit, static_argnames="drafter")
def passes(drafter, params, state, anchor, position, times):
    """Only the head's pass, from a token to the logits of a block."""

    def once(anchor):
        head = bind(drafter.config, params.head)
        stream = drafter.stream(params, state, anchor, position)
        return head.logits(params.vocabulary, stream)

    def again(_, logits):
        return once(jnp.argmax(logits[:, 0, :64], axis=-1).astype(jnp.int32))

    return jax.lax.fori_loop(0, times, again, jnp.zeros(jax.eval_shape(once, anchor).shape))


class Bench:
    """The programs of one model and how each is run."""

    def __init__(self, model: str, dtype):
        self.model, self.config = model, MODELS[model]
        self.weights = Weights(self.config, dtype)
        self._prefilled: dict[Place, tuple] = {}

    def drafter(self, case: str):
        """The drafter of a case, or None."""
        kind, n = case_parts(case.removeprefix("draft-"))
        if kind == "plain":
            return Plain()
        if kind == "verify":
            return Branches(n)
        if kind == "prefill":
            return None
        return block_drafter(self.config, "chain" if kind == "pass" else kind, n or 16)

    @functools.cached_property
    def base(self) -> Decoder:
        """Fills the caches of every case; a Markov head changes nothing there."""
        return Decoder(self.config, block_drafter(self.config, "chain", 16), chunk=CHUNK)

    def compile_prefill(self, place: Place, chunk: int):
        decoder = dataclasses.replace(self.base, chunk=chunk)
        asked = self.requests(place, chunk)
        return prefill.lower(decoder, self.weights.params(decoder.drafter), asked).compile()

    def requests(self, place: Place, chunk: int = CHUNK):
        capacity = -(-place.capacity // chunk) * chunk
        return requests(
            self.config,
            batch=place.batch,
            length=place.length,
            capacity=capacity,
            new_tokens=ROOM - 64,
            nodes=1,
        )

    def abstract_state(self, place: Place):
        """Of a block drafter, as `prefill` makes it."""
        params = self.weights.params(self.base.drafter)
        return jax.eval_shape(
            functools.partial(prefill, self.base), params, self.requests(place)
        )

    def compile(self, place: Place, case: str, state):
        """The program of a case, from shapes of the state that the base's prefill makes."""
        drafter = self.drafter(case)
        params = self.weights.params(drafter)
        rows = jax.ShapeDtypeStruct((place.batch,), jnp.int32)
        times = jax.ShapeDtypeStruct((), jnp.int32)
        if case == "pass":
            args = drafter, params.drafter, state.drafter, rows, rows, times
            return passes.lower(*args).compile()
        if case.startswith("draft-"):
            args = drafter, params.drafter, state.drafter, rows, rows, rows, times
            return drafts.lower(*args).compile()
        own = self.drafter_state(drafter, place, state.drafter)
        decoder = Decoder(self.config, drafter, chunk=CHUNK)
        state = dataclasses.replace(state, drafter=own)
        sampling = self.requests(place).sampling
        return decode.lower(decoder, params, state, sampling, times).compile()

    def drafter_state(self, drafter, place: Place, caches):
        """A block drafter's is the base's caches; others make their own."""
        if isinstance(drafter, Plain | Branches):
            return drafter.init((), place.batch, place.capacity)
        return caches

    def floor(self, place: Place, case: str) -> Floor:
        kind, _ = case_parts(case)

        def setup(drafter, length=place.length):
            context = -(-length // Setup.chunk) * Setup.chunk
            return Setup(self.config, drafter, context=context, batch=place.batch)

        if kind == "prefill":  # half of the positions are behind a token on average
            tokens = place.batch * place.length
            return target_floor(
                setup(Plain(), place.length // 2), tokens, predicted=place.batch
            )
        if kind == "pass" or kind.startswith("draft-"):
            return draft_floor(setup(self.drafter(case)))
        return program_floor(setup(self.drafter(case)), "round")


class Prefilled:
    """A prompt in the caches, from which every case starts."""

    def __init__(self, bench: Bench, place: Place, program):
        self.place, self.sampling = place, bench.requests(place).sampling
        params = bench.weights.params(bench.base.drafter)
        state = program(params, bench.requests(place))
        self.cache, self.caches = state.cache, state.drafter
        self._small = {
            field.name: jax.device_get(getattr(state, field.name))
            for field in dataclasses.fields(state)
            if field.name not in ("cache", "drafter")
        }
        self._state = type(state)

    def state(self, drafter_state, nodes: int):
        """The state right after the prompt; rows written since lie past its length."""
        small = jax.device_put(self._small)
        budget = jnp.full_like(small["budget"], nodes)
        small |= dict(budget=budget)
        return self._state(**small, cache=self.cache, drafter=drafter_state)


def measure_round(
    bench: Bench, prefilled: Prefilled, case: str, program, profiled: bool
) -> dict:
    drafter = bench.drafter(case)
    params = bench.weights.params(drafter)
    own = bench.drafter_state(drafter, prefilled.place, prefilled.caches)
    state = prefilled.state(own, drafter.size)
    block = own is prefilled.caches
    seen = 0

    def run(rounds=ROUNDS):
        nonlocal state
        state = program(params, state, prefilled.sampling, jnp.int32(rounds))
        prefilled.cache = state.cache  # the old one was donated
        if block:
            prefilled.caches = state.drafter
        return state

    def done():
        nonlocal seen
        seen, before = int(jax.device_get(state.rounds).max()), seen
        return seen - before

    found = timing.milliseconds(run, done)
    rounds, tokens = (jax.device_get(x).sum() for x in (state.rounds, state.committed))
    found |= dict(tau=round(float(tokens / rounds), 2))
    return found | profile(functools.partial(run, PROFILED), profiled)


def profile(run, wanted: bool) -> dict:
    return dict(kernels=kernels.by_time(run, PROFILED)) if wanted else {}


def measure_draft(
    bench: Bench, prefilled: Prefilled, case: str, program, profiled: bool
) -> dict:
    drafter = bench.drafter(case)
    params = bench.weights.params(drafter).drafter
    batch = prefilled.place.batch
    anchor = jnp.ones(batch, jnp.int32)
    position = jnp.full(batch, prefilled.place.length, jnp.int32)
    args = [params, prefilled.caches, anchor, position]
    if case != "pass":
        args.append(jnp.full(batch, drafter.size, jnp.int32))

    def run(times=DRAFTS):
        return program(*args, jnp.int32(times))

    return timing.milliseconds(run, DRAFTS) | profile(
        functools.partial(run, PROFILED), profiled
    )


def measure_prefill(bench: Bench, place: Place, chunk: int, program) -> dict:
    params, asked = bench.weights.params(bench.base.drafter), bench.requests(place, chunk)
    found = timing.milliseconds(lambda: program(params, asked).length)
    rate = 1e3 * place.batch * place.length / found["ms"]
    return found | dict(tokens_per_second=round(rate))


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    table = [(Place(b, n), cases.split()) for b, n, cases in TABLE]
    if options.cases or options.batch or options.length:
        places = itertools.product(options.batch or [1], options.length or [3500])
        table = [(Place(*place), options.cases or TABLE[0][2].split()) for place in places]
    for case in {case for _, cases in table for case in cases}:
        check(case)
    rows = timing.Rows("steps", options)
    dtype = dtype_here(options.dtype)
    settings = dict(model=options.model, dtype=dtype.name)
    wanted = [
        (place, [case for case in cases if not rows.known(**of(settings, place, case))])
        for place, cases in table
    ]
    wanted = [(place, cases) for place, cases in wanted if cases]
    if wanted:
        run(rows, Bench(options.model, dtype), wanted, settings, options)
    return rows.finish()


def run(rows: timing.Rows, bench: Bench, table, settings: dict, options) -> None:
    jobs = {}
    for place, cases in table:
        state = bench.abstract_state(place)
        for case in cases:
            kind, n = case_parts(case)
            if kind == "prefill":
                jobs[place, case] = functools.partial(bench.compile_prefill, place, n)
            else:
                bench.weights.params(bench.drafter(case))  # made before threads ask for them
                jobs[place, case] = functools.partial(bench.compile, place, case, state)
        first = functools.partial(bench.compile_prefill, place, CHUNK)
        jobs.setdefault((place, f"prefill{CHUNK}"), first)
    programs = timing.compile_all(jobs, threads=options.threads, seconds=rows.left)
    for place, cases in table:
        prefilled = []  # once it is needed

        def start(place=place, prefilled=prefilled):
            if not prefilled:
                program = programs[place, f"prefill{CHUNK}"]()
                prefilled.append(Prefilled(bench, place, program))
            return prefilled[0]

        def find(case, place=place, start=start, prefilled=prefilled):
            program = programs[place, case]()
            kind, n = case_parts(case)
            profiled = case in options.profile
            if kind == "prefill":
                found = measure_prefill(bench, place, n, program)
            elif kind == "pass" or kind.startswith("draft-"):
                found = measure_draft(bench, start(), case, program, profiled)
            else:
                try:
                    found = measure_round(bench, start(), case, program, profiled)
                except Exception:
                    prefilled.clear()  # its caches were given to the program that failed
                    raise
            floor = timing.floor_ms(bench.floor(place, case), rows.rates)
            found |= dict(floor_ms=round(floor, 4), share=round(floor / found["ms"], 3))
            if "kernels" in found:
                kernels.show(case, found["kernels"], bench.config.num_layers)
            return found

        for case in cases:
            rows.measure(functools.partial(find, case), **of(settings, place, case))
        prefilled.clear()


def of(settings: dict, place: Place, case: str) -> dict:
    return settings | dataclasses.asdict(place) | dict(case=case)


def check(case: str) -> None:
    """Exits with one line if a case is unknown."""
    kind, n = case_parts(case.removeprefix("draft-"))
    trees = ("chain", "best_first", "top_budget", "path_conditioned", "transitions")
    numbered = kind in trees or kind in ("verify", "prefill")
    if (numbered and n) or case in ("plain", "pass"):
        return
    sys.exit(
        f"case {case!r} is not known; expected plain, pass, verifyN, prefillN, draft-TREEn or "
        f"TREEn, where TREE is one of {trees} and N a number of nodes or of tokens"
    )


def parse(arguments: list[str] | None):
    parser = timing.parser(__doc__.splitlines()[0], "steps")
    parser.add_argument("--model", choices=MODELS, default="qwen3-8b")
    parser.add_argument(
        "--cases", nargs="+", help="without any selection: the whole table; a few for tiny"
    )
    parser.add_argument("--batch", type=int, nargs="+")
    parser.add_argument("--length", type=int, nargs="+", help="tokens behind")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"))
    parser.add_argument("--profile", nargs="+", default=[], help="cases to show by kernel")
    return timing.parse(parser, arguments, cases=TINY.split(), length=[20])


if __name__ == "__main__":
    timing.leave(main())
