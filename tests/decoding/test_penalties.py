"""Penalties, biases and least lengths: against their definitions on plain texts, and the same
tokens with any drafter, also where rows of a batch ask for different things."""

import dataclasses

import numpy as np
import pytest

from jaxspec.api import generate
from jaxspec.config import TreeConfig
from jaxspec.decoding.sampling import Sampling
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.drafters.small_model import SmallModel
from tests import tiny
from tests.drafters import cases

EOS = (3, 7)
MIXED = [
    Sampling(stop_ids=()),
    Sampling(repetition_penalty=1.3, stop_ids=()),
    Sampling(temperature=0.8, presence_penalty=1.5, frequency_penalty=0.4, stop_ids=()),
    Sampling(temperature=0.9, top_k=6, repetition_penalty=0.8, stop_ids=()),
    Sampling(logit_bias={2: -100, 5: 3.5}, frequency_penalty=-0.5, stop_ids=()),
    Sampling(temperature=1.2, min_tokens=9, logit_bias={3: 4.0}, stop_ids=EOS),
    Sampling(min_tokens=6, logit_bias={7: 20.0}, stop_ids=EOS),
]
PROMPTS = tiny.prompts(4, 7, 5, 9, 6, 3, 8)
DRAFTERS = {
    "random": tiny.RANDOM,
    "itself": LoadedDrafter(
        SmallModel(tiny.QWEN3, TreeConfig("top_budget", size=16), depth=4), tiny.target().params
    ),
}


def tokens(sampling=MIXED, prompts=PROMPTS, **options):
    options = dict(max_new_tokens=24, seed=3, batch_size=4) | options
    done = generate(tiny.target(), prompts, sampling=sampling, **options)
    return [c.token_ids for c in done]


def by_definition(prompt, sampling, max_new_tokens) -> list[int]:
    """Greedy decoding, one forward of the whole text a token, with dictionaries of counts."""
    text = list(prompt)
    while len(text) < len(prompt) + max_new_tokens:
        logits = tiny.logits(tiny.target(), text)[-1].astype(np.float64)
        answer = text[len(prompt) :]
        for token, bias in sampling.logit_bias:
            logits[token] += bias
        for token in sampling.stop_ids if len(answer) < sampling.min_tokens else ():
            logits[token] = -np.inf
        for token in set(text):
            factor = sampling.repetition_penalty
            logits[token] *= 1 / factor if logits[token] > 0 else factor
        for token in set(answer):
            logits[token] -= sampling.presence_penalty
            logits[token] -= sampling.frequency_penalty * answer.count(token)
        text.append(int(logits.argmax()))
        if text[-1] in sampling.stop_ids:
            break
    return text[len(prompt) :]


@pytest.mark.parametrize("sampling", [s for s in MIXED if not s.temperature])
def test_plain_decoding_follows_the_definitions(sampling):
    assert tokens(sampling)[:2] == [by_definition(p, sampling, 24) for p in PROMPTS[:2]]


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAFTERS)
def test_trees_give_plain_decodings_tokens(name):
    options = dict(drafter=DRAFTERS[name], max_new_tokens=24, seed=3, batch_size=4)
    done = generate(tiny.target(), PROMPTS, sampling=MIXED, **options)
    assert [c.token_ids for c in done] == tokens()
    assert max(max(c.stats.committed) for c in done) > 2  # through branches, not roots alone


def test_neutral_values_change_nothing():
    neutral = dataclasses.replace(MIXED[0], logit_bias={4: 0.0})
    assert tokens(neutral) == tokens(MIXED[0])
    assert tokens(MIXED)[0] == tokens(MIXED[0])[0]


@pytest.mark.slow
def test_chains_that_are_rejected_or_not():
    """Greedy rows of rejection sampling are plain decoding's."""
    greedy = [dataclasses.replace(s, temperature=0.0) for s in MIXED]
    drawn = cases.loaded("dspark", TreeConfig("chain", size=8))
    assert tokens(greedy, drafter=drawn, rejection=True) == tokens(greedy)


def test_rejection_sampling_keeps_to_the_adjusted_law():
    banned = Sampling(temperature=2.0, logit_bias={t: -100 for t in range(8)}, stop_ids=())
    drawn = cases.loaded("dspark", TreeConfig("chain", size=8))
    for row in tokens(banned, drafter=drawn, rejection=True):
        assert len(row) == 24 and set(row) <= {8, 9, 10} and len(set(row)) > 1


def test_least_lengths():
    for row in tokens(MIXED[6]):
        assert len(row) == 7 and row[-1] == 7 and not set(row[:-1]) & set(EOS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(presence_penalty=2.5), "presence_penalty is 2.5; expected -2 … 2"),
        (dict(frequency_penalty=float("nan")), "frequency_penalty is nan"),
        (dict(repetition_penalty=0.0), "repetition_penalty is 0.0; expected a finite number"),
        (dict(min_tokens=-1), "min_tokens is -1; expected at least 0"),
        (dict(logit_bias={1: 101}), "expected -100 … 100 for every token"),
        (dict(logit_bias={t: 1 for t in range(301)}), "expected at most 300 tokens"),
        (dict(logit_bias={11: 1}), "logit_bias has token id 11; the target's vocabulary is 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tokens(Sampling(**options))
