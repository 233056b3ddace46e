"""Convolutions over the slots of a block."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxspec.drafters.convolution import Convolution
from jaxspec.drafters.weights import bind, random_weights
from tests.drafters import cases

CONFIG = dataclasses.replace(
    cases.KINDS["dflash"], hidden_size=4, conv_taps=3, conv_group=2, vocab_size=11
)


def convolution() -> Convolution:
    """Two groups of two channels, three taps; random coefficients."""
    made = Convolution(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.float32)
    random = np.random.default_rng(0)
    for name in ("base", "projection"):
        shape = getattr(made, name).shape
        setattr(made, name, nnx.Param(jnp.asarray(random.standard_normal(shape), jnp.float32)))
    return made


def test_three_taps_by_hand():
    """Slot 2 reads itself, slot 1 and slot 0, with coefficients that are all its own."""
    conv, random = convolution(), np.random.default_rng(1)
    normed = random.standard_normal((3, 4)).astype(np.float32)
    y = random.standard_normal((3, 4)).astype(np.float32)
    before, after = conv(jnp.asarray(normed))
    base, projection = np.asarray(conv.base), np.asarray(conv.projection)

    def c(slot, side, tap):  # [4]: base and, group by group, what the slot's own input adds
        delta = normed[slot] @ projection[:, side, tap]
        return base[side, tap] + np.array([delta[0], delta[0], delta[1], delta[1]])

    for side, convolve in enumerate((before, after)):
        expected = [
            c(0, side, 0) * y[0],
            c(1, side, 0) * y[1] + c(1, side, 1) * y[0],
            c(2, side, 0) * y[2] + c(2, side, 1) * y[1] + c(2, side, 2) * y[0],
        ]
        np.testing.assert_allclose(convolve(jnp.asarray(y)), expected, atol=1e-6)


def test_blocks_do_not_reach_into_each_other():
    conv, random = convolution(), np.random.default_rng(1)
    y = jnp.asarray(random.standard_normal((1, 2, 3, 4)), jnp.float32)  # two blocks of a row
    before, _ = conv(y)
    other, _ = conv(y.at[:, 0].add(1.0))
    changed = other(y.at[:, 0].add(1.0))
    np.testing.assert_array_equal(changed[:, 1], before(y)[:, 1])
    assert not np.allclose(changed[:, 0], before(y)[:, 0])


def test_it_starts_as_the_identity():
    """Bit for bit DFlash, with weights of DFlash's."""
    config, plain = (
        dataclasses.replace(cases.KINDS["dflash"], conv_taps=3, conv_group=8),
        cases.params("dflash"),
    )
    weights = dict(nnx.to_flat_state(random_weights(config, jax.random.key(0))))
    weights |= dict(nnx.to_flat_state(plain.head))
    weights = nnx.from_flat_state(list(weights.items()))

    @functools.partial(jax.jit, static_argnames="config")
    def stream(config, weights):
        attend = lambda layer, q, k, v: q + jnp.repeat(k + v, 2, axis=-2)  # noqa: E731
        head = bind(config, weights)
        return head.stream(plain.vocabulary, jnp.array([3]), jnp.array([5]), attend)

    found = stream(config, weights)
    np.testing.assert_array_equal(found, stream(cases.KINDS["dflash"], plain.head))
