"""Logits, hidden states and log-probabilities of given texts, and their derivatives."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxspec
from tests import tiny
from tests.slow import slow_but

IDS = [3, 1, 4, 1, 5, 9, 2, 6]
CONFIGS = {"dense": tiny.QWEN3, "mixture": tiny.MOE}


@pytest.fixture(scope="module", params=slow_but(["dense"], CONFIGS))
def target(request):
    return tiny.target(CONFIGS[request.param])


def narrow(target):
    weights = jax.tree.map(lambda x: x.astype(jnp.bfloat16), target.params)
    return dataclasses.replace(target, params=weights)


def last(target, ids=None, **inputs):
    """A number that depends on everything before."""
    return jaxspec.logits(target, ids, **inputs)[..., -1, 7].sum()


def test_logits_are_those_of_a_forward_without_a_cache(target):
    expected = tiny.logits(target, IDS)
    assert expected.shape == (8, 11)
    np.testing.assert_allclose(jaxspec.logits(target, IDS), expected, rtol=1e-5, atol=1e-5)
    both = jaxspec.logits(target, [IDS, IDS[::-1]])
    assert both.shape == (2, 8, 11)
    np.testing.assert_allclose(both[0], expected, rtol=1e-5, atol=1e-5)


def test_the_hidden_states_end_in_the_logits(target):
    found = jaxspec.hidden_states(target, IDS)
    assert found.shape == (4, 8, 32)  # the embedding and three layers
    np.testing.assert_array_equal(found[0], target.params.embed[np.array(IDS)])
    expected = np.einsum("tm,vm->tv", found[-1], target.params.unembed)
    np.testing.assert_allclose(expected, jaxspec.logits(target, IDS), rtol=1e-4, atol=1e-4)
    assert jaxspec.hidden_states(target, [IDS, IDS]).shape == (4, 2, 8, 32)


def test_embeddings_take_the_place_of_tokens(target):
    embeddings = jaxspec.hidden_states(target, IDS)[0]
    expected = jaxspec.logits(target, IDS)
    for given in (embeddings, embeddings.tolist()):
        np.testing.assert_array_equal(jaxspec.logits(target, embeddings=given), expected)


@pytest.mark.parametrize("cast", [lambda target: target, narrow])
def test_the_derivative_by_the_weights(target, cast):
    target = cast(target)
    slope = jax.jit(jax.grad(lambda target: last(target, IDS)))(target)
    assert slope.params.embed.dtype == target.params.embed.dtype
    found = [float(jnp.abs(x.astype(jnp.float32)).max()) for x in jax.tree.leaves(slope)]
    assert all(math.isfinite(x) for x in found) and min(found) > 0


def test_the_derivative_by_the_embeddings_is_a_difference_quotient(target):
    embeddings = jaxspec.hidden_states(target, IDS)[0]
    direction = jax.random.normal(jax.random.key(0), embeddings.shape)
    by_embeddings = jax.jit(jax.value_and_grad(lambda x: last(target, embeddings=x)))
    found = jnp.vdot(by_embeddings(embeddings)[1], direction)
    step = 1e-3
    ahead, behind = (by_embeddings(embeddings + s * direction)[0] for s in (step, -step))
    assert found == pytest.approx(float(ahead - behind) / (2 * step), rel=0.02)


def test_scores_are_log_probabilities_of_the_next_tokens(target):
    rows = [IDS, *tiny.prompts(1, 300)]
    scores = jaxspec.score(target, rows, batch_size=2)
    for row, found in zip(rows, scores, strict=True):
        law = jax.nn.log_softmax(jnp.asarray(tiny.logits(target, row)))
        expected = np.take_along_axis(law[:-1], np.array(row[1:], int)[:, None], axis=1)[:, 0]
        np.testing.assert_allclose(found.log_probs, expected, rtol=1e-4, atol=1e-4)
    assert scores[0].total == pytest.approx(float(scores[0].log_probs.sum()))
    assert scores[0].perplexity == pytest.approx(math.exp(-scores[0].total / 7))
    assert scores[0].to_dict() | {"total": 0, "perplexity": 0} == {
        "tokens": 8,
        "total": 0,
        "perplexity": 0,
    }
    assert repr(scores[0]).startswith("Score(8 tokens, total -")
    assert math.isnan(scores[1].perplexity)


def test_scoring_holds_the_logits_of_few_positions():
    wide = tiny.target(dataclasses.replace(tiny.QWEN3, vocab_size=40_000))
    from jaxspec.models.state import init_states
    from jaxspec.scoring import _score_chunk

    c, batch, chunk = wide.config, 8, 128
    cache = init_states(c, batch, 256, jnp.float32)
    tokens = jnp.zeros((batch, chunk + 1), jnp.int32)
    compiled = _score_chunk.lower(c, wide.params, cache, tokens, 0).compile()
    held = compiled.memory_analysis().temp_size_in_bytes
    assert held < batch * chunk * c.vocab_size * 4 / 2  # all their logits would be 164 MB


@pytest.mark.parametrize(
    "ids, message",
    [
        ([1, 11], "ids has token id 11; the target's vocabulary is 0 … 10"),
        ([[1], [2, 3]], "ids has rows of different lengths; expected equal ones"),
        ([1, [2]], "ids has rows of different lengths; expected equal ones"),
        ([0.5], "dtype float64; expected integers"),
        ([], "the text has 0 tokens; expected 1 … 512|expected integers"),
        ([1] * 513, "the text has 513 tokens; expected 1 … 512"),
        (None, "give either ids or embeddings"),
    ],
)
def test_what_cannot_be_run(ids, message):
    with pytest.raises(ValueError, match=message):
        jaxspec.logits(tiny.target(), ids)


def test_what_cannot_be_scored():
    with pytest.raises(ValueError, match="a text has 513 tokens; the target has 512 positions"):
        jaxspec.score(tiny.target(), [[1] * 513])
    with pytest.raises(ValueError, match=r"embeddings have shape \(8, 3\); expected \[T, 32\]"):
        jaxspec.logits(tiny.target(), embeddings=jnp.zeros((8, 3)))
    with pytest.raises(ValueError, match="embeddings are no array of numbers .*; expected"):
        jaxspec.logits(tiny.target(), embeddings=[[0.0], [1.0, 2.0]])
    with pytest.raises(ValueError, match="batch_size is 2.0; expected an integer"):
        jaxspec.score(tiny.target(), [[1]], batch_size=2.0)
