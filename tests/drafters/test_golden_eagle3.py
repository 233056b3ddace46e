"""EAGLE-3 against what DeepSpec and speculators computed (../shared/golden)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec import checkpoints
from jaxspec.api import generate
from jaxspec.checkpoints.drafters import load_drafter
from jaxspec.config import TreeConfig
from jaxspec.drafters.base import Committed, LoadedDrafter
from jaxspec.drafters.rollout import greedy
from tests.drafters.test_golden import CAPACITY, tapped
from tests.slow import slow_but

CHAIN = TreeConfig("chain", size=6)
NEW = {"eagle3_a": 48, "eagle3_speculators_a": 32}
names = pytest.mark.parametrize("name", slow_but(["eagle3_speculators_a"], NEW))


@pytest.fixture(scope="module")
def load(golden):
    @functools.cache
    def case(name):
        folder, trace = golden(name)
        target = checkpoints.load(folder / "target")
        drafter = load_drafter(folder / "draft", target.config, target.params, CHAIN)
        return folder, trace, target, LoadedDrafter(*drafter)

    return case


@names
def test_rounds(load, name):
    """Logits of every step along the drafter's own greedy tokens, and those as target ids."""
    folder, trace, target, loaded = load(name)
    recorded, drafter, params = np.load(folder / "arrays.npz"), loaded.drafter, loaded.params

    @jax.jit
    def draft(tokens, features, position):
        start, at = jnp.zeros(1, jnp.int32), position[None]
        state = drafter.init(params, 1, CAPACITY)
        state = drafter.observe(params, state, Committed(tokens, features, start, at))
        anchor = tokens[:, position][0][None]
        _, logits = drafter.rollout(params, state, anchor, at, greedy)
        tree, _ = drafter.draft(params, state, anchor, at, jnp.array([drafter.size]))
        return logits[0], tree.tokens[0, 1:]

    assert drafter.depth == 5
    for i, prompt in enumerate(trace["prompts"]):
        sequence = np.array([*prompt["prompt"], *prompt["ar"]])[:CAPACITY]
        tokens = jnp.asarray(np.pad(sequence, (0, CAPACITY - len(sequence)))[None], jnp.int32)
        features = tapped(target.params, target.config, tokens, drafter.taps)
        position = len(prompt["prompt"])
        for r, committed in enumerate(prompt["accept"][:4]):
            mark = f"p{i}_r{r}_"
            if mark + "draft_logits" not in recorded:
                break
            logits, drafts = draft(tokens, features, jnp.int32(position))
            expected = recorded[mark + "draft_logits"]
            np.testing.assert_allclose(logits, expected, atol=2e-4, rtol=0)
            if mark + "drafts" in recorded:
                np.testing.assert_array_equal(drafts, recorded[mark + "drafts"])
            position += committed
        assert r >= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", NEW)
def test_decoding(load, name):
    """The target's own output, and as many tokens committed in every round."""
    _, trace, target, loaded = load(name)
    prompts = trace["prompts"]
    rows = [prompt["prompt"] for prompt in prompts]
    done = generate(target, rows, drafter=loaded, max_new_tokens=NEW[name])
    for prompt, completion in zip(prompts, done, strict=True):
        assert completion.token_ids == prompt["ar"]
        *committed, last = completion.stats.committed
        recorded = prompt["accept"][: len(committed) + 1]
        # The last round counts here in full; DeepSpec's loop may run one more.
        assert (committed, last >= recorded[-1]) == (recorded[:-1], True)
        assert len(prompt["accept"]) - len(recorded) in (0, 1)
