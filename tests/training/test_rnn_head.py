"""RNN heads in training: their start, and the rate of their transition."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxspec.drafters.weights import bind, random_weights
from jaxspec.training.recipe import OptimizerConfig
from jaxspec.training.rnn_head import RATE, as_markov
from jaxspec.training.step import init_state, optimizer
from tests.training import tiny

RECURRENT = dataclasses.replace(tiny.DRAFTER, sequential="rnn")


def test_an_rnn_head_starts_as_a_markov_head():
    config = dataclasses.replace(tiny.CONFIG, drafter=RECURRENT)
    weights = init_state(config, tiny.target().params).weights
    head = bind(RECURRENT, weights).sequential
    hidden = jax.random.normal(jax.random.key(0), (2, 5, RECURRENT.hidden_size))
    previous = jnp.arange(10).reshape(2, 5)
    memory = jax.random.normal(jax.random.key(1), (2, 5, RECURRENT.rank))
    latent, advanced = head.advance(hidden, previous, memory)
    np.testing.assert_allclose(latent, jnp.tanh(head.previous[...][previous]), rtol=1e-6)
    assert (advanced != memory).all()  # the memory is an RNN's from the start


def test_only_the_transition_moves_slowly():
    weights = random_weights(RECURRENT, jax.random.key(0))
    tx = optimizer(OptimizerConfig(), 10)

    @jax.jit
    def step(weights):
        return tx.update(jax.tree.map(jnp.ones_like, weights), tx.init(weights), weights)[0]

    updates = step(weights)
    flat = {path: x[...] for path, x in nnx.to_flat_state(updates)}
    joint = flat.pop(("sequential", "joint"))
    rate = flat["sequential", "output"][0, 0]
    np.testing.assert_allclose(joint, RATE * rate, rtol=1e-5)
    assert all((x == rate).all() for x in flat.values())


def test_other_heads_are_left_alone():
    weights = random_weights(tiny.DRAFTER, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, as_markov(weights), weights)


def test_the_optimizers_state_is_that_of_earlier_checkpoints():
    """Orbax restores only what has the same structure."""
    weights = random_weights(tiny.DRAFTER, jax.random.key(0))
    earlier = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(lambda step: 1.0))
    found = optimizer(OptimizerConfig(), 10).init(weights)
    assert jax.tree.structure(found) == jax.tree.structure(earlier.init(weights))
