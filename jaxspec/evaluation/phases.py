"""Times the phases of a round, each compiled and timed separately, at batch size 1."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.decoding.fitting import own_sizes, smallest
from jaxspec.decoding.prefill import prefill
from jaxspec.decoding.requests import capacity_for, decoder_for, pack, request_keys
from jaxspec.decoding.round import commit, judge, propose
from jaxspec.decoding.sampling import Sampling
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.drafters.plain import PLAIN
from jaxspec.drafters.weights import bind
from jaxspec.models.decoder import forward_chain, unembed
from jaxspec.models.state import init_states
from jaxspec.models.target import Target
from jaxspec.trees.candidates import likeliest

Name = TypeVar("Name")

REPEATS = 20
VERIFY_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


def verify_costs(
    target: Target, sizes: Sequence[int] | None = None, *, length: int = 200
) -> dict[int, float]:
    """Milliseconds of one forward with its logits over n nodes, after `length` tokens.

    Args:
      sizes: values of n; `VERIFY_SIZES` by default.
    """
    sizes = VERIFY_SIZES if sizes is None else sizes
    c, params = target.config, target.params
    capacity = -(-(length + max(sizes)) // 128) * 128
    dtype = decoder_for(target, PLAIN)[0].cache_dtype or params.embed.dtype
    cache = init_states(c, 1, capacity, dtype)
    lengths = jnp.array([length])

    def forward_over(n: int):
        tokens = jnp.ones((1, n), jnp.int32)
        return lambda: _verify_chain(params, c, tokens, cache, lengths)

    return medians_ms({n: forward_over(n) for n in sizes})


def phase_costs(
    target: Target,
    drafter: LoadedDrafter,
    *,
    budget: int | None = None,
    length: int = 200,
    sampling: Sampling = Sampling(),
) -> dict[str, float | None]:
    """Milliseconds of the phases of a round after a prompt of `length` random tokens.

    Returns:
      draft: the drafter's pass with its base logits. grow: the sequential head and the tree,
      which is the whole proposal's time minus the pass; None if the drafter is not a block
      drafter, whose `draft` is the whole proposal. verify: the forward over the tree, and
      acceptance. commit: cache writes and the drafter's `observe`.
    """
    parts = phase_programs(target, drafter, budget=budget, length=length, sampling=sampling)
    commit = parts.pop("commit")
    return phases_of(medians_ms(parts) | medians_ms({"commit": commit}))


def phase_programs(
    target: Target,
    drafter: LoadedDrafter,
    *,
    budget: int | None,
    length: int,
    sampling: Sampling = Sampling(),
) -> dict[str, Callable[[], Any]]:
    """The programs of a round, which may be called repeatedly; see `phases_of`.

    All but "commit" start from the state after prefill; "commit" continues from its last state.
    """
    decoder, params = decoder_for(target, drafter)
    prompt = np.random.default_rng(0).integers(0, target.config.vocab_size, length).tolist()
    requests = pack(
        decoder,
        [prompt],
        batch=1,
        capacity=capacity_for(length + 64, decoder),
        max_new_tokens=64,
        budget=budget or drafter.drafter.size,
        sampling=[dataclasses.replace(sampling, stop_ids=())],
        keys=request_keys(0, 1),
    )
    rows = requests.sampling
    state = prefill(decoder, params, requests)
    draft = _propose(decoder, params, state, rows)
    verdict = _verify(decoder, params, state, rows, draft)

    def step():
        nonlocal state  # its buffers are donated
        state = _commit(decoder, params, state, rows, verdict)
        return state

    parts = {
        "propose": lambda: _propose(decoder, params, state, rows),
        "verify": lambda: _verify(decoder, params, state, rows, draft),
        "commit": step,
    }
    if drafter.drafter.head_config is not None:
        parts["pass"] = lambda: _draft_pass(decoder, params, state)
    return parts


def phases_of(ms: Mapping[str, float]) -> dict[str, float | None]:
    """Phases of a round from the milliseconds of its programs.

    Growing a tree is not a separate program: its time is the proposal's minus the drafter's
    pass, and 0 if the pass alone was slower.

    >>> phases_of({"propose": 5.0, "pass": 3.0, "verify": 7.0, "commit": 1.0})
    {'draft': 3.0, 'grow': 2.0, 'verify': 7.0, 'commit': 1.0}
    """
    draft = ms.get("pass", ms["propose"])
    grow = max(ms["propose"] - ms["pass"], 0.0) if "pass" in ms else None
    return {"draft": draft, "grow": grow, "verify": ms["verify"], "commit": ms["commit"]}


def medians_ms(
    functions: Mapping[Name, Callable[[], Any]], repeats: int | None = None
) -> dict[Name, float]:
    """Median milliseconds of each call, timed in turn, so that interference affects all alike.

    Args:
      repeats: timed calls of each; `REPEATS` by default.
    """
    repeats = REPEATS if repeats is None else repeats
    times: dict[Name, list[float]] = {name: [] for name in functions}
    for function in functions.values():  # compiles
        jax.block_until_ready(function())
    for _ in range(repeats):
        for name, function in functions.items():
            began = time.perf_counter()
            jax.block_until_ready(function())
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(spent) * 1e3 for name, spent in times.items()}


@functools.partial(jax.jit, static_argnames="config")
def _verify_chain(params, config, tokens, cache, lengths):
    output = forward_chain(params, config, tokens, cache, lengths)
    return likeliest(unembed(params, output.hidden))


@functools.partial(jax.jit, static_argnames="decoder")
def _propose(decoder, params, state, sampling):
    return propose(decoder, params, state, sampling)[0]


@functools.partial(jax.jit, static_argnames="decoder")
def _draft_pass(decoder, params, state):
    drafter = decoder.drafter
    stream = drafter.stream(params.drafter, state.drafter, state.anchor, state.length - 1)
    return bind(drafter.config, params.drafter.head).logits(params.drafter.vocabulary, stream)


@functools.partial(jax.jit, static_argnames="decoder")
def _verify(decoder, params, state, sampling, draft):
    sizes = own_sizes(decoder.drafter, draft.tree)
    size = smallest(sizes, draft.tree, state.done)
    return judge(decoder, params, state, sampling, draft, sizes, size)


@functools.partial(jax.jit, static_argnames="decoder", donate_argnames="state")
def _commit(decoder, params, state, sampling, verdict):
    return commit(decoder, params, state, sampling, verdict)
