"""The grouped matrix product, both implementations, against a loop over groups."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.grouped_matmul.triton import (
    grouped_matmul_triton,
    lay_tiles,
    tile_rows,
    unsupported,
)
from tests.pallas_kernels.ttir_check import _Buffer, execute

GROUPS, DEPTH, COLUMNS = 6, 128, 256


def oracle(rows, weights, group_sizes):
    rows, weights = np.asarray(rows, np.float64), np.asarray(weights, np.float64)
    ends = np.cumsum(group_sizes)
    parts = [
        rows[end - size : end] @ weights[g]
        for g, (end, size) in enumerate(zip(ends, group_sizes, strict=True))
    ]
    return np.concatenate(parts)


def make_inputs(group_sizes, seed=0):
    rng = np.random.default_rng(seed)
    rows = jnp.asarray(rng.standard_normal((sum(group_sizes), DEPTH)), jnp.bfloat16)
    weights = jnp.asarray(rng.standard_normal((GROUPS, DEPTH, COLUMNS)), jnp.bfloat16)
    return rows, weights, jnp.asarray(group_sizes, jnp.int32)


@st.composite
def sizes(draw, total):
    cuts = draw(st.lists(st.integers(0, total), min_size=GROUPS - 1, max_size=GROUPS - 1))
    edges = [0, *sorted(cuts), total]
    return [b - a for a, b in zip(edges, edges[1:], strict=False)]


@pytest.mark.parametrize("total", [1, 40, 200, 600])
@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_both_implementations_compute_the_definition(total, data):
    group_sizes = data.draw(sizes(total))
    arrays = make_inputs(group_sizes)
    expected = oracle(*arrays[:2], group_sizes)
    for actual in (
        grouped_matmul_triton(*arrays, interpret=True),
        grouped_matmul(*arrays, implementation="xla"),
    ):
        assert actual.shape == (total, COLUMNS) and actual.dtype == jnp.float32
        assert np.abs(np.asarray(actual) - expected).max() < 1e-3


@pytest.mark.parametrize("group_sizes", [(0, 17, 0, 0, 3, 0), (40, 0, 0, 0, 0, 0)])
def test_the_lowered_kernel_stays_in_bounds_and_writes_every_row_once(group_sizes):
    arrays = make_inputs(group_sizes)
    (actual,) = execute(grouped_matmul_triton, *arrays)
    assert np.abs(actual - oracle(*arrays[:2], group_sizes)).max() < 1e-3


@pytest.mark.parametrize("group_sizes", [(0, 17, 0, 0, 3, 0), (0, 0, 0, 0, 0, 1)])
def test_only_matrices_of_groups_with_rows_are_read(monkeypatch, group_sizes):
    rows, weights, sizes = make_inputs(group_sizes)
    read = collections.Counter()
    check = _Buffer.check

    def watch(buffer, offsets, program, verb):
        if buffer.data.size == weights.size:
            read.update((offsets.reshape(-1) // (DEPTH * COLUMNS)).tolist())
        check(buffer, offsets, program, verb)

    monkeypatch.setattr(_Buffer, "check", watch)
    execute(grouped_matmul_triton, rows, weights, sizes)
    tile = tile_rows(sum(group_sizes), GROUPS)
    tiles = {g: -(-size // tile) for g, size in enumerate(group_sizes) if size}
    assert read == {g: count * DEPTH * COLUMNS for g, count in tiles.items()}


def test_tiles_are_laid_per_group_and_the_rest_are_empty():
    group, start, stop = lay_tiles(jnp.asarray([5, 0, 3]), 8, 4)
    assert group.tolist() == [0, 0, 2, 2, 2]
    assert start.tolist() == [0, 4, 5, 9, 13]
    assert stop.tolist() == [5, 5, 8, 8, 8]


def test_tiles_follow_the_average_group():
    assert [tile_rows(rows, 128) for rows in (8, 512, 4096, 32_768)] == [16, 16, 32, 64]


def test_shapes_that_the_kernel_does_not_take_are_named():
    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    assert unsupported(array(8, 128), array(4, 128, 256)) is None
    assert "multiples of 64 and 128" in unsupported(array(8, 96), array(4, 96, 256))
    rows, weights = array(8, 128, dtype=jnp.float32), array(4, 128, 256, dtype=jnp.float32)
    with pytest.raises(ValueError, match="rows are float32 .* expected bfloat16; use 'xla'"):
        jax.eval_shape(
            lambda *x: grouped_matmul(*x, implementation="triton"),
            rows,
            weights,
            array(4, dtype=jnp.int32),
        )
