"""Times whole generations at a prescribed acceptance, end to end.

    python examples/gpu/replay.py --tau 4 6 8 10.8 --nodes 64 256
    python examples/gpu/replay.py --survival 0.9 0.8 0.7 --nodes 16 --draft none

This is a replay, and every row says so. The target first continues its prompt plainly. Then it
decodes again with a drafter that knows this continuation and proposes a tree of N nodes: known
tokens down to a depth that is drawn for every position, wrong tokens elsewhere. A depth of d or
more has probability q_d, the survival profile: given, or geometric with mean acceptance length
1 + q_1 + … + q_P = tau. Verification is real. So is drafting, unless --draft is none: a drafter
of published shape makes its pass and grows its tree, and then its tokens are replaced.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import timing
from shapes import MODELS, Weights, block_drafter, dtype_here, requests

from jaxspec.decoding.loop import decode
from jaxspec.decoding.prefill import prefill
from jaxspec.decoding.state import Decoder, Params
from jaxspec.drafters.base import Drafter
from jaxspec.drafters.plain import Plain
from jaxspec.trees.tree import NO_PARENT, DraftTree

CHUNK = 512
UNLIMITED = np.int32(2**30)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Known:
    """Params of a replay.

    Attributes:
      tokens: [B, S] int32, the prompt and its plain continuation.
      survival: [P] float32, q_1 … q_P; none is larger than the one before it.
      keys: [B] typed keys; with the position they decide the depth to which a draft is right.
      beside: the real drafter's weights.
    """

    tokens: jax.Array
    survival: jax.Array
    keys: jax.Array
    beside: Any


@dataclasses.dataclass(frozen=True)
class Replay(Drafter):
    """Drafts the known continuation, to a depth drawn from the survival profile.

    A chain of P tokens, right down to the drawn depth and wrong below it, and wrong siblings of
    its nodes up to N in all. The state is the real drafter's, with the tokens, parents and
    depths of its last tree, so that XLA cannot drop its work.

    Attributes:
      beside: the real drafter, whose cost is kept; None drafts for nothing.
    """

    size: int
    depth: int
    beside: Drafter | None = None
    verify_sizes: tuple[int, ...] = ()

    @property
    def taps(self) -> tuple[int, ...]:
        return self.beside.taps if self.beside else ()

    def init(self, params: Known, batch: int, capacity: int):
        own = self.beside.init(params.beside, batch, capacity) if self.beside else ()
        nothing = jnp.zeros((batch, self.size), jnp.int32)
        return own, (nothing, nothing, nothing)

    def observe(self, params: Known, state, committed):
        own, drawn = state
        if self.beside:
            own = self.beside.observe(params.beside, own, committed)
        return own, drawn

    def draft(self, params: Known, state, anchor, position, budget, noise=None):
        own, drawn = state
        if self.beside:
            tree, own = self.beside.draft(params.beside, own, anchor, position, budget, noise)
            drawn = tree.tokens, tree.parents, tree.depths
        grow = jax.vmap(self._tree, in_axes=(None, 0, 0, 0, 0, 0))
        known = params.survival, params.tokens, params.keys
        return grow(*known, anchor, position, budget), (own, drawn)

    def _tree(self, survival, tokens, key, anchor, position, budget) -> DraftTree:
        """One row's tree."""
        node = jnp.arange(self.size)
        chain = node <= self.depth
        # Siblings hang beside the chain's nodes, depth by depth.
        beside = 1 + (node - self.depth - 1) % self.depth
        depths = jnp.where(chain, node, beside)
        follows = jax.lax.dynamic_slice_in_dim(tokens, position + 1, self.depth)
        right = follows[jnp.maximum(depths - 1, 0)]
        reached = jnp.sum(jax.random.uniform(jax.random.fold_in(key, position)) < survival)
        wrong = jnp.where(right > node, right - 1 - node, right + 1 + node)
        token = jnp.where(chain & (depths <= reached), right, wrong)
        valid = node < budget
        return DraftTree(
            tokens=jnp.where(valid, token, 0).at[0].set(anchor).astype(jnp.int32),
            parents=jnp.where(valid & (node > 0), depths - 1, NO_PARENT),
            depths=jnp.where(valid, depths, 0),
            scores=jnp.where(valid, -depths.astype(jnp.float32), -jnp.inf),
            valid=valid,
        )


def geometric(tau: float, depth: int) -> np.ndarray:
    """q_d = r^d with 1 + q_1 + … + q_P = tau.

    Raises:
      ValueError: no profile of P depths has this mean.
    """
    if not 1 <= tau <= depth + 1:
        raise ValueError(f"tau is {tau}; with {depth} drafted tokens it is 1 … {depth + 1}")
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        total = 1 + sum(middle**d for d in range(1, depth + 1))
        low, high = (middle, high) if total < tau else (low, middle)
    return np.array([high**d for d in range(1, depth + 1)], np.float32)


class Bench:
    """One target, one prompt, its plain continuation, and replays of it."""

    def __init__(self, options, dtype):
        self.config, self.options = MODELS[options.model], options
        self.weights = Weights(self.config, dtype)
        self.depth = block_drafter(self.config, "chain", 16).depth
        room = options.length + options.new_tokens + self.depth + 1
        self.capacity = -(-room // CHUNK) * CHUNK

    def requests(self, nodes: int):
        return requests(
            self.config,
            batch=self.options.batch,
            length=self.options.length,
            capacity=self.capacity,
            new_tokens=self.options.new_tokens,
            nodes=nodes,
        )

    def drafter(self, nodes: int):
        """Plain decoding is a tree of one node."""
        if nodes == 1:
            return Plain()
        tree = self.options.draft
        beside = block_drafter(self.config, tree, nodes) if tree != "none" else None
        return Replay(nodes, min(self.depth, nodes - 1), beside)

    def params(self, drafter, tokens=None, survival=None) -> Params:
        """Params of a replay; without tokens, of the same shapes, to compile with."""
        if isinstance(drafter, Plain):
            return self.weights.params(drafter)
        if tokens is None:
            tokens = jnp.zeros((self.options.batch, self.capacity), jnp.int32)
            survival = np.zeros(drafter.depth, np.float32)
        beside = self.weights.params(drafter.beside).drafter if drafter.beside else ()
        keys = jax.random.split(jax.random.key(11), self.options.batch)
        known = Known(tokens, jnp.asarray(survival), keys, beside)
        return Params(self.weights.target, known)

    def compile(self, nodes: int):
        """Prefill and decode."""
        drafter = self.drafter(nodes)
        decoder = Decoder(self.config, drafter, chunk=CHUNK)
        params, asked = self.params(drafter), self.requests(nodes)
        lowered = prefill.lower(decoder, params, asked)
        rounds = jax.ShapeDtypeStruct((), jnp.int32)
        decoding = decode.lower(decoder, params, lowered.out_info, asked.sampling, rounds)
        return lowered.compile(), decoding.compile()

    def generate(self, programs, nodes: int, **known):
        """The final state, and (milliseconds of the prompt, of the rest) once per repeat."""
        prefilling, decoding = programs
        params, asked = self.params(self.drafter(nodes), **known), self.requests(nodes)
        spent, state = [], None

        def start():
            nonlocal state
            state = prefilling(params, asked)
            return state

        def finish():
            nonlocal state
            state = decoding(params, state, asked.sampling, UNLIMITED)
            return state

        for _ in range(1 + timing.REPEATS):  # the first warms up
            spent.append((timing.once(start), timing.once(finish)))
        return jax.device_get((state.tokens, state.rounds, state.length)), spent[1:]

    def row(self, programs, nodes: int, plain=None, **known) -> dict:
        """The row of a generation, compared with plain decoding if given."""
        (tokens, rounds, length), spent = self.generate(programs, nodes, **known)
        # The prompt's own forward decides the first token.
        decoded = int((length - self.options.length - 1).sum())
        prompt, rest = np.median(np.array(spent), axis=0)
        row = dict(
            tokens=decoded,
            prompt_ms=round(prompt, 2),
            decode_ms=round(rest, 2),
            ms=round(rest / int(rounds.max()), 4),
            tau=round(decoded / int(rounds.sum()), 3),
            tokens_per_second=round(1e3 * decoded / rest, 1),
            with_prompt=round(1e3 * (decoded + len(rounds)) / (prompt + rest), 1),
        )
        if plain is not None:
            same = tokens == plain["output"]
            row |= dict(equal=bool(same.all()), speedup=round(plain["decode_ms"] / rest, 2))
            if not row["equal"] and self.weights.dtype == jnp.float32:
                at = int(np.argmin(same.all(axis=0)))
                raise AssertionError(f"position {at} differs from plain decoding in float32")
        return row | dict(output=tokens)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    dtype = dtype_here(options.dtype)
    rows = timing.Rows("replay", options, rates=False)
    bench = Bench(options, dtype)
    profiles = {}
    for nodes, tau in itertools.product(options.nodes, options.tau):
        depth = min(bench.depth, nodes - 1)
        if tau <= depth + 1:
            profiles[nodes, tau] = geometric(tau, depth)
        else:
            print(f"{nodes} nodes reach no tau of {tau}: left out", file=sys.stderr)
    if options.survival:
        profiles = {}
        for nodes in options.nodes:
            depth = min(bench.depth, nodes - 1)
            given = np.array(options.survival, np.float32)[:depth]
            given = np.pad(given, (0, depth - len(given)))
            profiles[nodes, round(float(1 + given.sum()), 3)] = given
    sizes = [1, *dict.fromkeys(nodes for nodes, _ in profiles)]
    for nodes in sizes:  # weights are made before threads ask for them
        bench.params(bench.drafter(nodes))
    jobs = {nodes: functools.partial(bench.compile, nodes) for nodes in sizes}
    programs = timing.compile_all(jobs, threads=options.threads, seconds=rows.left)
    settings = dict(
        replay=True,
        model=options.model,
        dtype=dtype.name,
        batch=options.batch,
        length=options.length,
        new_tokens=options.new_tokens,
    )
    plain = {}

    def without_output(row: dict) -> dict:
        return {name: value for name, value in row.items() if name != "output"}

    def find_plain():
        plain.update(bench.row(programs[1](), 1))
        return without_output(plain)

    def find(nodes, profile):
        if not plain:
            find_plain()
        known = dict(tokens=jnp.asarray(plain["output"]), survival=profile)
        return without_output(bench.row(programs[nodes](), nodes, plain, **known))

    rows.measure(find_plain, **settings, draft="none", nodes=1, asked_tau=1)
    for (nodes, tau), profile in profiles.items():
        key = settings | dict(draft=options.draft, nodes=nodes, asked_tau=tau)
        rows.measure(functools.partial(find, nodes, profile), **key)
    return rows.finish()


def parse(arguments: list[str] | None):
    parser = timing.parser(__doc__.splitlines()[0], "replay")
    parser.add_argument("--model", choices=MODELS, default="qwen3-8b")
    parser.add_argument("--nodes", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--tau", type=float, nargs="+", default=[4, 6, 8, 10.8])
    parser.add_argument("--survival", type=float, nargs="+", help="q_1 q_2 …, in place of tau")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=1000, help="tokens of the prompt")
    parser.add_argument("--new-tokens", type=int, default=1024)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"))
    parser.add_argument(
        "--draft",
        choices=(
            "none",
            "chain",
            "best_first",
            "top_budget",
            "path_conditioned",
            "transitions",
        ),
        default="best_first",
        help="the tree whose drafting is paid for",
    )
    tiny = dict(nodes=[8], tau=[4], length=12, new_tokens=40)
    options = timing.parse(parser, arguments, **tiny)
    if min(options.nodes) < 2:
        parser.error(f"--nodes is {options.nodes}; a tree has at least 2")
    profile = [1.0, *(options.survival or [])]
    if any(not 0 <= q <= before for before, q in zip(profile, profile[1:], strict=False)):
        parser.error(f"--survival is {options.survival}; expected 1 >= q_1 >= q_2 >= … >= 0")
    return options


if __name__ == "__main__":
    timing.leave(main())
