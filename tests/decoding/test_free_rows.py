"""Rows that are done cost the others nothing: attention reads no block of a cache for them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.config import TreeConfig
from jaxspec.decoding.fitting import doubling_sizes
from jaxspec.decoding.habit import UNKNOWN, init_habit
from jaxspec.decoding.loop import decode
from jaxspec.decoding.prefill import prefill
from jaxspec.decoding.requests import capacity_for, decoder_for, pack, request_keys
from jaxspec.decoding.sampling import Sampling
from jaxspec.decoding.schedule import Adaptive, Batch, Fixed, decode_rows
from jaxspec.decoding.staircase import Staircase
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.drafters.small_model import SmallModel
from pallas_kernels.tree_attention.xla import BLOCK, tree_attention_xla
from tests import tiny
from tests.drafters import cases

pytestmark = pytest.mark.slow

SHORT, LONG = 20, 2 * BLOCK + 30  # prompts of the row that runs and of the one that is done
DRAFTERS = {
    "small": LoadedDrafter(SmallModel(tiny.QWEN3, depth=3), tiny.target().params),
    "block": cases.loaded("rnn", TreeConfig("path_conditioned", size=8, candidates=6)),
    "window": cases.loaded("window", TreeConfig("best_first", size=8, width=2)),
}


def poisoned(caches):
    """NaN in the first row's places from the second block on: read, they reach its result."""

    def poison(x):
        cache = x.ndim == 4 and jnp.issubdtype(x.dtype, jnp.floating)
        return x.at[0, :, BLOCK:].set(jnp.nan) if cache else x

    return jax.tree.map(poison, caches)


def decode_alone(decoder, params, state, sampling):
    return decode(decoder, params, state, sampling, np.int32(12))


def serve(schedule, decoder, params, state, sampling):
    survivals = jnp.full((2, schedule.age, decoder.drafter.size - 1), UNKNOWN)
    staircase = Staircase.guessed(doubling_sizes(2, decoder.drafter.size, 16))
    batch, _ = decode_rows(
        decoder,
        params,
        Batch(state, sampling, survivals),
        init_habit(decoder.drafter.size, decoder.drafter.depth),
        staircase.only(-1),
        np.int32(12),
        schedule=schedule,
    )
    return batch.state


WAYS = {
    "generate": decode_alone,
    "fixed": functools.partial(serve, Fixed()),
    "adaptive": functools.partial(serve, Adaptive()),
}


@pytest.mark.parametrize(
    ("way", "name"),
    [("generate", name) for name in DRAFTERS] + [("fixed", "small"), ("adaptive", "small")],
)
def test_a_done_row_has_no_block_read(way, name):
    """The long row is done before the first round; 12 rounds of the short one stay in block 0.

    One loop over blocks serves both rows, so a block read for the long one is multiplied into
    the short one's result with weight 0, and 0 times NaN would be seen.
    """
    decoder, params = decoder_for(tiny.target(), DRAFTERS[name])

    def run(spoil):
        requests = pack(
            decoder,
            tiny.prompts(SHORT, LONG),
            batch=2,
            capacity=capacity_for(LONG + 60, decoder),
            max_new_tokens=60,
            budget=8,
            sampling=[Sampling()] * 2,
            keys=request_keys(0, 2),
        )
        requests = dataclasses.replace(requests, max_new_tokens=np.array([60, 1]))
        state = prefill(decoder, params, requests)
        assert state.done.tolist() == [False, True]
        caches = spoil((state.cache, state.drafter))
        state = dataclasses.replace(state, cache=caches[0], drafter=caches[1])
        return WAYS[way](decoder, params, state, requests.sampling)

    expected, found = run(lambda caches: caches), run(poisoned)
    assert SHORT + 12 < int(expected.length[0]) < BLOCK
    for field in ("tokens", "length", "committed"):
        np.testing.assert_array_equal(getattr(found, field), getattr(expected, field))


def test_a_row_without_a_prefix_opens_nobodys_window():
    """Beside it, a row at 500 with a window of 64 reads its last block alone."""
    keys = jax.random.split(jax.random.key(0), 5)
    shape = dict(cache=(2, 2, 4 * BLOCK, 16), new=(2, 1, 2, 16))
    k_cache, v_cache = (jax.random.normal(key, shape["cache"]) for key in keys[:2])
    k_new, v_new = (jax.random.normal(key, shape["new"]) for key in keys[2:4])
    q = jax.random.normal(keys[4], (2, 1, 4, 16))
    options = dict(scale=0.25, window=64, depths=jnp.zeros((2, 1), jnp.int32))
    rest = (jnp.array([500, 0]), k_new, v_new, jnp.ones((2, 1, 1), jnp.uint32))
    expected = tree_attention_xla(q, k_cache, v_cache, *rest, **options)
    v_cache = v_cache.at[0, :, : 3 * BLOCK].set(jnp.nan)
    found = tree_attention_xla(q, k_cache, v_cache, *rest, **options)
    np.testing.assert_array_equal(found, expected)
