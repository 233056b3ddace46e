"""Which tree each kind of head grows from its scores."""

import heapq

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.config import TreeConfig
from jaxspec.drafters.block import BlockDrafter
from jaxspec.drafters.transitions import transition_table
from jaxspec.drafters.weights import bind
from tests import tiny
from tests.drafters import cases
from tests.drafters.oracle import Oracle

VOCAB, SIZE = cases.SHAPE["vocab_size"], 12


def draft(kind, tree, *, whole=True, **options):
    """Paths from the anchor to every node, best first, with their scores."""
    drafter = BlockDrafter(cases.KINDS[kind], tree, **options)
    state = cases.observed(kind, cases.features(kind, 1, 6))
    budget = jnp.array([tree.size])
    at = jnp.array([4]), jnp.array([6])
    grown = cases.draft(drafter, cases.params(kind), state, *at, budget)
    assert bool(grown.valid.all()) == whole
    tokens, parents = np.asarray(grown.tokens[0]), np.asarray(grown.parents[0])
    paths = [()]
    for node in range(1, int(grown.valid.sum())):
        paths.append((*paths[parents[node]], int(tokens[node])))
    return dict(zip(paths, np.asarray(grown.scores[0]).tolist(), strict=whole))


def best_paths(kind, count):
    """The best paths, each token scored given all tokens above it: {path: log-probability}."""
    config, features = cases.KINDS[kind], cases.features(kind, 1, 6)
    target = tiny.target().params
    oracle = Oracle(config, cases.params(kind).head, target.embed, target.unembed)
    stream, best = oracle.stream(features[0], 4), {}
    heap = [(0.0, (), np.zeros(config.rank))]  # no two paths are equal, nor their scores
    while len(best) < count:
        cost, path, state = heapq.heappop(heap)
        best[path] = -cost
        if len(path) < config.depth:
            logits, state = oracle.slot(stream[len(path)], path[-1] if path else 4, state)
            for token, score in enumerate(logits - np.log(np.exp(logits).sum())):
                heapq.heappush(heap, (cost - score, (*path, token), state))
    return best


@pytest.mark.parametrize("kind", ["dspark", "rnn", "treeflash"])
def test_path_conditioned_keeps_the_best_paths(kind):
    """With all tokens as candidates: exactly the best, given each path's own tokens."""
    found = draft(kind, TreeConfig("path_conditioned", SIZE, candidates=VOCAB))
    best = best_paths(kind, SIZE)
    assert list(found) == list(best)
    np.testing.assert_allclose(list(found.values()), list(best.values()), atol=2e-4)


@pytest.mark.parametrize("kind", ["dspark", "treeflash"])
def test_a_whole_table_of_transitions_is_the_path_conditioned_tree(kind):
    """For heads that look at the previous token alone."""
    everything = TreeConfig("transitions", SIZE, width=VOCAB, candidates=VOCAB)
    conditioned = TreeConfig("path_conditioned", SIZE, candidates=VOCAB)
    table, paths = draft(kind, everything), draft(kind, conditioned)
    assert list(table) == list(paths)
    np.testing.assert_allclose(list(table.values()), list(paths.values()), atol=1e-4)


@pytest.mark.parametrize("kind", ["dspark", "dflash"])
def test_other_trees_score_along_the_greedy_chain(kind):
    """Wide trees contain the chain that the head itself would draft."""
    chain = draft(kind, TreeConfig("chain", 4))
    for tree in (TreeConfig("best_first", 32, width=4), TreeConfig("top_budget", 32)):
        found = draft(kind, tree)
        for path, score in list(chain.items())[:3]:
            assert found[path] == pytest.approx(score, abs=1e-5)


def test_survival_scores():
    """The first choice after a node scores its confidence instead of its probability."""
    config, features = cases.KINDS["rnn"], cases.features("rnn", 1, 6)
    target = tiny.target().params
    oracle = Oracle(config, cases.params("rnn").head, target.embed, target.unembed)
    own, _, logits = oracle.chain(features[0], 4)
    found = draft(
        "rnn", TreeConfig("path_conditioned", 32, candidates=VOCAB), survival_scores=True
    )
    survival = np.cumsum(-np.log1p(np.exp(-logits)))
    assert found[(own[0],)] == pytest.approx(survival[0], abs=2e-4)
    for depth in range(1, 4):
        if tuple(own[: depth + 1]) in found:
            assert found[tuple(own[: depth + 1])] == pytest.approx(survival[depth], abs=2e-4)


@pytest.mark.parametrize("slots", [4, 1])
def test_transition_table_links_children_to_their_own_rows(slots):
    kind, parents = "dspark", 4
    params = cases.params(kind)
    drafter = BlockDrafter(cases.KINDS[kind], TreeConfig("transitions"))
    state = cases.observed(kind, cases.features(kind, 1, 6))
    head = bind(drafter.config, params.head)

    @jax.jit
    def run(anchor):
        stream = drafter.stream(params, state, anchor, jnp.array([6]))[:, :slots]
        base = head.logits(params.vocabulary, stream)
        options = dict(parents=parents, children=5)
        scores = base, jnp.zeros((1, base.shape[1], 1))
        return base, transition_table(
            head, params.vocabulary, stream, *scores, anchor, **options
        )

    base, (tokens, _, following) = run(jnp.array([4]))
    assert tokens.shape == following.shape == (1, slots, parents, 5)
    likely = np.argsort(-np.asarray(base[0]), axis=-1)[:, :parents]
    for slot, parent, child in np.ndindex(*tokens.shape[1:]):
        row, token = int(following[0, slot, parent, child]), int(tokens[0, slot, parent, child])
        if slot == tokens.shape[1] - 1 or token not in likely[slot]:
            assert row == -1
        else:
            assert likely[slot, row] == token


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("dflash", {}, "'transitions' needs a sequential head .* is None; use top_budget"),
        ("rnn", {}, "is 'rnn'; use path_conditioned"),
        ("dspark", {"survival_scores": True}, "survival_scores needs a path_conditioned tree"),
    ],
)
def test_what_cannot_be_drafted(kind, options, message):
    with pytest.raises(ValueError, match=message):
        BlockDrafter(cases.KINDS[kind], TreeConfig("transitions"), **options)
