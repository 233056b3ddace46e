"""EAGLE-3: rows, chains and trees against NumPy; in the loop the output is the target's."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.api import generate
from jaxspec.config import TreeConfig
from jaxspec.decoding.sampling import Sampling
from jaxspec.drafters.base import Committed
from jaxspec.drafters.eagle import EagleDrafter
from jaxspec.drafters.joined import with_lookup
from jaxspec.drafters.rollout import greedy
from tests import tiny
from tests.drafters import eagle_cases as cases
from tests.drafters.eagle_oracle import Rows, dynamic_tree
from tests.slow import slow_but

CHAIN = TreeConfig("chain", size=5)
TREE = TreeConfig("path_conditioned", size=12, width=3, candidates=3)
LENGTH = 9


@functools.cache
def text(kind):
    random = np.random.default_rng(5)
    width = len(cases.KINDS[kind].taps) * cases.PLAIN.target_hidden_size
    taps = random.standard_normal((1, LENGTH, width)).astype(np.float32)
    return taps, random.integers(0, cases.PLAIN.vocab_size, (1, LENGTH + 1)).astype(np.int32)


@functools.partial(jax.jit, static_argnames=("drafter", "parts"))
def observed(drafter, params, taps, tokens, parts):
    """The state after tokens that were committed in parts of so many, each padded by two."""
    state, start = drafter.init(params, 1, LENGTH + 4), 0
    for count in parts:
        rows = slice(start, start + count + 2)
        missing = max(0, start + count + 2 - LENGTH)
        committed = Committed(
            jnp.pad(tokens[:, :LENGTH], [(0, 0), (0, missing)])[:, rows],
            jnp.pad(taps, [(0, 0), (0, missing), (0, 0)])[:, rows],
            jnp.array([start]),
            jnp.array([count]),
        )
        state, start = drafter.observe(params, state, committed), start + count
    return state


@pytest.mark.parametrize(
    ("kind", "parts"),
    slow_but(
        [("normed", (1, 3, 1, 4)), ("two layers", (1, 3, 1, 4))],
        itertools.product(cases.KINDS, [(LENGTH,), (1, 3, 1, 4)]),
    ),
)
def test_a_chain(kind, parts):
    """However the prefix was committed, the logits are those of rows run one by one."""
    drafter, params = EagleDrafter(cases.KINDS[kind], CHAIN), cases.params(kind, reduced=True)
    taps, tokens = text(kind)
    state = observed(drafter, params, taps, tokens, parts)
    anchor, position = jnp.asarray(tokens[:, LENGTH]), jnp.array([LENGTH])
    chosen, logits = jax.jit(drafter.rollout, static_argnums=4)(
        params, state, anchor, position, greedy
    )
    rows = Rows(cases.KINDS[kind], params)
    seen = rows.committed(taps[0], tokens[0, :LENGTH])
    feature, token = rows.fuse(taps[0, -1]), int(tokens[0, LENGTH])
    for step in range(drafter.depth):
        expected, feature, own = rows.run(feature, token, LENGTH - 1 + step, seen, LENGTH - 1)
        np.testing.assert_allclose(logits[0, step], expected, rtol=1e-3, atol=1e-4)
        token = int(rows.kept[expected.argmax()])
        assert int(chosen[0, step]) == token
        seen.append(own)


@pytest.mark.parametrize("kind", slow_but(["window"], ["plain", "window", "two layers"]))
def test_a_dynamic_tree(kind):
    """k children of the k best rows of every level, then the best of the pool."""
    drafter, params = EagleDrafter(cases.KINDS[kind], TREE), cases.params(kind, reduced=True)
    taps, tokens = text(kind)
    state = observed(drafter, params, taps, tokens, (LENGTH,))
    anchor, position = jnp.asarray(tokens[:, LENGTH]), jnp.array([LENGTH])
    tree, _ = jax.jit(drafter.draft)(params, state, anchor, position, jnp.array([12]))
    paths = {0: ()}
    for node in range(1, TREE.size):
        above = paths[int(tree.parents[0, node])]
        paths[node] = (*above, int(tree.tokens[0, node]))
    expected = dynamic_tree(
        Rows(cases.KINDS[kind], params), taps[0], tokens[0].tolist(), steps=4, k=3, size=12
    )
    assert [paths[node] for node in range(1, 12)] == [path for path, _ in expected]
    scores = [score for _, score in expected]
    np.testing.assert_allclose(tree.scores[0, 1:], scores, rtol=1e-3, atol=1e-4)
    smaller, _ = jax.jit(drafter.draft)(params, state, anchor, position, jnp.array([5]))
    assert smaller.valid.sum() == 5
    np.testing.assert_array_equal(smaller.tokens[0, :5], tree.tokens[0, :5])


def test_a_draft_depends_on_the_rows_before_it_alone():
    """The state of a whole text drafts at any of its positions, as walks need."""
    drafter, params = EagleDrafter(cases.KINDS["plain"], CHAIN), cases.params("plain")
    taps, tokens = text("plain")
    whole = observed(drafter, params, taps, tokens, (LENGTH,))
    part = observed(drafter, params, taps, tokens, (4,))
    anchor, position = jnp.asarray(tokens[:, 4]), jnp.array([4])
    draft = jax.jit(drafter.draft)
    trees = [draft(params, s, anchor, position, jnp.array([5]))[0] for s in (whole, part)]
    np.testing.assert_array_equal(trees[0].tokens, trees[1].tokens)
    np.testing.assert_allclose(trees[0].scores, trees[1].scores, rtol=1e-5)


SAMPLINGS = [
    Sampling(),
    Sampling(temperature=0.7),
    Sampling(temperature=1, top_p=0.9),
    Sampling(),
]
PROMPTS = tiny.prompts(1, 5, 17, 3)


def outputs(**options):
    done = generate(
        tiny.target(), PROMPTS, max_new_tokens=20, seed=3, sampling=SAMPLINGS, **options
    )
    return [completion.token_ids for completion in done]


@pytest.fixture(scope="module")
def plain():
    return outputs()


@pytest.mark.parametrize(
    ("kind", "tree", "lookup"),
    slow_but(
        [("window", TREE, False)],
        [("normed", CHAIN, False), ("window", TREE, False), ("plain", TREE, True)],
    ),
)
def test_speculative_equals_plain(plain, kind, tree, lookup):
    """Rows of unequal lengths, greedy and sampled, in one batch."""
    loaded = cases.loaded(kind, tree, reduced=not lookup)
    assert outputs(drafter=with_lookup(loaded) if lookup else loaded) == plain


@pytest.mark.slow
def test_a_drawn_chain_verified_by_rejection(plain):
    """Greedy rows are plain decoding's; the law of drawn ones is enumerated elsewhere."""
    assert outputs(drafter=cases.loaded("plain", CHAIN, True), rejection=True)[0] == plain[0]


def test_the_law_drawn_from_is_the_law_returned():
    drafter, params = EagleDrafter(cases.KINDS["plain"], CHAIN), cases.params("plain", True)
    taps, tokens = text("plain")
    state = observed(drafter, params, taps, tokens, (LENGTH,))
    count = 4000
    repeat = lambda x: jnp.repeat(x, count, axis=0)  # noqa: E731
    many = jax.tree.map(repeat, state)
    anchor, position = repeat(jnp.asarray(tokens[:, LENGTH])), jnp.full(count, LENGTH)
    keys = jax.random.split(jax.random.key(0), count)
    drawn, _ = jax.jit(drafter.draft_sampled)(
        params, many, anchor, position, jnp.full(count, 1.5), keys
    )
    kept = np.asarray(drawn.support)
    assert kept.tolist() == list(cases.KEPT)
    found = np.array([(drawn.tokens[:, 0] == token).mean() for token in kept])
    np.testing.assert_allclose(found, np.exp(drawn.log_q[0, 0]), atol=0.03)
    np.testing.assert_allclose(np.exp(drawn.log_q).sum(-1), 1, rtol=1e-4)


@pytest.mark.parametrize("kind", ["best_first", "top_budget", "transitions"])
def test_trees_it_has_not(kind):
    with pytest.raises(ValueError, match="depend on the whole path; use chain or path_cond"):
        EagleDrafter(cases.PLAIN, TreeConfig(kind))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(taps=(0, 0, 1)), "taps is .*expected different layers"),
        (dict(taps=(0, 3)), "taps is .*different layers of the target, -1 … 2"),
        (dict(taps=(1, 1), target_layers=None), "different layers of the target, -1 … $"),
        (dict(window=(None, 3)), "window is .*one value per layer"),
        (dict(window=0), "window is .*None or at least 1"),
        (dict(tap_norm="both"), "tap_norm is 'both'; expected one of"),
        (dict(num_kv_heads=3), "multiple of num_kv_heads = 3"),
        (dict(steps=0), "steps is 0; expected at least 1"),
    ],
)
def test_configurations_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(cases.PLAIN, **changes)
