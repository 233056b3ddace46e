"""What the adaptive schedule remembers between rounds."""

import dataclasses

import jax.numpy as jnp
import pytest

from jaxspec.decoding.budget import StepTimes
from jaxspec.decoding.schedule import (
    PATIENCE,
    UNKNOWN,
    Adaptive,
    choose_size,
    init_habit,
    learn,
    probe,
    push,
)
from jaxspec.trees.tree import chain


@pytest.mark.parametrize(
    ("probes", "wait"), [(0, 16), (1, 32), (4, 256), (PATIENCE, 256), (9, 256)]
)
def test_drafts_that_do_not_pay_are_tried_ever_less_often(probes, wait):
    habit = dataclasses.replace(init_habit(4, 3), probes=jnp.int32(probes))
    at = [
        probe(dataclasses.replace(habit, idle=jnp.int32(n)), Adaptive())
        for n in (wait - 1, wait)
    ]
    assert [int(size) for size in at] == [0, 1]


def test_what_a_draft_teaches():
    habit = dataclasses.replace(init_habit(4, 3), idle=jnp.int32(16), probes=jnp.int32(2))
    fresh = jnp.array([[0.8, 0.4, 0.2]])
    tokens = jnp.array([[1, 2, 3]])
    tree = chain(jnp.array([0]), tokens, jnp.array([2]), jnp.log(jnp.full((1, 3), 0.5)), size=4)
    old = jnp.array([[1.0, 0.6, 0.5]])
    after = learn(habit, tree, fresh, old, jnp.array([1]), jnp.array([True]), False)
    assert after.foretold.tolist() == pytest.approx([0.5, 0.25, 0.0])  # two were verified
    assert after.happened.tolist() == [1.0, 0.0, 0.0]
    assert after.usual.tolist() == pytest.approx([0.98, 0.94, 0.92])
    assert float(after.varied) == pytest.approx(0.98 + 0.4**2 + 0.5**2)  # all were usually 1
    assert float(after.lasted) == pytest.approx(0.98 + 0.4 * 0.6 + 0.5 * 0.8)
    assert (int(after.idle), int(after.probes)) == (0, 3)
    chosen = learn(habit, tree, fresh, old, jnp.array([1]), jnp.array([True]), True)
    assert int(chosen.probes) == 0
    new_row = jnp.full((1, 3), UNKNOWN)
    unknown = learn(habit, tree, fresh, new_row, jnp.array([1]), jnp.array([True]), True)
    assert float(unknown.varied) == float(unknown.lasted) == pytest.approx(0.98)


@pytest.mark.parametrize(("lasted", "size"), [(1.0, 2), (0.0, 0)])
def test_an_old_survival_counts_as_much_as_such_ones_did(lasted, size):
    habit = dataclasses.replace(
        init_habit(4, 3), usual=jnp.full(3, 0.1), lasted=jnp.float32(lasted)
    )
    times = StepTimes(jnp.array([1, 2, 4]), jnp.array([1, 2, 4]), jnp.array([1.0, 1.5, 1.8]))
    for old, expected in (([0.9, 0.8, 0.7], size), ([UNKNOWN] * 3, 0)):
        chosen = choose_size(jnp.array([old]), habit, jnp.array([True]), times)
        assert int(chosen) == expected


def test_survivals_are_forgotten_once_they_are_older_than_their_age():
    survivals = jnp.array([[[0.9], [0.8]]])  # the last round's, and the one's before
    once = push(survivals, jnp.array([[UNKNOWN]]))
    assert once.tolist() == [[[UNKNOWN], [jnp.float32(0.9)]]]
    assert push(once, jnp.array([[UNKNOWN]])).tolist() == [[[UNKNOWN], [UNKNOWN]]]
