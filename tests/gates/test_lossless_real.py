"""40 real prompts, the real small target, float32: speculative greedy output is plain's."""

import dataclasses

import pytest

from jaxspec.api import generate
from jaxspec.config import TreeConfig
from jaxspec.data.prompts import read_prompts
from jaxspec.decoding.sampling import Sampling
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.drafters.ngram import PromptLookup
from jaxspec.drafters.small_model import SmallModel
from jaxspec.models.target import Target
from tests import tiny

pytestmark = [pytest.mark.gate, pytest.mark.real]

SETS = ("gsm8k", "math500", "humaneval", "mbpp", "mt-bench")
NEW_TOKENS = 24
GREEDY = Sampling()
SAMPLED = Sampling(temperature=0.7, top_p=0.9)
HOT = Sampling(temperature=1.0, top_p=0.9)


@pytest.fixture(scope="module")
def target(smollm2) -> Target:
    return Target("smollm2-135m", smollm2.config, smollm2.params, smollm2.tokenizer)


@pytest.fixture(scope="module")
def prompts(shared) -> list[str]:
    """Eight of each set; their lengths differ, so batches of eight are uneven."""
    rows = [read_prompts(shared / "prompts" / f"{name}.jsonl")[:8] for name in SETS]
    mixed = [prompt for row in zip(*rows, strict=True) for prompt in row]
    assert len(mixed) == 40
    return mixed


def drafters(target) -> dict[str, LoadedDrafter]:
    config = dataclasses.replace(target.config, num_layers=4)
    params = dataclasses.replace(target.params, layers=target.params.layers[:4])
    small = SmallModel(config, TreeConfig("top_budget", size=8), depth=3)
    return {
        "random": LoadedDrafter(
            tiny.RandomTrees(size=8, depth=3, vocab=target.config.vocab_size)
        ),
        "lookup": LoadedDrafter(PromptLookup(size=8)),
        "the first layers": LoadedDrafter(small, params),
    }


def ids(target, prompts, **options):
    options = dict(max_new_tokens=NEW_TOKENS, seed=range(len(prompts))) | options
    return [c.token_ids for c in generate(target, prompts, **options)]


@pytest.fixture(scope="module")
def plain(target, prompts):
    """Plain decoding, one prompt at a time: what everything else is compared with."""
    cache = {}

    def decode(sampling):
        if sampling not in cache:
            cache[sampling] = ids(target, prompts, sampling=sampling, batch_size=1)
        return cache[sampling]

    return decode


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("name", ["random", "lookup", "the first layers"])
def test_greedy(target, prompts, plain, name, batch_size):
    drafter = drafters(target)[name]
    found = ids(target, prompts, drafter=drafter, batch_size=batch_size)
    assert found == plain(GREEDY)


@pytest.mark.parametrize("sampling", [SAMPLED, HOT], ids=["T=0.7", "T=1"])
def test_sampled(target, prompts, plain, sampling):
    drafter = drafters(target)["lookup"]
    found = ids(target, prompts, drafter=drafter, sampling=sampling, batch_size=8)
    assert found == plain(sampling)
