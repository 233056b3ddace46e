"""The short examples of research with a target, on a tiny one."""

import jax.numpy as jnp
import numpy as np

import jaxspec
from examples.logit_lens import lens
from examples.score_texts import accuracy
from tests import tiny

IDS = [3, 1, 4, 1, 5, 9, 2, 6]


def test_accuracy_counts_first_choices():
    target = tiny.target()
    choices = tiny.logits(target, IDS)[:-1].argmax(axis=-1)
    right = int((choices == np.array(IDS[1:])).sum())
    assert accuracy(target, jnp.array(IDS)) == np.float32(right / 7)
    own = [IDS[0], int(choices[0])]  # the target's own second token
    assert accuracy(target, jnp.array(own)) == 1


def test_the_lens_at_the_last_layer_is_the_target():
    target = tiny.target()
    found = lens(target, IDS)
    assert found.shape == (4, 8, 11)
    np.testing.assert_allclose(found[-1], jaxspec.logits(target, IDS), rtol=1e-5, atol=1e-5)
    assert not np.allclose(found[-2], found[-1], atol=0.1)
