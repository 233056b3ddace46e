"""Hybrids decode as plain decoding does, whatever the drafter, tree, batch and prompt."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.api import generate
from jaxspec.config import TreeConfig
from jaxspec.decoding.sampling import Sampling
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.drafters.ngram import PromptLookup
from jaxspec.models.decoder import forward
from jaxspec.models.delta_net import DeltaState
from jaxspec.models.state import init_states
from jaxspec.trees.packing import pack_nodes
from jaxspec.trees.tree import ancestors
from tests import tiny
from tests.drafters import cases

TARGET = tiny.target(tiny.HYBRID)
PROMPTS = tiny.prompts(1, 5, 127, 128, 129, 130, 17, 3)  # chunks are of 128 tokens
SAMPLINGS = [Sampling(), Sampling(temperature=0.8)] * 4
DRAFTERS = {
    "random trees": tiny.RANDOM,
    "lookup": LoadedDrafter(PromptLookup(size=16, depth=6)),
    "gated": cases.loaded("gated", TreeConfig("path_conditioned", size=16, candidates=6)),
}


def outputs(drafter=None, target=TARGET, prompts=PROMPTS, **options):
    options = dict(sampling=SAMPLINGS, seed=3, max_new_tokens=30) | options
    if drafter is not None:
        options["drafter"] = drafter
    return [c.token_ids for c in generate(target, prompts, **options)]


@pytest.fixture(scope="module")
def plain():
    return outputs()


@pytest.mark.parametrize(
    "name",
    [
        "random trees",
        pytest.param("gated", marks=pytest.mark.slow),
        pytest.param("lookup", marks=pytest.mark.gate),
    ],
)
def test_speculative_equals_plain(plain, name):
    assert outputs(DRAFTERS[name]) == plain


@pytest.mark.gate
def test_a_mixture_with_a_shared_expert():
    target = tiny.target(tiny.HYBRID_MOE)
    options = dict(target=target, prompts=PROMPTS[:1], sampling=SAMPLINGS[:1])
    assert outputs(tiny.RANDOM, **options) == outputs(**options)


@pytest.mark.slow
def test_a_state_that_takes_in_rejected_nodes_is_not_lossless(plain, monkeypatch):
    write = DeltaState.write

    def careless(self, rows, starts, counts):
        if rows.keys.shape[1] != tiny.RANDOM.drafter.depth + 1:  # a prompt's chunk
            return write(self, rows, starts, counts)
        return write(self, rows, starts, jnp.minimum(2 * counts, rows.keys.shape[1]))

    monkeypatch.setattr(DeltaState, "write", careless)
    drafter = LoadedDrafter(dataclasses.replace(tiny.RANDOM.drafter, vocab=10))  # compiles anew
    assert outputs(drafter) != plain


@pytest.mark.slow
def test_packed_verification_equals_the_rectangle():
    draw = jax.vmap(lambda key, n: tiny.random_tree(8, 4, 11, key, jnp.int32(1), n))
    tree = draw(jax.random.split(jax.random.key(0), 2), jnp.array([3, 7]))
    states = init_states(TARGET.config, 2, 16, "float32")
    lengths = jnp.array([4, 2])
    arrays = (tree.tokens, tree.depths, ancestors(tree), states, lengths)
    packing = pack_nodes(tree.valid, 10)
    whole = forward(TARGET.params, TARGET.config, *arrays)
    packed = forward(TARGET.params, TARGET.config, *arrays, packing=packing)
    found = np.asarray(packing.spread(packed.hidden))
    valid = np.asarray(tree.valid)
    np.testing.assert_allclose(found[valid], np.asarray(whole.hidden)[valid], atol=2e-5)
