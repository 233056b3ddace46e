"""The filters of sampling, against their definitions on a sorted vector."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxspec.decoding import filters

kept = jax.jit(filters.kept)
SMALL, LARGE = 50, 1024  # below and above the number of candidates
LARGE_K = filters.CANDIDATES + 30


def options(top_k=0, top_p=1.0, min_p=0.0):
    return jnp.array([top_k]), jnp.array([top_p], jnp.float32), jnp.array([min_p], jnp.float32)


def kept_by_sorting(logits, top_k, top_p, min_p):
    """The definitions, one after the other, on a sorted vector."""
    p = np.exp(logits - logits.max()).astype(np.float64)
    order = np.argsort(-p, kind="stable")
    keep = np.zeros(len(p), bool)
    keep[order[: top_k or len(p)]] = True
    p = np.where(keep, p, 0) / p[keep].sum()
    if top_p < 1:
        order = np.argsort(-p, kind="stable")
        reached = np.cumsum(p[order])
        keep &= np.isin(np.arange(len(p)), order[: np.searchsorted(reached, top_p) + 1])
        p = np.where(keep, p, 0)
    return keep & (p >= min_p * p.max())


def normal(seed, vocab, scale=3.0):
    return np.random.default_rng(seed).normal(0, scale, vocab).astype(np.float32)


def assert_exact(logits, top_k, top_p, min_p):
    found = np.asarray(kept(logits[None, None], *options(top_k, top_p, min_p)))[0, 0]
    np.testing.assert_array_equal(found, kept_by_sorting(logits, top_k, top_p, min_p))


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    vocab=st.sampled_from([SMALL, LARGE]),
    scale=st.sampled_from([0.3, 3.0]),  # flat laws need more tokens than the candidates
    top_k=st.sampled_from([0, 1, 3, 10, 50, filters.CANDIDATES, LARGE_K]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_filters_keep_what_their_definitions_keep(seed, vocab, scale, top_k, top_p, min_p):
    assert_exact(normal(seed, vocab, scale), top_k, top_p, min_p)


@pytest.mark.parametrize("vocab", [SMALL, LARGE])
@pytest.mark.parametrize("top_k, top_p", [(20, 1.0), (0, 0.9), (20, 0.9), (LARGE_K, 0.9)])
def test_impossible_tokens_do_not_count(vocab, top_k, top_p):
    """A grammar may leave fewer tokens than top-k asks for."""
    logits = normal(1, vocab)
    logits[7:] = -np.inf
    found = np.asarray(kept(logits[None, None], *options(top_k, top_p)))[0, 0]
    assert not found[7:].any()
    np.testing.assert_array_equal(found[:7], kept_by_sorting(logits[:7], 0, top_p, 0.0))


@pytest.mark.parametrize("vocab", [4, LARGE])
def test_top_k_keeps_ties(vocab):
    logits = jnp.zeros((1, 1, vocab)).at[0, 0, :3].set(jnp.array([1.0, 2.0, 2.0]))
    found = kept(logits, *options(top_k=1))[0, 0]
    assert np.flatnonzero(found).tolist() == [1, 2]


def test_ties_beside_the_candidates_are_kept_and_have_mass():
    """Of 1,024 equal tokens top-k keeps all, and top-p of any mass too."""
    equal = jnp.zeros((1, 1, LARGE))
    for option in options(top_k=3), options(top_p=0.5), options(top_k=LARGE_K, top_p=0.1):
        assert kept(equal, *option).all()
    # 2 likelier tokens have a mass of 0.42 beside those that tie, and of 1 without them.
    two = equal.at[0, 0, 5:7].set(5.9)
    assert np.flatnonzero(kept(two, *options(top_k=2, top_p=0.9))[0, 0]).tolist() == [5, 6]
    assert kept(two, *options(top_k=3, top_p=0.9)).all()
    assert kept(two, *options(top_k=3, top_p=0.3)).sum() == 2


def test_a_node_keeps_the_same_beside_any_other():
    """Others may need the whole vocabulary."""
    rows = np.stack([normal(seed, LARGE, scale) for seed, scale in [(0, 3), (1, 0.1), (2, 3)]])
    together = kept(rows[None], *options(top_p=0.9))[0]
    for row, found in zip(rows, together, strict=True):
        np.testing.assert_array_equal(found, kept(row[None, None], *options(top_p=0.9))[0, 0])
