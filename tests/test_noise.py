"""The noise that drafters add is that of the target's choices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.decoding.choice import choose
from jaxspec.noise import Noise, bias
from tests.decoding.test_choice import nothing_written, rows

VOCAB, DEPTH = 23, 4

biases = jax.jit(functools.partial(bias, depth=DEPTH, vocab=VOCAB))


def noise(*scales):
    keys = jax.random.split(jax.random.key(3), len(scales))
    return Noise(keys, jnp.array(scales, jnp.float32))


@pytest.mark.parametrize("kept", [None, [0, 4, 5, 17]])
def test_the_bias_is_that_of_the_choices(kept):
    """Where the target's logits are equal, it chooses what the bias alone says."""
    temperature, anchor = 1.7, jnp.array([11])
    options = rows(temperature=temperature, seed=5)
    logits = jnp.zeros((1, DEPTH, VOCAB))
    if kept is not None:
        logits = logits.at[..., jnp.array(sorted(set(range(VOCAB)) - set(kept)))].set(-1e9)
    chosen = jax.jit(
        lambda: choose(
            logits, jnp.arange(DEPTH)[None], anchor + 1, options, DEPTH, nothing_written(logits)
        )
    )()
    ids = jnp.arange(VOCAB) if kept is None else jnp.array(kept)
    own = biases(options.noise, anchor, kept=None if kept is None else ids)
    assert own.shape == (1, DEPTH, len(ids))
    np.testing.assert_array_equal(ids[jnp.argmax(own, axis=-1)], chosen)
    assert len(set(chosen[0].tolist())) > 1


@pytest.mark.parametrize("vocab", [1, 9, 2048])
def test_noise_is_that_of_jax(vocab):
    """Bit for bit: answers to a seed stay what earlier versions gave."""
    drawn = jax.jit(lambda keys: jax.vmap(lambda key: jax.random.gumbel(key, (vocab,)))(keys))
    draw = jax.jit(
        lambda keys, at, some=None: Noise(keys, jnp.ones(1)).at(at, DEPTH, vocab, some)
    )
    some = np.arange(vocab)[::-3]
    for seed, position in [(0, 0), (7, 1), (2**32 - 1, 40_000)]:
        keys = jax.random.key(np.uint32(seed))[None]
        at = jax.vmap(jax.random.fold_in, (None, 0))(keys[0], position + jnp.arange(DEPTH))
        own = draw(keys, np.array([position]))
        np.testing.assert_array_equal(own[0], drawn(at))
        few = draw(keys, np.array([position]), some)
        np.testing.assert_array_equal(few, np.asarray(own)[..., some])


def test_greedy_rows_have_no_noise():
    assert not biases(None, jnp.array([3])).any()
    assert not biases(noise(0.0, 0.0), jnp.array([3, 4])).any()
    mixed = np.asarray(biases(noise(0.0, 1.0, 2.0), jnp.array([3, 4, 4])))
    assert not mixed[0].any() and mixed[1].any()
    twice = biases(noise(0.0, 2.0, 4.0), jnp.array([3, 4, 4]))
    np.testing.assert_array_equal(twice, 2 * mixed)


def test_noise_counts_less_for_a_drafter_than_for_the_target():
    for temperature, top_p, scale in [(0, 1, 0), (1, 1, 0.75), (2, 0.95, 1.5), (1, 0.7, 0)]:
        options = rows(temperature=temperature, top_p=top_p)
        np.testing.assert_allclose(options.noise.scale, scale, atol=1e-6)
    some, more = rows(top_p=0.8).noise.scale, rows(top_p=0.9).noise.scale
    assert 0 < some < more < 0.75


def test_models_with_padded_vocabularies_share_their_noise():
    """A small drafter's vocabulary may end earlier than the target's."""
    whole = noise(1.0).at(jnp.array([7]), DEPTH, VOCAB)
    np.testing.assert_array_equal(noise(1.0).at(jnp.array([7]), DEPTH, 9), whole[..., :9])
