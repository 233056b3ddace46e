"""EAGLE-3 against what DeepSpec and speculators computed (../shared/golden)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.api import generate
from jaxspec.config import TreeConfig
from jaxspec.drafters.rollout import greedy
from tests.drafters import goldens
from tests.drafters.goldens import TOLERANCE, observed
from tests.slow import slow_but

CHAIN = TreeConfig("chain", size=6)
NEW = {"eagle3_a": 48, "eagle3_speculators_a": 32}
names = pytest.mark.parametrize("name", slow_but(["eagle3_speculators_a"], NEW))


@pytest.fixture(scope="module")
def load(golden):
    return functools.cache(lambda name: goldens.load(golden(name)[0], CHAIN))


@names
def test_rounds(golden, load, name):
    """Logits of every step along the drafter's own greedy tokens, and those as target ids."""
    target, loaded = load(name)
    drafter, params = loaded.drafter, loaded.params

    @jax.jit
    def draft(tokens, features, position):
        state, anchor = observed(drafter, params, tokens, features, position)
        at = position[None]
        _, logits = drafter.rollout(params, state, anchor, at, greedy)
        tree, _ = drafter.draft(params, state, anchor, at, jnp.array([drafter.size]))
        return logits[0], tree.tokens[0, 1:]

    assert drafter.depth == 5
    compared = 0
    for _, recorded, inputs in goldens.rounds(golden(name), target, drafter.taps, 4):
        if "draft_logits" not in recorded:
            continue
        logits, drafts = draft(*inputs)
        np.testing.assert_allclose(logits, recorded["draft_logits"], **TOLERANCE)
        if "drafts" in recorded:
            np.testing.assert_array_equal(drafts, recorded["drafts"])
        compared += 1
    assert compared >= 3 * len(golden(name)[1]["prompts"])


@pytest.mark.slow
@pytest.mark.parametrize("name", NEW)
def test_decoding(golden, load, name):
    """The target's own output, and as many tokens committed in every round."""
    target, loaded = load(name)
    prompts = golden(name)[1]["prompts"]
    rows = [prompt["prompt"] for prompt in prompts]
    done = generate(target, rows, drafter=loaded, max_new_tokens=NEW[name])
    for prompt, completion in zip(prompts, done, strict=True):
        assert completion.token_ids == prompt["ar"]
        *committed, last = completion.stats.committed
        recorded = prompt["accept"][: len(committed) + 1]
        # The last round counts here in full; DeepSpec's loop may run one more.
        assert (committed, last >= recorded[-1]) == (recorded[:-1], True)
        assert len(prompt["accept"]) - len(recorded) in (0, 1)
