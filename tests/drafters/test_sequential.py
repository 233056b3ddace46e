"""Sequential heads: step by step, and teacher-forced."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.drafters.weights import bind
from tests.drafters import cases

heads = pytest.mark.parametrize("kind", ["dspark", "gated", "rnn", "treeflash"])


@functools.partial(jax.jit, static_argnames="kind")
def both_forms(kind, stream, previous):
    head, vocabulary = bind(cases.KINDS[kind], cases.params(kind).head), cases.vocabulary()
    base = head.logits(vocabulary, stream)
    latents = head.teacher_forced(vocabulary, stream, previous)
    forced = head.correct(vocabulary, base, latents)

    state, steps = head.sequential.initial_state(previous.shape[:1]), []
    for slot in range(previous.shape[1]):
        latent, state = head.advance(vocabulary, stream[:, slot], previous[:, slot], state)
        steps.append(head.correct(vocabulary, base[:, slot], latent))
    return forced, jnp.stack(steps, axis=1)


@heads
def test_forms_agree(kind):
    random = np.random.default_rng(0)
    depth, width = cases.KINDS[kind].depth, cases.SHAPE["hidden_size"]
    stream = jnp.asarray(random.standard_normal((2, depth, width)), jnp.float32)
    previous = jnp.asarray(random.integers(0, 11, (2, depth)))
    forced, steps = both_forms(kind, stream, previous)
    np.testing.assert_allclose(steps, forced, atol=1e-5)
