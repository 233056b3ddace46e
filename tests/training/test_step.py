"""A training step: its optimizer, its anchors and its dtypes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.drafters.weights import random_weights
from jaxspec.training.batches import Position
from jaxspec.training.loading import Loader
from jaxspec.training.recipe import OptimizerConfig
from jaxspec.training.step import init_state, learning_rate, optimizer, train_step
from tests.training import tiny


def test_weights_and_sums_stay_float32_for_a_bfloat16_target():
    target = tiny.target()
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), target.params)
    rows = Loader(tiny.CONFIG, tiny.examples()).at(Position())
    state = init_state(tiny.CONFIG, params)
    lowered = train_step.lower(tiny.CONFIG, target.config, params, state, rows)
    floats = [x for x in jax.tree.leaves(lowered.out_info) if x.dtype != jnp.int32]
    assert {x.dtype for x in floats} == {jnp.dtype("float32")}


def test_the_learning_rate_warms_up_and_decays():
    rate = learning_rate(tiny.CONFIG.optimizer, 100)
    assert jax.numpy.allclose(rate(0), 0.01 / 4)
    assert jax.numpy.allclose(rate(4), 0.01)
    assert rate(52) < 0.01 > rate(100) and abs(rate(100)) < 1e-9


@pytest.mark.parametrize(
    "change",
    [
        dict(beta1=0.5),
        dict(beta2=0.5),
        dict(weight_decay=0.5),
        dict(clip=1e-3),
        dict(warmup=0.9),
    ],
    ids=str,
)
def test_every_option_of_the_optimizer_counts(change):
    weights = random_weights(tiny.DRAFTER, jax.random.key(0))

    def second_update(config):
        """After a large slope and a small one."""
        tx = optimizer(config, 10)
        state = tx.init(weights)
        for slope in (1.0, 1e-4):
            slopes = jax.tree.map(lambda x, slope=slope: jnp.full_like(x, slope), weights)
            updates, state = tx.update(slopes, state, weights)
        return np.asarray(updates.fc[...])

    plain = OptimizerConfig(learning_rate=0.1)
    changed = second_update(dataclasses.replace(plain, **change))
    assert not np.allclose(second_update(plain), changed)


def test_every_step_draws_other_anchors():
    """With the same rows and weights the loss is another."""
    config = dataclasses.replace(tiny.CONFIG, optimizer=OptimizerConfig(learning_rate=0.0))
    target, rows = tiny.target(), Loader(tiny.CONFIG, tiny.examples()).at(Position())
    state, losses = init_state(config, target.params), []
    for _ in range(2):
        state, means = train_step(config, target.config, target.params, state, rows)
        losses.append(float(means["loss"]))
    assert losses[0] != losses[1]
