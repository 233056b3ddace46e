"""Drafters propose what the noise of the target's choices makes likely."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.config import TreeConfig
from jaxspec.drafters.joined import with_lookup
from jaxspec.noise import Noise
from jaxspec.trees.draw import follow
from tests.drafters import cases, eagle_cases
from tests.drafters.test_eagle import LENGTH, observed, text
from tests.drafters.test_eagle import TREE as EAGLE_TREE
from tests.drafters.test_lossless import TREES

KINDS = [kind for kind in TREES if kind != "dflash2"]  # its candidates ignore the noise


def assert_follows_the_noise(loaded, state, anchor, position):
    """Loud noise alone decides: a tree holds the path that it chooses, to its full depth."""
    noise = Noise(jax.random.split(jax.random.key(5), 1), jnp.array([1e4]))
    depth, at = loaded.drafter.parts[0].depth, jnp.array([position])
    path = np.argmax(noise.at(at + 1, depth, 11), axis=-1)[0].tolist()
    budget = jnp.array([loaded.drafter.size])
    draft = jax.jit(loaded.drafter.draft)
    tree, _ = draft(loaded.params, state, jnp.array([anchor]), at, budget, noise)
    assert len(follow(jax.device_get(tree), path)) == 1 + depth


@pytest.mark.parametrize("kind", KINDS)
def test_block_drafters(kind):
    state = cases.observed(kind, cases.features(kind, 1, 6))
    assert_follows_the_noise(cases.loaded(kind, TREES[kind]), state, 4, 6)


def test_a_drafter_with_lookup():
    kind = "dspark"
    text = jnp.zeros((1, 32), jnp.int32)
    state = cases.observed(kind, cases.features(kind, 1, 6)), text
    assert_follows_the_noise(with_lookup(cases.loaded(kind, TREES[kind])), state, 4, 6)


@pytest.mark.parametrize(
    "tree", [TreeConfig("chain", size=5), EAGLE_TREE], ids=lambda x: x.kind
)
def test_eagle(tree):
    loaded = eagle_cases.loaded("plain", tree)
    taps, tokens = text("plain")
    state = observed(loaded.drafter, loaded.params, taps, tokens, (LENGTH,))
    assert_follows_the_noise(loaded, state, tokens[0, LENGTH], LENGTH)
