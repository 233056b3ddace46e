"""A drafter that knows some tokens alone: what it drafts, and that nothing is lost by it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.api import generate
from jaxspec.config import TreeConfig
from jaxspec.decoding.rejection import acceptance_probability, residual, scatter_law
from jaxspec.decoding.sampling import Sampling
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.drafters.block import BlockDrafter, block_params
from jaxspec.drafters.head import DraftHead
from jaxspec.drafters.rollout import rollout, tempered
from jaxspec.drafters.weights import bind
from tests import tiny
from tests.drafters import cases
from tests.slow import slow_but

KEPT = [1, 2, 4, 5, 8, 9]  # of 0 … 10
PROMPTS = tiny.prompts(1, 5, 17, 3)
SAMPLINGS = [
    Sampling(),
    Sampling(temperature=0.7),
    Sampling(temperature=1, top_p=0.9),
    Sampling(),
]
TREES = {
    "dspark": TreeConfig("chain", size=8),
    "jetspec": TreeConfig("best_first", size=16, width=3),
    "dflash": TreeConfig("top_budget", size=16),
    "rnn": TreeConfig("path_conditioned", size=16, candidates=4),
    "treeflash": TreeConfig("transitions", size=16, width=3, candidates=4),
}
# (kind of drafter, tree, survival scores)
DRAFTS = [
    *((kind, tree, False) for kind, tree in TREES.items()),
    ("rnn", TreeConfig("best_first", size=16, width=3), False),
    ("gated", TreeConfig("transitions", size=16, width=3, candidates=4), False),
    ("treeflash", TreeConfig("path_conditioned", size=16, candidates=4), False),
    ("rnn", TreeConfig("path_conditioned", size=16, candidates=4), True),
    ("dspark", TreeConfig("chain", size=8), True),
]


def reduced(kind):
    return block_params(cases.params(kind).head, tiny.target().params, kept=KEPT)


def outputs(**options):
    return generate(
        tiny.target(), PROMPTS, max_new_tokens=30, seed=3, sampling=SAMPLINGS, **options
    )


@pytest.fixture(scope="module")
def plain():
    return [completion.token_ids for completion in outputs()]


@pytest.fixture
def masked(monkeypatch):
    """Every head scores tokens outside `KEPT` -inf."""
    logits, correct = DraftHead.logits, DraftHead.correct
    mask = jnp.full(tiny.QWEN3.vocab_size, -jnp.inf).at[jnp.array(KEPT)].set(0.0)

    monkeypatch.setattr(DraftHead, "logits", lambda *args: logits(*args) + mask)
    monkeypatch.setattr(DraftHead, "correct", lambda *args: correct(*args) + mask)


@pytest.mark.parametrize("kind", slow_but(["dspark"], TREES))
def test_tokens_it_does_not_know_are_written_all_the_same(plain, kind):
    drafter = LoadedDrafter(BlockDrafter(cases.KINDS[kind], TREES[kind]), reduced(kind))
    done = outputs(drafter=drafter)
    assert [completion.token_ids for completion in done] == plain
    assert not set(sum(plain, [])) <= set(KEPT)
    assert sum(sum(c.stats.committed) - c.stats.rounds for c in done) > 0  # drafts accepted


def draft(kind, tree, survival, params):
    """At an anchor of the draft vocabulary, and at one outside."""
    drafter = BlockDrafter(cases.KINDS[kind], tree, survival_scores=survival)
    state = cases.observed(kind, cases.features(kind, 2, 6))
    anchors, lengths = jnp.array([4, 10]), jnp.array([6, 6])
    # A function of its own, as `masked` changes what is compiled.
    run = jax.jit(lambda *arguments: drafter.draft(*arguments)[0])
    return run(params, state, anchors, lengths, jnp.array([tree.size] * 2))


@pytest.mark.parametrize(
    ("kind", "tree", "survival"), slow_but([d for d in DRAFTS if d[0] == "dspark"], DRAFTS)
)
def test_the_tree_is_that_of_a_drafter_whose_other_logits_are_minus_infinity(
    request, kind, tree, survival
):
    found = draft(kind, tree, survival, reduced(kind))
    drafted = np.asarray(found.tokens)[np.asarray(found.depths) > 0]
    assert drafted.size and set(drafted.tolist()) <= set(KEPT)
    assert found.tokens[:, 0].tolist() == [4, 10]

    request.getfixturevalue("masked")
    expected = draft(kind, tree, survival, cases.params(kind))
    for name in ("tokens", "parents", "depths", "valid"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)


@pytest.mark.parametrize("kind", ["rnn", "dflash"])
def test_a_sampled_chain_has_a_law_over_all_tokens(request, kind):
    """Row 0 at temperature 0.7, row 1 greedy."""
    drafter = BlockDrafter(cases.KINDS[kind], TreeConfig())
    state = cases.observed(kind, cases.features(kind, 2, 6))
    anchors, positions = jnp.array([4, 10]), jnp.array([6, 6])
    temperature, keys = jnp.array([0.7, 0.0]), jax.random.split(jax.random.key(0), 2)
    chain = cases.draft_sampled(
        drafter, reduced(kind), state, anchors, positions, temperature, keys
    )
    assert set(np.asarray(chain.tokens).ravel().tolist()) <= set(KEPT)

    request.getfixturevalue("masked")
    params = cases.params(kind)
    head = bind(drafter.config, params.head)

    def choose(slot, logits):
        return chain.tokens[:, slot], tempered(logits, temperature)

    @jax.jit
    def run():
        stream = drafter.stream(params, state, anchors, positions)
        base = head.logits(params.vocabulary, stream)
        return rollout(head, params.vocabulary, stream, base, anchors, choose)

    _, laws = run()
    np.testing.assert_allclose(chain.log_q, laws[..., KEPT], atol=1e-4)
    assert chain.support.tolist() == KEPT


@pytest.mark.slow
def test_drafts_verified_by_rejection(plain):
    """Greedy: whatever is drafted, the target's likeliest tokens, those outside included."""
    drafter = LoadedDrafter(
        BlockDrafter(cases.KINDS["dspark"], TREES["dspark"]), reduced("dspark")
    )
    done = generate(
        tiny.target(), PROMPTS[:1], max_new_tokens=30, drafter=drafter, rejection=True
    )
    assert done[0].token_ids == plain[0]


def test_a_law_of_some_tokens_is_verified_exactly():
    """q(x) accept(x) + (rejected mass) residual(x) = p(x), though q is 0 outside."""
    random = np.random.default_rng(0)
    log_p = jax.nn.log_softmax(jnp.asarray(random.standard_normal(11)))
    support, own = jnp.array(KEPT), jax.nn.log_softmax(random.standard_normal(len(KEPT)))
    log_q = scatter_law(own[None], support[None], 11)[0]
    laws = jnp.broadcast_to(log_p, (11, 11)), jnp.broadcast_to(own, (11, len(KEPT)))
    taken = jnp.exp(log_q) * acceptance_probability(*laws, jnp.arange(11), support)
    rest = residual(log_p, log_q)
    found = taken + (1 - taken.sum()) * rest / rest.sum()
    np.testing.assert_allclose(found, jnp.exp(log_p), atol=1e-6)


def test_without_one_nothing_is_gathered():
    params = cases.params("dspark")
    assert params.vocabulary.unembed is tiny.target().params.unembed
    assert params.whole_output is None
