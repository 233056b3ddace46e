"""Contenders of an evaluation as drafters."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.config import TreeConfig
from jaxspec.drafters.weights import bind
from jaxspec.evaluation.contenders import without_head
from tests.drafters import cases


@pytest.mark.parametrize("kind", ["dspark", "treeflash", "dflash2"])
def test_without_its_head_a_drafter_proposes_the_base_logits_argmax(kind):
    whole = cases.loaded(kind, TreeConfig())
    bare = without_head(whole)
    anchor, position = jnp.full(1, 3), jnp.zeros(1, jnp.int32)
    state = bare.drafter.init(bare.params, 1, 24)
    depth = bare.drafter.depth
    drafted = bare.drafter.draft(bare.params, state, anchor, position, jnp.full(1, depth + 1))
    stream = whole.drafter.stream(whole.params, state, anchor, position)
    head = bind(whole.drafter.config, whole.params.head)
    base = head.logits(whole.params.vocabulary, stream)
    tokens = drafted[0].tokens[0, 1 : depth + 1]
    np.testing.assert_array_equal(tokens, base[0].argmax(-1))
