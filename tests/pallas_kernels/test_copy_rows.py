"""Rows of many arrays moved by one kernel, against one array after another."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.copy_rows import take_rows, write_rows
from pallas_kernels.copy_rows.api import ELEMENTS
from pallas_kernels.copy_rows.triton import (
    ARRAYS,
    MOST_ARRAYS,
    take_rows_triton,
    write_rows_triton,
)
from tests.pallas_kernels.ttir_check import execute
from tests.slow import slow_but

# arrays, nodes, rows taken
CASES = {"one row": (3, 1, 1), "a path": (5, 7, 5), "many layers": (ARRAYS + 3, 4, 2)}
BATCH, KV_HEADS, DIM, CAPACITY = 2, 2, 16, 24


def make_inputs(arrays, nodes, count, dtype):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)  # noqa: E731
    rows = tuple(draw(BATCH, nodes, KV_HEADS, DIM) for _ in range(arrays))
    caches = tuple(draw(BATCH, KV_HEADS, CAPACITY, DIM) for _ in range(arrays))
    index = jnp.asarray(rng.integers(0, nodes, (BATCH, count)), jnp.int32)
    return rows, caches, index, jnp.array([3, CAPACITY - count], jnp.int32)


def taken(rows, index):
    return [np.stack([x[b][index[b]] for b in range(BATCH)]) for x in map(np.asarray, rows)]


def written(caches, news, starts):
    caches = [np.array(x) for x in caches]
    for cache, new in zip(caches, map(np.asarray, news), strict=True):
        for b, start in enumerate(starts):
            cache[b, :, start : start + new.shape[1]] = new[b].swapaxes(0, 1)
    return caches


def assert_equal(found, expected):
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(x), y)


@pytest.mark.parametrize(
    ("name", "dtype"),
    slow_but(
        [("one row", "float32"), ("a path", "bfloat16"), ("many layers", "float32")],
        itertools.product(CASES, ["float32", "bfloat16"]),
    ),
)
def test_both_implementations_move_the_rows_and_nothing_else(name, dtype):
    rows, caches, index, starts = make_inputs(*CASES[name], dtype)
    news = taken(rows, index)
    assert_equal(take_rows(rows, index), news)
    assert_equal(take_rows_triton(rows, index, interpret=True), news)
    news = tuple(map(jnp.asarray, news))
    expected = written(caches, news, starts)
    assert_equal(write_rows(caches, news, starts), expected)
    assert_equal(write_rows_triton(caches, news, starts, interpret=True), expected)


def test_the_lowered_kernels_stay_in_bounds_and_write_every_row_once():
    rows, caches, index, starts = make_inputs(*CASES["a path"], "float32")
    news = execute(take_rows_triton, rows, index)
    assert_equal(news, taken(rows, index))
    found = execute(write_rows_triton, caches, tuple(news), starts)
    assert_equal(found, written(caches, news, starts))


def test_more_arrays_than_a_kernel_has_parameters_for():
    rows, _, index, _ = make_inputs(MOST_ARRAYS + 2, 3, 2, "float32")
    closed = jax.make_jaxpr(take_rows_triton)(rows, index).jaxpr.eqns[0].params["jaxpr"]
    assert sum(eqn.primitive.name == "pallas_call" for eqn in closed.eqns) == 2


@pytest.mark.slow
def test_rows_of_more_arrays_than_a_kernel_has_parameters_for():
    rows, _, index, _ = make_inputs(MOST_ARRAYS + 2, 3, 2, "float32")
    assert_equal(take_rows_triton(rows, index, interpret=True), taken(rows, index))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_compiled_kernels_move_the_rows_and_nothing_else(name, dtype):
    rows, caches, index, starts = make_inputs(*CASES[name], dtype)
    news = jax.device_get(take_rows_triton(rows, index))
    assert_equal(news, taken(rows, index))
    expected = written(caches, news, starts)
    assert_equal(jax.device_get(write_rows_triton(caches, tuple(news), starts)), expected)


def test_many_rows_at_once_are_no_kernel_of_ours():
    """A chunk of a prompt would not fit a program's registers."""
    few, many = (make_inputs(2, ELEMENTS // DIM + 1, n, "bfloat16") for n in (2, 513))
    kernels = lambda x: "pallas_call" in str(jax.make_jaxpr(take_rows)(x[0], x[2]))  # noqa: E731
    assert kernels(few) and not kernels(many)
