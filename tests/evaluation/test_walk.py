"""Walking a table gives decoding's own counts, for every drafter, tree, budget and sampling."""

import dataclasses

import numpy as np
import pytest

from jaxspec.api import generate
from jaxspec.config import TreeConfig
from jaxspec.decoding.sampling import Sampling
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.drafters.joined import with_lookup
from jaxspec.drafters.ngram import PromptLookup
from jaxspec.drafters.small_model import SmallModel
from jaxspec.evaluation import walk as w
from jaxspec.trees.tree import DraftTree
from tests import tiny
from tests.drafters import cases
from tests.slow import slow_but

SIZE, NEW = 16, 24
PROMPTS = tiny.prompts(3, 17, 30, 5)
SMALL = dataclasses.replace(tiny.QWEN3, num_layers=1)
DRAFTERS = {
    "lookup": LoadedDrafter(PromptLookup(size=SIZE, depth=5)),
    "small": LoadedDrafter(
        SmallModel(SMALL, TreeConfig("top_budget", size=SIZE), depth=4),
        dataclasses.replace(tiny.target().params, layers=tiny.target().params.layers[:1]),
    ),
    "chain": cases.loaded("dspark", TreeConfig("chain", size=SIZE)),
    "best_first": cases.loaded("jetspec", TreeConfig("best_first", size=SIZE, width=3)),
    "top_budget": cases.loaded("dspark", TreeConfig("top_budget", size=SIZE)),
    "path_conditioned": cases.loaded(
        "rnn", TreeConfig("path_conditioned", size=SIZE, candidates=6)
    ),
    "transitions": cases.loaded(
        "treeflash", TreeConfig("transitions", size=SIZE, width=3, candidates=4)
    ),
}
DRAFTERS["path_conditioned and lookup"] = with_lookup(DRAFTERS["path_conditioned"])
SAMPLINGS = {
    "greedy": Sampling(),
    "sampled, stops": Sampling(temperature=1.0, stop_ids=(3,)),
}


@pytest.fixture(scope="module", params=SAMPLINGS)
def recorded(request):
    sampling = SAMPLINGS[request.param]
    answers = w.record(
        tiny.target(), PROMPTS, max_new_tokens=NEW, spare=16, sampling=sampling, batch_size=4
    )
    return sampling, answers


def tables_of(name, answers):
    observed = w.observe(tiny.target(), [DRAFTERS[name]], answers, batch=4)
    return w.tabulate(observed, answers, DRAFTERS[name], observed.states[0])


@pytest.mark.parametrize("name", slow_but(["path_conditioned"], DRAFTERS))
def test_a_walk_counts_what_decoding_counts(recorded, name):
    sampling, answers = recorded
    tables = tables_of(name, answers)
    for budget in (5, SIZE):
        done = generate(
            tiny.target(),
            PROMPTS,
            drafter=DRAFTERS[name],
            max_new_tokens=NEW,
            sampling=sampling,
            seed=[0, 1, 2, 3],
            budget=budget,
        )
        pairs = zip(answers, tables, strict=True)
        walked = [w.walk(answer, table, budget)[0] for answer, table in pairs]
        assert walked == [completion.stats for completion in done]
        assert [answer.new_tokens for answer in answers] == [len(d.token_ids) for d in done]
    assert max(map(max, (stats.committed for stats in walked))) > 1  # something matched


def test_predictions_name_the_accepted_nodes(recorded):
    """As many nodes were accepted as the rounds say, and their probabilities are the tree's."""
    _, answers = recorded
    tables = tables_of("path_conditioned", answers)
    for answer, table in zip(answers, tables, strict=True):
        _, visited = w.walk(answer, table, SIZE)
        predicted, accepted = w.predictions(table, visited, SIZE)
        assert predicted.min() > 0 and predicted.max() <= 1 + 1e-6
        assert len(predicted) == len(visited) * (SIZE - 1)
        assert accepted.sum() == (table.nodes[visited] < SIZE).sum()


def test_nodes_of_path():
    """0 ── 1 (a) ── 3 (b)
    └── 2 (b) ── 4 (b)"""
    a, b = 7, 8
    tree = DraftTree(
        tokens=np.array([[5, a, b, b, b, 0]]),
        parents=np.array([[-1, 0, 0, 1, 2, -1]]),
        depths=np.array([[0, 1, 1, 2, 2, 0]]),
        scores=np.zeros((1, 6)),
        valid=np.array([[True] * 5 + [False]]),
    )
    for path, nodes in {
        (a, b, b): [1, 3, 6],
        (b, b, a): [2, 4, 6],
        (b, a, b): [2, 6, 6],
        (0, a, b): [6, 6, 6],
    }.items():
        assert w.nodes_of_path(tree, np.array([path])).tolist() == [nodes]


@pytest.mark.slow
def test_a_hybrid_is_walked_and_has_no_gaps():
    target, drafter = tiny.target(tiny.HYBRID), DRAFTERS["chain"]
    answers = w.record(target, PROMPTS[:1], max_new_tokens=8, spare=16, batch_size=1)
    observed = w.observe(target, [drafter], answers, batch=1)
    (table,) = w.tabulate(observed, answers, drafter, observed.states[0])
    done = generate(target, PROMPTS[:1], drafter=drafter, max_new_tokens=8, budget=5)
    assert w.walk(answers[0], table, 5)[0] == done[0].stats
    with pytest.raises(ValueError, match="gated delta nets.*leave the gaps out"):
        w.branch_gaps(target, observed, answers, drafter, observed.states[0])


@pytest.mark.slow
def test_the_gap_of_a_branch_is_of_log_probabilities():
    """A drafter that is the target has none; the text is its own greedy answer."""
    target = tiny.target()
    twin = SmallModel(target.config, TreeConfig("chain", size=4), depth=3)
    drafter = LoadedDrafter(twin, target.params)
    answers = w.record(target, PROMPTS[:2], max_new_tokens=8, spare=4, batch_size=2)
    observed = w.observe(target, [drafter], answers, batch=2)
    gaps = w.branch_gaps(target, observed, answers, drafter, observed.states[0], stride=3)
    assert len(gaps) == 2 * 3
    np.testing.assert_allclose(gaps, 0, atol=1e-4)

    other = LoadedDrafter(twin, tiny.target(seed=5).params)
    observed = w.observe(target, [other], answers, batch=2)
    (gap, *_) = w.branch_gaps(target, observed, answers, other, observed.states[0], stride=8)
    row = list(answers[0].tokens[: answers[0].start + 1])
    expected = 0.0
    for _ in range(3):
        law, own = (log_softmax(tiny.logits(t, row)[-1]) for t in (target, tiny.target(seed=5)))
        row.append(int(own.argmax()))
        expected += own[row[-1]] - law[row[-1]]
    assert gap == pytest.approx(expected, abs=1e-4) and abs(gap) > 0.1


def log_softmax(x):
    return x - np.log(np.exp(x - x.max()).sum()) - x.max()
