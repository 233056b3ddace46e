"""The headline property: whatever the drafter, the output is plain decoding's."""

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxspec.api import generate
from jaxspec.config import TreeConfig
from jaxspec.decoding.sampling import Sampling
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.drafters.joined import with_lookup
from jaxspec.drafters.ngram import PromptLookup
from jaxspec.drafters.plain import Plain
from jaxspec.drafters.small_model import SmallModel
from jaxspec.models.params import random_params
from tests import tiny
from tests.slow import slow_but

SMALL = tiny.target(tiny.LLAMA, seed=5)
DRAFTERS = {
    "plain padded to 2": LoadedDrafter(Plain(size=2)),
    "random": tiny.RANDOM,
    "lookup": LoadedDrafter(PromptLookup(size=16, depth=6)),
    "small chain": LoadedDrafter(SmallModel(SMALL.config), SMALL.params),
    "small tree": LoadedDrafter(
        SmallModel(SMALL.config, TreeConfig("top_budget", size=16), depth=4), SMALL.params
    ),
    "small tree and lookup": with_lookup(
        LoadedDrafter(
            SmallModel(SMALL.config, TreeConfig("top_budget", size=16), depth=4), SMALL.params
        )
    ),
    "itself": LoadedDrafter(SmallModel(tiny.QWEN3), tiny.target().params),
}
QUICK = ("random",)
GREEDY = Sampling()
SAMPLED = Sampling(temperature=0.7)
FILTERED = Sampling(temperature=1.0, top_k=8, top_p=0.9, min_p=0.02)
PROMPTS = tiny.prompts(1, 5, 17, 130)  # the last needs two chunks


def outputs(drafter=None, prompts=PROMPTS, target=None, **options):
    options = dict(max_new_tokens=30, seed=3) | options
    if drafter is not None:
        options["drafter"] = drafter
    return [c.token_ids for c in generate(target or tiny.target(), prompts, **options)]


@pytest.mark.parametrize(
    "sampling", [GREEDY, SAMPLED, FILTERED], ids=["greedy", "T", "filters"]
)
@pytest.mark.parametrize("name", slow_but(QUICK, DRAFTERS))
def test_speculative_equals_plain(name, sampling):
    assert outputs(DRAFTERS[name], sampling=sampling) == outputs(sampling=sampling)


@pytest.mark.slow
@pytest.mark.parametrize("config", [tiny.LLAMA, tiny.MOE], ids=["llama", "moe"])
def test_speculative_equals_plain_for_other_architectures(config):
    target = tiny.target(config)
    assert outputs(tiny.RANDOM, target=target) == outputs(target=target)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.integers(1, 40), min_size=4, max_size=4),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    top_p=st.sampled_from([0.5, 0.9, 1.0]),
    budget=st.integers(1, 16),
    max_new_tokens=st.integers(1, 40),
)
def test_speculative_equals_plain_for_any_request(
    seed, lengths, temperature, top_p, budget, max_new_tokens
):
    options = dict(
        prompts=tiny.prompts(*lengths, seed=seed),
        sampling=Sampling(temperature=temperature, top_p=top_p),
        seed=seed,
        max_new_tokens=max_new_tokens,
    )
    assert outputs(tiny.RANDOM, budget=budget, **options) == outputs(**options)


@pytest.mark.parametrize("name", slow_but(["random"], ["random", "small tree"]))
def test_a_batch_equals_its_rows_alone(name):
    drafter = DRAFTERS[name]
    together = outputs(drafter, sampling=SAMPLED, seed=[9, 8, 7, 6])
    alone = [
        outputs(drafter, [prompt], sampling=SAMPLED, seed=[seed])[0]
        for prompt, seed in zip(PROMPTS, (9, 8, 7, 6), strict=True)
    ]
    assert together == alone


def test_rows_of_one_batch_may_sample_differently():
    mixed = outputs(tiny.RANDOM, sampling=[GREEDY, SAMPLED, FILTERED, GREEDY])
    greedy, sampled, filtered = (outputs(sampling=s) for s in (GREEDY, SAMPLED, FILTERED))
    assert mixed == [greedy[0], sampled[1], filtered[2], greedy[3]]


@pytest.mark.slow
def test_batches_do_not_change_the_seeds():
    assert outputs(sampling=SAMPLED, batch_size=2) == outputs(sampling=SAMPLED)


def test_a_model_that_drafts_for_itself_is_always_right():
    itself = DRAFTERS["itself"]
    for completion in generate(tiny.target(), PROMPTS, drafter=itself, max_new_tokens=33):
        committed = (8, 8, 8, 8)  # P + 1 each; the first token is prefill's
        assert completion.stats.committed == committed


def test_a_drafter_that_knows_the_noise_is_mostly_right():
    """At a temperature where its likeliest token would hardly ever be chosen."""
    options = dict(sampling=Sampling(temperature=5.0), seed=3, max_new_tokens=65)
    done = generate(tiny.target(), PROMPTS, drafter=DRAFTERS["itself"], **options)
    assert sum(c.stats.tau for c in done) / len(done) > 3


def test_another_seed_gives_other_tokens():
    assert outputs(sampling=SAMPLED, seed=3) != outputs(sampling=SAMPLED, seed=4)


@pytest.mark.slow
def test_bfloat16_decodes_and_commits_what_it_reports():
    params = random_params(tiny.QWEN3, jax.random.key(0), scale=0.3, dtype="bfloat16")
    target = tiny.Target("tiny", tiny.QWEN3, params)
    for completion in generate(target, PROMPTS, drafter=tiny.RANDOM, max_new_tokens=20):
        assert len(completion.token_ids) == 20
        assert sum(completion.stats.committed) >= 19
