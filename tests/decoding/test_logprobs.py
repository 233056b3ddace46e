"""Log-probabilities that come with decoding equal those of one forward over the whole text."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.decoding import logprobs
from jaxspec.decoding.loop import decode
from jaxspec.decoding.prefill import prefill
from jaxspec.decoding.requests import capacity_for, pack, request_keys
from jaxspec.decoding.sampling import Sampling
from jaxspec.decoding.state import Decoder, Params
from tests import tiny
from tests.drafters import cases

TOP = 3
PROMPTS = tiny.prompts(5, 21, 34)
SAMPLINGS = [
    Sampling(stop_ids=()),
    Sampling(temperature=0.9, stop_ids=()),
    Sampling(temperature=1.3, top_k=4, stop_ids=()),
]
CHAIN = cases.loaded("dspark", cases.TreeConfig("chain", size=8))


def run(drafter=tiny.RANDOM, asked=(logprobs.ALL,) * 3, rejection=False, top=TOP):
    """The last state of PROMPTS, decoded by 20 tokens."""
    decoder = Decoder(
        tiny.QWEN3, drafter.drafter, chunk=16, top_logprobs=top, rejection=rejection
    )
    requests = pack(
        decoder,
        PROMPTS,
        batch=3,
        capacity=capacity_for(54, decoder),
        max_new_tokens=20,
        budget=8,
        sampling=SAMPLINGS,
        keys=request_keys(0, 3),
    )
    sampling = dataclasses.replace(requests.sampling, logprobs=np.array(asked, np.int32))
    requests = dataclasses.replace(requests, sampling=sampling)
    params = Params(tiny.target().params, drafter.params)
    state = decode(decoder, params, prefill(decoder, params, requests), sampling, np.int32(99))
    return jax.device_get(state)


def full_forward(tokens) -> np.ndarray:
    return np.array(jax.nn.log_softmax(tiny.logits(tiny.target(), tokens.tolist())))


def check_row(state, row, first):
    """Places from `first` on."""
    tokens = state.tokens[row, : state.length[row]]
    law = full_forward(tokens)[first - 1 : -1]
    kept = jax.tree.map(lambda x: x[row, first : len(tokens)], state.logprobs)
    chosen = np.take_along_axis(law, tokens[first:, None], axis=1)[:, 0]
    np.testing.assert_allclose(kept.chosen, chosen, atol=1e-4)
    np.testing.assert_allclose(kept.top, -np.sort(-law)[:, :TOP], atol=1e-4)
    np.testing.assert_allclose(kept.top, np.take_along_axis(law, kept.tokens, 1), atol=1e-4)


@pytest.mark.parametrize(
    ("drafter", "rejection"),
    [(tiny.RANDOM, False), pytest.param(CHAIN, True, marks=pytest.mark.slow)],
    ids=["tree", "rejection"],
)
def test_of_prompts_and_answers(drafter, rejection):
    """Whatever the temperature and the filters, the law is the model's own."""
    state = run(drafter, rejection=rejection)
    assert state.committed.max() > 1  # some paths were longer than the root
    for row in range(3):
        check_row(state, row, first=1)


def test_only_of_rows_that_ask():
    state = run(asked=[logprobs.NONE, logprobs.ALL, logprobs.NEW])
    kept = state.logprobs
    assert not kept.chosen[0].any() and not kept.top[0].any()
    check_row(state, 1, first=1)
    assert not kept.chosen[2, : len(PROMPTS[2])].any()
    check_row(state, 2, first=len(PROMPTS[2]))


@pytest.mark.slow
def test_nothing_is_kept_unless_there_is_room_for_it():
    state = run(top=0)
    assert state.logprobs is None
    np.testing.assert_array_equal(state.tokens, run().tokens)


def test_what_they_are_by_hand():
    logits = jnp.log(jnp.array([[[1.0, 5.0, 2.0, 2.0]]]))
    found = logprobs.of_tokens(logits, jnp.array([[3]]), 2)
    np.testing.assert_allclose(np.exp(found.chosen), [[0.2]], rtol=1e-6)
    np.testing.assert_allclose(np.exp(found.top), [[[0.5, 0.2]]], rtol=1e-6)
    assert found.tokens.tolist() == [[[1, 2]]]


def test_unasked_they_are_not_computed():
    """XLA moves what is the same for all rows, with one row everything, out of their loop."""
    logits, path, asked = jnp.zeros((1, 4, 64)), jnp.zeros((1, 3), jnp.int32), jnp.zeros(1)
    of_path = jax.jit(lambda *given: logprobs.of_path(given[0], None, *given[1:], TOP))
    compiled = of_path.lower(logits, path, path, asked).compile().as_text()
    nested, always = compiled.split("\nENTRY ")
    assert " exponential(" in nested and " conditional(" in always
    assert not {" exponential(", " sort("} & {*re.findall(r" \w+\(", always)}


def test_prompts_longer_than_the_positions_computed_at_a_time():
    length = logprobs.NODES_AT_ONCE + 5
    (tokens,) = tiny.prompts(length)
    hidden = jax.random.normal(jax.random.key(0), (1, length, tiny.QWEN3.hidden_size))
    params, asked = tiny.target().params, jnp.array([logprobs.ALL])
    kept = logprobs.empty_logprobs(1, length + 1, TOP)
    row = jnp.array([[*tokens, 0]])
    found = jax.jit(logprobs.of_prompts)(params, hidden, row, 0, asked, kept)
    law = jax.nn.log_softmax(hidden[0] @ params.unembed.T)[:-1]
    own = np.asarray(law)[np.arange(length - 1), tokens[1:]]
    np.testing.assert_allclose(found.chosen[0, 1:length], own, atol=1e-4)
