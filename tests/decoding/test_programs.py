"""What is compiled, and what it does: few programs, no transfers, no copies of a cache."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.api import generate
from jaxspec.config import TreeConfig
from jaxspec.decoding import schedule
from jaxspec.decoding.fitting import doubling_sizes
from jaxspec.decoding.habit import init_habit
from jaxspec.decoding.loop import decode
from jaxspec.decoding.prefill import prefill
from jaxspec.decoding.requests import capacity_for, decoder_for, pack, request_keys
from jaxspec.decoding.sampling import Sampling
from jaxspec.decoding.staircase import Staircase
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.drafters.ngram import PromptLookup
from jaxspec.drafters.plain import PLAIN
from jaxspec.drafters.small_model import SmallModel
from tests import tiny
from tests.drafters import cases
from tests.serving import engines

pytestmark = pytest.mark.slow


def prepared(drafter, batch=2, capacity=None, dtype="float32"):
    """decoder, params and requests of a small batch, on the device."""
    target = tiny.target()
    params = narrowed(target.params, dtype)
    decoder, params = decoder_for(dataclasses.replace(target, params=params), drafter)
    requests = pack(
        decoder,
        tiny.prompts(*range(3, 3 + batch)),
        batch=batch,
        capacity=capacity or capacity_for(100, decoder),
        max_new_tokens=40,
        budget=drafter.drafter.size,
        sampling=[Sampling()] * batch,
        keys=request_keys(0, batch),
    )
    return decoder, params, jax.device_put(requests)


def kind(value):
    return value if isinstance(value, str) else type(value.drafter).__name__


def narrowed(params, dtype):
    narrow = lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x  # noqa: E731
    return jax.tree.map(narrow, params)


def test_one_compilation_for_all_prompts_lengths_temperatures_and_budgets():
    before = prefill._cache_size(), decode._cache_size()
    for seed, temperature, top_p, top_k, budget, new_tokens in [
        (0, 0.0, 1.0, 0, 16, 30),
        (1, 0.7, 1.0, 0, 16, 7),
        (2, 1.0, 0.9, 5, 1, 40),
        (3, 0.0, 1.0, 0, 9, 1),
    ]:
        generate(
            tiny.target(),
            tiny.prompts(4 + seed, 60, 90, seed=seed),
            drafter=LoadedDrafter(tiny.RandomTrees(depth=6)),
            sampling=Sampling(temperature=temperature, top_p=top_p, top_k=top_k),
            budget=budget,
            max_new_tokens=new_tokens,
            seed=seed,
        )
    assert prefill._cache_size() - before[0] == 1
    assert decode._cache_size() - before[1] == 1


SMALL = LoadedDrafter(SmallModel(tiny.QWEN3, depth=2), tiny.target().params)
DRAFTERS = {
    "random": tiny.RANDOM,
    "lookup": LoadedDrafter(PromptLookup(size=8)),
    "small": SMALL,
    "block": cases.loaded("rnn", TreeConfig("path_conditioned", size=8, candidates=6)),
}


@pytest.mark.parametrize("name", DRAFTERS)
def test_rounds_transfer_nothing(name):
    decoder, params, requests = prepared(DRAFTERS[name])
    state, rounds = prefill(decoder, params, requests), jax.device_put(np.int32(3))
    compiled = decode.lower(decoder, params, state, requests.sampling, rounds).compile()
    with jax.transfer_guard("disallow"):
        state = compiled(params, state, requests.sampling, rounds)
    assert state.rounds.tolist() == [3, 3]
    # The guard does not see what a program itself does: it has no callback and no feed.
    assert not re.findall(r"callback|infeed|outfeed|(?:send|recv)\(", compiled.as_text())


def test_the_guard_sees_a_transfer():
    decoder, params, requests = prepared(tiny.RANDOM)
    state = prefill(decoder, params, requests)
    with jax.transfer_guard("disallow"), pytest.raises(RuntimeError, match="[Dd]isallow"):
        decode(decoder, params, state, requests.sampling, np.int32(3))


@pytest.mark.parametrize(
    ("drafter", "batch"),
    [(SMALL, 1), (SMALL, 4), (LoadedDrafter(PromptLookup(size=8)), 1)],
    ids=["small, 1 row", "small, 4 rows", "lookup, which verifies in three sizes"],
)
def test_no_copy_of_a_cache_in_a_loop(drafter, batch):
    """Prefill may set up its zeros; in its loop, and anywhere in decode, nothing is copied."""
    decoder, params, requests = prepared(drafter, batch, capacity=768)
    state = jax.eval_shape(prefill, decoder, params, requests)
    rounds = np.int32(1)
    cache = rf"f32\[{batch},2,768,16\]"
    text = decode.lower(decoder, params, state, requests.sampling, rounds).compile().as_text()
    assert re.search(cache, text)
    assert not re.findall(rf"= {cache}\S* copy\(", text)
    text = prefill.lower(decoder, params, requests).compile().as_text()
    bodies = [part for part in text.split("\n\n") if not part.lstrip().startswith("ENTRY")]
    assert not [line for part in bodies for line in re.findall(rf"= {cache}\S* copy\(", part)]


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize(
    ("drafter", "served"),
    [
        (PLAIN, schedule.Fixed()),
        (LoadedDrafter(PromptLookup(size=8)), schedule.Adaptive()),
        (DRAFTERS["block"], schedule.Adaptive()),
        (engines.DRAFTERS["survival chain"], schedule.Adaptive()),
    ],
    ids=["plain", "lookup, adaptive", "block, adaptive", "survival chain, adaptive"],
)
def test_no_copy_of_a_cache_in_served_rounds(drafter, served, batch):
    """With a draft or without: a `cond` between the two would copy every cache."""
    decoder, params, requests = prepared(drafter, batch, capacity=768)
    state = prefill(decoder, params, requests)
    size = drafter.drafter.size
    staircase = Staircase.guessed(doubling_sizes(batch, size, 64))
    survivals = jnp.ones((batch, served.age, size - 1))
    lowered = schedule.decode_rows.lower(
        decoder,
        params,
        schedule.Batch(state, requests.sampling, survivals),
        init_habit(size, drafter.drafter.depth),
        staircase.only(0),
        np.int32(1),
        schedule=served,
    )
    text = lowered.compile().as_text()
    caches = [x for x in jax.tree.leaves((state.cache, state.drafter)) if x.ndim == 4]
    for shape in {",".join(map(str, cache.shape)) for cache in caches}:
        assert re.search(rf"f32\[{shape}\]", text)
        assert not re.findall(rf"= f32\[{shape}\]\S* copy\(", text)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "drafter", [PLAIN, tiny.RANDOM, "dspark", "rnn", "treeflash"], ids=kind
)
def test_no_copy_of_a_weight(drafter, dtype):
    """Neither in a round nor before the first: XLA moves work on weights in front of loops."""
    if isinstance(drafter, str):
        drafter = cases.loaded(drafter, TreeConfig("path_conditioned", size=8, candidates=6))
    drafter = dataclasses.replace(drafter, params=narrowed(drafter.params, dtype))
    decoder, params, requests = prepared(drafter, batch=5, dtype=dtype)
    state = jax.eval_shape(prefill, decoder, params, requests)
    text = (
        decode.lower(decoder, params, state, requests.sampling, np.int32(1)).compile().as_text()
    )
    weights = [w for w in jax.tree.leaves(params) if w.ndim > 1 and w.size > 100]  # no biases
    shapes = {",".join(map(str, w.shape[::way])) for w in weights for way in (1, -1)}
    parts = [part for part in text.split("\n\n") if not part.lstrip().startswith("%fused")]
    made = re.findall(
        r"= [a-z0-9]+\[([\d,]+)\]\S* (?:copy|transpose|convert|fusion)\(", "\n".join(parts)
    )
    assert made
    assert shapes & set(made) == set()


def test_capacities_come_in_few_buckets():
    decoder, _, _ = prepared(tiny.RANDOM)
    found = {capacity_for(n, decoder) for n in range(1, 4000)}
    assert found == {256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096}
    assert all(capacity_for(n, decoder) >= n + 6 for n in range(1, 4000))
