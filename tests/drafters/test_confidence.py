"""How many drafted tokens the confidence rules keep (DSpark, arXiv 2607.05147)."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.config import TreeConfig
from jaxspec.drafters.block import BlockDrafter, block_params
from jaxspec.drafters.confidence import confident_prefix, surviving_prefix
from tests import tiny
from tests.drafters import cases
from tests.drafters.oracle import Oracle

CONFIDENCE = jnp.array([[0.9, 0.8, 0.3, 0.9], [0.9, 0.9, 0.9, 0.9], [0.1, 0.9, 0.9, 0.9]])


@pytest.mark.parametrize(
    ("threshold", "kept"),
    [(0.0, [4, 4, 4]), (0.5, [2, 4, 0]), (0.3, [4, 4, 0]), (0.95, [0, 0, 0])],
)
def test_confident_prefix(threshold, kept):
    assert confident_prefix(CONFIDENCE, jnp.float32(threshold)).tolist() == kept


@pytest.mark.parametrize(
    # Survival: .9 .72 .216 .194 | .9 .81 .729 .656 | .1 .09 .081 .073
    ("threshold", "kept"),
    [(0.0, [4, 4, 4]), (0.7, [2, 3, 0]), (0.05, [4, 4, 4])],
)
def test_surviving_prefix(threshold, kept):
    assert surviving_prefix(CONFIDENCE, jnp.float32(threshold)).tolist() == kept


def test_thresholds_per_row():
    assert confident_prefix(CONFIDENCE, jnp.array([0.5, 0.95, 0.0])).tolist() == [2, 0, 4]


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["threshold", "survival"])
def test_a_chain_ends_where_the_drafter_doubts(rule):
    features = cases.features("dspark", 1, 6)
    config, weights = cases.KINDS["dspark"], cases.params("dspark").head
    target = tiny.target().params
    _, _, logits = Oracle(config, weights, target.embed, target.unembed).chain(features[0], 4)
    confidence = 1 / (1 + np.exp(-logits))
    measure = confidence if rule == "threshold" else np.cumprod(confidence)
    bar = float(np.median(measure))
    expected = next(slot for slot in range(4) if measure[slot] < bar)
    assert expected < 4

    params = block_params(weights, target, **{rule: bar})
    drafter, state = (
        BlockDrafter(config, TreeConfig("chain", 8)),
        cases.observed("dspark", features),
    )
    for budget in (8, 2, 1):
        at = jnp.array([4]), jnp.array([6])
        tree = cases.draft(drafter, params, state, *at, jnp.array([budget]))
        assert tree.valid[0].sum() == min(budget, expected + 1)
