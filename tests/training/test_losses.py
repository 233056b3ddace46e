"""Chunked losses against their textbook definitions and plain automatic differentiation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.training.losses import LossConfig, position_weights
from jaxspec.training.vocabulary_loss import Factors, Mixture, vocabulary_loss

losses_of = jax.jit(vocabulary_loss, static_argnums=0)


def textbook(mixture, drafter, unembed, target, labels, weights):
    """All logits at once."""
    logits = drafter.scale * (drafter.hidden @ unembed.T)
    if drafter.cap is not None:
        logits = drafter.cap * jnp.tanh(logits / drafter.cap)
    if drafter.latent is not None:
        logits = logits + drafter.latent @ drafter.output.T
    teacher = target @ unembed.T
    p, q = jax.nn.softmax(logits), jax.nn.softmax(teacher)
    chosen = jnp.take_along_axis(p, labels[..., None], -1)[..., 0]
    heat = mixture.temperature
    warm_p, warm_q = jax.nn.softmax(logits / heat), jax.nn.softmax(teacher / heat)
    kl = heat**2 * (warm_q * jnp.log(warm_q / warm_p)).sum(-1)
    each = (
        mixture.cross_entropy * -jnp.log(chosen)
        + mixture.kl * kl
        + mixture.total_variation * jnp.abs(p - q).sum(-1)
    )
    return (weights * each).sum()


def example(seed, *, batch=2, positions=7, width=5, rank=3, vocab=11, **changes):
    random = np.random.default_rng(seed)
    normal = lambda *shape: np.float32(random.standard_normal(shape))  # noqa: E731
    drafter = Factors(
        hidden=normal(batch, positions, width),
        latent=normal(batch, positions, rank) if rank else None,
        output=normal(vocab, rank) if rank else None,
        **changes,
    )
    unembed, target = normal(vocab, width), normal(batch, positions, width)
    labels = np.int32(random.integers(0, vocab, (batch, positions)))
    weights = np.float32(random.random((batch, positions)))
    return drafter, unembed, target, labels, weights


@pytest.mark.parametrize(
    "mixture, changes",
    [
        (Mixture(1, 0, 0, chunk=1), dict(rank=0)),
        (Mixture(0, 1, 0, temperature=2.5, chunk=4), {}),
        (Mixture(0, 0, 1, chunk=6), {}),
        (Mixture(0.1, 0.5, 0.9, chunk=100), {}),
        (Mixture(0.1, 0.5, 0.9, chunk=4), dict(scale=0.6, cap=1.5)),
    ],
)
def test_chunked_losses_equal_the_textbook(mixture, changes):
    drafter, *rest = example(0, **changes)

    def chunked(drafter):
        return 3.0 * vocabulary_loss(mixture, drafter, *rest)[0]

    def plain(drafter):
        return 3.0 * textbook(mixture, drafter, *rest)

    value, slope = jax.jit(jax.value_and_grad(chunked))(drafter)
    expected, expected_slope = jax.jit(jax.value_and_grad(plain))(drafter)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    without_slope = jax.jit(chunked)(drafter)
    np.testing.assert_allclose(without_slope, expected, rtol=1e-5)
    for got, want in zip(jax.tree.leaves(slope), jax.tree.leaves(expected_slope), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)


def test_losses_of_known_distributions():
    # p = softmax(log 3, 0, 0) = (.6, .2, .2), q = softmax(0, log 2, log 2) = (.2, .4, .4)
    drafter = Factors(jnp.log(jnp.array([[[3.0, 1.0, 1.0]]])))
    target = jnp.log(jnp.array([[[1.0, 2.0, 2.0]]]))
    _, losses = losses_of(
        Mixture(), drafter, jnp.eye(3), target, jnp.array([[0]]), jnp.ones((1, 1))
    )
    np.testing.assert_allclose(losses.cross_entropy, [[-np.log(0.6)]], rtol=1e-6)
    np.testing.assert_allclose(losses.total_variation, [[0.8]], rtol=1e-6)
    kl = 0.2 * np.log(0.2 / 0.6) + 2 * 0.4 * np.log(0.4 / 0.2)
    np.testing.assert_allclose(losses.kl, [[kl]], rtol=1e-6)


def test_the_target_and_the_lm_head_are_constants():
    drafter, unembed, target, labels, weights = example(0)

    def loss(unembed, target):
        return vocabulary_loss(Mixture(), drafter, unembed, target, labels, weights)[0]

    for slope in jax.jit(jax.grad(loss, argnums=(0, 1)))(unembed, target):
        assert not slope.any()


def test_losses_that_need_the_target_ask_for_it():
    drafter, unembed, _, labels, weights = example(0)
    with pytest.raises(ValueError, match="target is None"):
        vocabulary_loss(Mixture(), drafter, unembed, None, labels, weights)


def compiled_peak(positions, vocab, width=1024, rank=256):
    """Bytes that value and gradient need beside arguments and results; nothing is run."""
    spec = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    drafter = Factors(spec(1, positions, width), spec(1, positions, rank), spec(vocab, rank))

    def loss(drafter, unembed, target, labels, weights):
        return vocabulary_loss(Mixture(), drafter, unembed, target, labels, weights)[0]

    compiled = jax.jit(jax.value_and_grad(loss)).lower(
        drafter,
        spec(vocab, width),
        spec(1, positions, width),
        jax.ShapeDtypeStruct((1, positions), jnp.int32),
        spec(1, positions),
    )
    return compiled.compile().memory_analysis().temp_size_in_bytes


def test_memory_does_not_hold_positions_times_vocabulary():
    vocab, positions = 151_936, 512 * 16
    activations = positions * (1024 + 256) * 4
    peak = compiled_peak(positions, vocab)
    assert peak < 1.5e9 < positions * vocab * 4 / 3
    fewer = compiled_peak(positions // 4, vocab)
    # What grows is a few copies of the inputs.
    assert peak - fewer < 6 * (activations - activations / 4)


SUPERVISED = jnp.array([[[True, True, True], [True, True, False], [False, False, False]]])


@pytest.mark.parametrize(
    "config, weights, denominator",
    [
        (LossConfig(weighting="uniform"), [[1, 1, 1], [1, 1, 0], [0, 0, 0]], 5),
        (
            LossConfig(weighting="exponential", decay=1 / np.log(2)),
            [[1, 0.5, 0.25], [1, 0.5, 0], [0, 0, 0]],
            3.25,
        ),
        (
            LossConfig(weighting="uniform", reduction="positions"),
            [[1, 1, 1], [1, 1, 0], [0, 0, 0]],
            9,
        ),
        # Smoothed probabilities (.2, .6, 1) and (1, .2, .6): reached .2 .12 .12, 1 .2 0
        (
            LossConfig(weighting="dpace", smoothing=0.2),
            [[0.44, 0.24, 0.12], [1.2, 0.2, 0], [0, 0, 0]],
            2,
        ),
    ],
)
def test_position_weights(config, weights, denominator):
    probability = jnp.array([[[0.0, 0.5, 1.0], [1.0, 0.0, 0.5], [0.5, 0.5, 0.5]]])
    got, total = position_weights(config, SUPERVISED, probability)
    np.testing.assert_allclose(got[0], weights, rtol=1e-6)
    np.testing.assert_allclose(total, denominator, rtol=1e-6)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="weighting is 'linear'"):
        LossConfig(weighting="linear")
    with pytest.raises(ValueError, match="kl is -1"):
        Mixture(kl=-1)


def test_the_targets_likeliest_token_as_label():
    drafter, unembed, target, _, weights = example(3)
    likeliest = np.argmax(target @ unembed.T, axis=-1).astype(np.int32)
    arguments = (Mixture(1, 0, 0, chunk=4), drafter, unembed, target)
    total, losses = losses_of(*arguments, None, weights)
    expected, _ = losses_of(*arguments, likeliest, weights)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    np.testing.assert_array_equal(losses.labels, likeliest)


def test_candidates_are_the_likeliest_tokens():
    drafter, *rest = example(4, rank=0, candidates=3)
    _, losses = losses_of(Mixture(1, 0, 0, chunk=4), drafter, *rest)
    logits = drafter.hidden @ rest[0].T
    np.testing.assert_array_equal(losses.candidates, np.argsort(-logits, axis=-1)[..., :3])
