"""The selector's loss: what a truth that is no candidate does in either variant."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.drafters.teacher_forced import run_blocks
from jaxspec.drafters.weights import bind
from jaxspec.training.losses import LossConfig, drafter_loss
from jaxspec.training.selector_loss import choices, leading_run
from jaxspec.training.vocabulary_loss import Mixture
from tests.drafters import cases

CONFIG = cases.KINDS["dflash2"]


@functools.partial(jax.jit, static_argnames=("missing", "chunk"))
def chosen(hidden, latent, candidates, truth, *, missing, chunk):
    head, vocabulary, *_ = example()
    arguments = (head, vocabulary, hidden, latent, candidates, truth)
    return choices(*arguments, missing=missing, chunk=chunk)


@functools.cache
def example():
    """A head, its vocabulary, six positions, and the candidates of each."""
    params = cases.params("dflash2")
    head, random = bind(CONFIG, params.head), np.random.default_rng(0)
    hidden = jnp.asarray(random.standard_normal((1, 6, CONFIG.hidden_size)), jnp.float32)
    previous = jnp.asarray(random.integers(0, 11, (1, 6)))

    @jax.jit
    def run():
        latent, _ = head.sequential.advance(hidden, previous, ())
        logits = head.unembed(params.vocabulary, hidden)
        return latent, logits, jnp.argsort(-logits, axis=-1)[..., :4].astype(jnp.int32)

    return head, params.vocabulary, hidden, *run()


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_scores_are_those_of_decoding(chunk):
    head, vocabulary, hidden, latent, logits, candidates = example()
    truth = candidates[..., 2]
    found = chosen(hidden, latent, candidates, truth, missing="inject", chunk=chunk)
    corrected = jax.jit(lambda: head.correct(vocabulary, logits, latent))()
    expected = np.take_along_axis(np.asarray(corrected), np.asarray(candidates), axis=-1)
    np.testing.assert_allclose(found.scores, expected, atol=1e-4)
    assert bool(found.present.all()) and (found.place == 2).all()


def test_a_missing_truth():
    """It takes the last candidate's place, or leaves all of them as they are."""
    head, _, *arrays = example()
    hidden, latent, logits, candidates = map(np.asarray, arrays)
    truth = np.argmin(logits, axis=-1).astype(np.int32)
    truth[0, 0] = candidates[0, 0, 1]
    injected = chosen(hidden, latent, candidates, truth, missing="inject", chunk=8)
    assert injected.place[0].tolist() == [1, 3, 3, 3, 3, 3]
    assert injected.present[0].tolist() == [True] + [False] * 5
    everywhere = logits + latent @ np.asarray(head.sequential.output[...]).T
    own = np.take_along_axis(everywhere, truth[..., None], axis=-1)[..., 0]
    scores = np.asarray(injected.scores)
    np.testing.assert_allclose(scores[0, 1:, 3], own[0, 1:], atol=1e-4)
    skipped = chosen(hidden, latent, candidates, truth, missing="skip", chunk=8)
    kept = np.asarray(skipped.scores)
    np.testing.assert_allclose(kept[0, 0], scores[0, 0])
    assert not np.allclose(kept[0, 1, 3], scores[0, 1, 3])
    assert np.asarray(skipped.right)[0, 1:].tolist() == [False] * 5


@pytest.mark.parametrize(("missing", "matters"), [("inject", True), ("skip", False)])
@pytest.mark.slow
def test_a_slot_whose_truth_is_no_candidate(missing, matters):
    """Its row of the successors' codebook has a slope where the truth is put in, and only
    there; the selector alone is trained."""
    params = cases.params("dflash2")
    tokens = jnp.array([[1, 4, 3, 2, 9, 7, 5, 6]], jnp.int32)
    features = cases.features("dflash2", 1, 8)
    anchors = jnp.array([[2]])
    hidden = jnp.zeros((1, 1, CONFIG.depth, CONFIG.hidden_size))

    def blocks_of(weights):
        head = bind(CONFIG, weights)
        return head, run_blocks(head, params.vocabulary, tokens, features, anchors)

    @jax.jit
    def run(weights):
        head, blocks = blocks_of(weights)
        return head.logits(params.vocabulary, blocks.stream)[0, 0], blocks.labels[0, 0]

    base, labels = map(np.asarray, run(params.head))
    likely = np.argsort(-base, axis=-1)[:, : CONFIG.candidates]
    absent = [slot for slot in range(CONFIG.depth) if labels[slot] not in likely[slot]]
    assert absent
    supervised = jnp.zeros((1, 1, CONFIG.depth), bool).at[0, 0, absent[0]].set(True)
    config = LossConfig(
        Mixture(0.0, 0.0, 0.0, chunk=4), confidence=0.0, missing=missing, reduction="slots"
    )

    def loss(weights):
        return drafter_loss(config, *_with_vocabulary(weights), supervised, hidden).total

    def _with_vocabulary(weights):
        head, blocks = blocks_of(weights)
        return head, params.vocabulary, blocks

    slope = jax.jit(jax.grad(loss))(params.head).sequential.output[...]
    moved = np.abs(np.asarray(slope)).sum(axis=-1)
    assert (moved[labels[absent[0]]] > 0) == matters
    assert bool(moved.any()) == matters


def test_leading_runs():
    good = jnp.array([[True, True, False, True], [False, True, True, True], [True] * 4])
    assert leading_run(good).tolist() == [2, 0, 4]


@pytest.mark.parametrize("name", ["reduction", "truth", "missing"])
def test_switches_are_checked(name):
    with pytest.raises(ValueError, match=f"LossConfig.{name} is 'all'; expected one of"):
        dataclasses.replace(LossConfig(), **{name: "all"})
