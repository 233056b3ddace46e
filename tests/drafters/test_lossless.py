"""Whatever a block drafter drafts, in any tree, the output is plain decoding's."""

import pytest

from jaxspec.config import TreeConfig
from jaxspec.decoding.sampling import Sampling
from jaxspec.generation import generate
from tests import tiny
from tests.drafters import cases

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
}


@pytest.fixture(scope="module")
def plain():
    return outputs()


def outputs(**options):
    done = generate(
        tiny.target(), PROMPTS, max_new_tokens=30, seed=3, sampling=SAMPLINGS, **options
    )
    return [completion.token_ids for completion in done]


@pytest.mark.parametrize("kind", TREES)
def test_speculative_equals_plain(plain, kind):
    assert outputs(drafter=cases.loaded(kind, TREES[kind])) == plain
