"""The oracle over a drafter's candidates: ranks by hand, and the drafters' own chains."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from examples.shipped_drafter import oracle
from jaxspec.config import TreeConfig
from jaxspec.decoding.sampling import Sampling
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.drafters.head import Vocabulary
from jaxspec.drafters.ngram import PromptLookup
from jaxspec.evaluation import walk as w
from tests import tiny
from tests.drafters import cases, eagle_cases
from tests.slow import slow_but

NEVER = np.iinfo(np.int32).max
DRAFTERS = {
    "rnn": cases.loaded("rnn", TreeConfig("chain", size=5)),
    "dflash": cases.loaded("dflash", TreeConfig("chain", size=5)),
    "dflash2": cases.loaded("dflash2", TreeConfig("chain", size=5)),
    "eagle": eagle_cases.loaded("plain", TreeConfig("chain", size=5)),
}


class Scores:
    """A drafter of four tokens with the same scores after any path: token 2 is likeliest, then
    0 and 3 alike, and token 1 is never drafted."""

    depth = 3
    logits = jnp.array([[1.0, -jnp.inf, 2.0, 1.0]])

    def rollout(self, params, state, anchor, position, choose):
        rows = [choose(jnp.int32(slot), self.logits) for slot in range(self.depth)]
        tokens, laws = zip(*rows, strict=True)
        return jnp.stack(tokens, axis=1), jnp.stack(laws, axis=1)


def ranks(params, path):
    row = jnp.zeros(1, jnp.int32)
    return oracle.highest_ranks(Scores(), params, None, row, row, jnp.array([path]), None)


@pytest.mark.parametrize(
    ("path", "highest"),
    [
        ([2, 2, 2], [0, 0, 0]),
        ([0, 2, 2], [1, 1, 1]),  # of equal scores the lower token comes first
        ([3, 0, 2], [2, 2, 2]),
        ([2, 0, 3], [0, 1, 2]),
        ([2, 1, 2], [0, NEVER, NEVER]),
        ([0, -1, -1], [1, NEVER, NEVER]),  # the text ends
    ],
)
def test_ranks_along_a_path(path, highest):
    params = types.SimpleNamespace(vocabulary=Vocabulary(jnp.zeros((4, 1)), jnp.zeros((4, 1))))
    found = ranks(params, path)
    assert found.tolist() == [highest]


def test_ranks_in_a_draft_vocabulary():
    """Tokens 1, 4, 5 and 9 are drafted, with the scores of 0 … 3."""
    kept = jnp.array([1, 4, 5, 9])
    vocabulary = Vocabulary(jnp.zeros((11, 1)), jnp.zeros((4, 1)), kept)
    params = types.SimpleNamespace(vocabulary=vocabulary)
    for path, highest in {(5, 9, 5): [0, 2, 2], (5, 6, 5): [0, NEVER, NEVER]}.items():
        found = ranks(params, path)
        assert found.tolist() == [highest]


@pytest.fixture(scope="module", params=[0.0, 1.0])
def answers(request):
    options = dict(sampling=Sampling(temperature=request.param), batch_size=2)
    return w.record(tiny.target(), tiny.prompts(3, 17), max_new_tokens=24, spare=8, **options)


@pytest.mark.parametrize("name", slow_but(["rnn"], DRAFTERS))
def test_the_likeliest_candidates_alone_are_the_chain(name, answers):
    drafter = DRAFTERS[name]
    observed = w.observe(tiny.target(), [drafter], answers, batch=2)
    (state,) = observed.states
    found = oracle.ranks(observed, answers, drafter, state)
    chains = w.tabulate(observed, answers, drafter, state)
    for answer, own, chain in zip(answers, found, chains, strict=True):
        (walked, visited), (expected, anchors) = (
            w.walk(answer, own, 1),
            w.walk(answer, chain, 5),
        )
        assert (walked.committed, visited) == (expected.committed, anchors)
        assert walked.nodes == 0
        by_k = [w.walk(answer, own, k)[0].tau for k in (1, 2, 4, NEVER)]
        assert by_k == sorted(by_k) and by_k[0] < by_k[-1] <= drafter.drafter.depth + 1


def test_drafters_without_scores_are_refused(answers):
    lookup = LoadedDrafter(PromptLookup(size=8))
    observed = w.observe(tiny.target(), [lookup], answers, batch=2)
    with pytest.raises(ValueError, match="PromptLookup does not score tokens.*trained drafter"):
        oracle.ranks(observed, answers, lookup, *observed.states)


def test_the_better_of_two():
    ranks = w.Table(np.array([[0, 3], [1, 1], [2, 5]]), np.zeros(3), np.zeros((3, 1)))
    lookup = w.Table(np.array([[1, 9, 9], [1, 2, 3], [9, 9, 9]]), np.zeros(3), np.zeros((3, 4)))
    both = oracle.with_other(ranks, lookup, budget=4)
    assert [(both.nodes < k).sum(axis=1).tolist() for k in (1, 2, 4)] == [
        [1, 3, 0],
        [1, 3, 0],
        [2, 3, 1],
    ]
