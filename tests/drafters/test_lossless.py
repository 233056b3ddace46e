"""Whatever a block drafter drafts, in any tree, the output is plain decoding's."""

import pytest

from jaxspec.api import generate
from jaxspec.checkpoints.drafters import save_drafter
from jaxspec.config import TREE_KINDS, TreeConfig
from jaxspec.decoding.sampling import Sampling
from jaxspec.drafters.joined import with_lookup
from jaxspec.loading import load_drafter
from tests import tiny
from tests.drafters import cases
from tests.slow import slow_but

PROMPTS = tiny.prompts(1, 5, 17, 30)
SAMPLINGS = [
    Sampling(),
    Sampling(temperature=0.7),
    Sampling(),
    Sampling(temperature=1, top_p=0.9),
]
TREES = {
    "dflash": TreeConfig("top_budget", size=16),
    "jetspec": TreeConfig("best_first", size=16, width=3),
    "dspark": TreeConfig("chain", size=8),
    "gated": TreeConfig("path_conditioned", size=16, candidates=6),
    "rnn": TreeConfig("path_conditioned", size=16, candidates=6),
    "treeflash": TreeConfig("transitions", size=16, width=3, candidates=4),
    "window": TreeConfig("chain", size=8),
    "dflash2": TreeConfig("path_conditioned", size=16),
}


@pytest.fixture(scope="module")
def plain():
    return outputs()


def outputs(**options):
    done = generate(
        tiny.target(), PROMPTS, max_new_tokens=30, seed=3, sampling=SAMPLINGS, **options
    )
    return [completion.token_ids for completion in done]


@pytest.mark.parametrize("kind", slow_but(["rnn"], TREES))
def test_speculative_equals_plain(plain, kind):
    assert outputs(drafter=cases.loaded(kind, TREES[kind])) == plain


@pytest.mark.parametrize("kind", slow_but(["rnn"], TREES))
def test_copies_behind_its_nodes_change_nothing(plain, kind):
    assert outputs(drafter=with_lookup(cases.loaded(kind, TREES[kind]))) == plain


@pytest.mark.parametrize("tree", slow_but(["transitions"], TREE_KINDS))
def test_a_selector_in_every_tree(plain, tree):
    assert outputs(drafter=cases.loaded("dflash2", TreeConfig(tree, size=16, width=3))) == plain


@pytest.mark.slow
def test_a_selectors_walk_verified_by_rejection(plain):
    """Greedy: the target's likeliest tokens, whatever is drawn among the candidates."""
    drafter = cases.loaded("dflash2", TreeConfig("chain", size=8))
    done = generate(
        tiny.target(), PROMPTS[:1], max_new_tokens=30, drafter=drafter, rejection=True
    )
    assert done[0].token_ids == plain[0]


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["threshold", "survival"])
def test_confidence_rules_shorten_chains_and_change_nothing(plain, rule, tmp_path):
    loaded = cases.loaded("dspark", TREES["dspark"])
    save_drafter(tmp_path / "dspark", loaded)
    folder, target = str(tmp_path / "dspark"), tiny.target()
    drafter = load_drafter(folder, target, tree=TREES["dspark"], **{rule: 0.5})
    done = generate(
        target, PROMPTS, max_new_tokens=30, seed=3, sampling=SAMPLINGS, drafter=drafter
    )
    assert [completion.token_ids for completion in done] == plain
    nodes = [completion.stats.nodes / completion.stats.rounds for completion in done]
    assert 1 < sum(nodes) / len(nodes) < loaded.drafter.depth + 1
