"""The exact top k of a large vocabulary, against sorting the whole of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxspec.trees.candidates import likeliest, top_log_probs
from tests.trees.oracles import log_softmax

top = jax.jit(top_log_probs, static_argnums=1)
VOCABULARIES = (13, 1026, 12_288)  # searched whole, in chunks of 2, in chunks of up to 64


def assert_exact(logits, k):
    ids = np.argsort(-np.asarray(logits, np.float32), axis=-1, kind="stable")[..., :k]
    tokens, log_probs = top(logits, k)
    np.testing.assert_array_equal(tokens, ids)
    expected = np.take_along_axis(log_softmax(logits), ids, axis=-1)
    np.testing.assert_allclose(log_probs, expected, atol=3e-6)


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("k", [1, 7, 64])
def test_equals_a_search_of_everything(vocab, k):
    draw = np.random.default_rng(vocab + k)
    assert_exact(jnp.asarray(5 * draw.normal(size=(2, 3, vocab)), jnp.float32), min(k, vocab))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), values=st.integers(1, 40))
def test_equal_logits_come_lowest_id_first(seed, values):
    draw = np.random.default_rng(seed)
    assert_exact(jnp.asarray(draw.integers(0, values, (3, 1024)), jnp.bfloat16), 9)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    values=st.integers(1, 40),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
)
def test_the_likeliest_is_the_first_of_the_largest(seed, values, dtype):
    draw = np.random.default_rng(seed)
    logits = jnp.asarray(draw.integers(0, values, (2, 3, 517)), dtype)
    logits = jnp.where(logits == 0, -jnp.inf, logits)  # every token, where values is 1
    found = jax.jit(likeliest)(logits)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, np.argmax(np.asarray(logits, np.float32), axis=-1))


def test_impossible_tokens_beside_large_logits():
    logits = jnp.full((1, 1024), -jnp.inf).at[0, jnp.array([3, 900])].set(500.0)
    tokens, log_probs = top(logits, 3)
    assert tokens[0, :2].tolist() == [3, 900]
    np.testing.assert_allclose(log_probs[0], [-np.log(2), -np.log(2), -np.inf], atol=5e-5)


def test_more_than_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="k is 14, the vocabulary 13"):
        top_log_probs(jnp.zeros((1, 13)), 14)
