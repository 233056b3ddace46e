"""P-EAGLE: one pass against rows run one by one in NumPy; in the loop the target's output."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.api import generate
from jaxspec.config import TreeConfig
from jaxspec.decoding.sampling import Sampling
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.drafters.eagle import eagle_params
from jaxspec.drafters.eagle_head import ParallelEagleConfig
from jaxspec.drafters.parallel_eagle import ParallelEagleDrafter
from jaxspec.drafters.unrolled import unroll
from jaxspec.drafters.weights import random_weights
from tests import tiny
from tests.drafters import eagle_cases as cases
from tests.drafters.eagle_oracle import Rows
from tests.drafters.test_eagle import LENGTH, observed, text

CONFIG = ParallelEagleConfig(
    **vars(cases.PLAIN) | dict(num_layers=2, window=None, mask_token_id=9, tap_norm="joined")
)
CHAIN = TreeConfig("chain", size=5)


@pytest.fixture(scope="module")
def params():
    """A draft vocabulary and an embedding of its own; every weight matters."""
    random = np.random.default_rng(2)

    def any(*shape):
        return random.standard_normal(shape).astype(np.float32)

    weights = random_weights(CONFIG, jax.random.key(1))
    weights = jax.tree.map(lambda x: x + 0.3 * any(*x.shape), weights)
    own = dict(kept=cases.KEPT, unembed=any(len(cases.KEPT), 32), embed=any(11, 32))
    return eagle_params(weights, tiny.target().params, **own)


def test_one_pass_is_rows_of_the_mask(params):
    drafter = ParallelEagleDrafter(CONFIG, CHAIN)
    taps, tokens = text("plain")
    state = observed(drafter, params, taps, tokens, (2, LENGTH - 2))
    anchor, position = jnp.asarray(tokens[:, LENGTH]), jnp.array([LENGTH])
    logits = jax.jit(drafter.logits)(params, state, anchor, position)[0]
    tree, _ = jax.jit(drafter.draft)(params, state, anchor, position, jnp.array([5]))

    rows = Rows(CONFIG, params)
    seen = rows.committed(taps[0], tokens[0, :LENGTH])
    feature, token, chosen = rows.fuse(taps[0, -1]), int(tokens[0, LENGTH]), []
    for depth in range(CONFIG.steps):
        expected, _, own = rows.run(feature, token, LENGTH - 1 + depth, seen)
        np.testing.assert_allclose(logits[depth], expected, rtol=1e-3, atol=1e-4)
        chosen.append(rows.kept[expected.argmax()])
        seen.append(own)
        feature, token = rows.fuse(rows.weights["mask_hidden",]), CONFIG.mask_token_id
    assert tree.tokens[0].tolist() == [tokens[0, LENGTH], *chosen]


def test_training_runs_what_drafting_runs(params):
    """At every index of a text, the depths that a draft after that pair would have."""
    drafter = ParallelEagleDrafter(CONFIG, CHAIN)
    taps, tokens = (jnp.asarray(x) for x in text("plain"))
    head, steps = drafter.head(params), CONFIG.steps
    outputs = jax.jit(functools.partial(unroll, steps=steps))(
        head, params.vocabulary, tokens[:, :LENGTH], taps
    )
    trained = head.logits(params.vocabulary, outputs)  # [B, J, T, V']
    for pair in (0, 4, LENGTH - 2):
        state = observed(drafter, params, taps, tokens, (pair + 1,))
        anchor, position = tokens[:, pair + 1], jnp.array([pair + 1])
        drafted = jax.jit(drafter.logits)(params, state, anchor, position)
        np.testing.assert_allclose(trained[:, :, pair], drafted, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["chain", "best_first", "top_budget"])
def test_speculative_equals_plain(params, kind):
    sampling = [Sampling(), Sampling(temperature=0.7)]
    prompts, options = tiny.prompts(5, 17), dict(max_new_tokens=16, sampling=sampling, seed=3)
    plain = generate(tiny.target(), prompts, **options)
    loaded = LoadedDrafter(ParallelEagleDrafter(CONFIG, TreeConfig(kind, 8, width=3)), params)
    found = generate(tiny.target(), prompts, drafter=loaded, **options)
    assert [x.token_ids for x in found] == [x.token_ids for x in plain]
    if kind == "chain":  # greedy rows are exact whatever verifies them
        drawn = generate(tiny.target(), prompts, drafter=loaded, rejection=True, **options)
        assert drawn[0].token_ids == plain[0].token_ids


def test_what_it_has_not():
    with pytest.raises(
        ValueError, match="depend only on the depth; use one of chain, best_first"
    ):
        ParallelEagleDrafter(CONFIG, TreeConfig("path_conditioned"))
    with pytest.raises(ValueError, match="window is .*expected None"):
        dataclasses.replace(CONFIG, window=4)
    with pytest.raises(ValueError, match="mask_token_id is 11; expected a row"):
        dataclasses.replace(CONFIG, mask_token_id=11)
