"""The kernels on a real GPU, each against its definition."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.grouped_scaled_matmul import grouped_scaled_matmul
from pallas_kernels.scaled_matmul import scaled_matmul
from pallas_kernels.skinny_matmul import skinny_matmul
from pallas_kernels.skinny_matmul.config import Tile
from pallas_kernels.skinny_matmul.reference import skinny_matmul_reference
from pallas_kernels.tree_attention import tree_attention
from pallas_kernels.tree_attention.config import MosaicTile, Shape, choose
from pallas_kernels.tree_attention.triton import tree_attention_triton
from pallas_kernels.tree_level import empty_levels
from pallas_kernels.tree_level.reference import grow_level_reference
from pallas_kernels.tree_level.triton import grow_level_triton
from tests.pallas_kernels import test_grouped_matmul as grouped
from tests.pallas_kernels import test_grouped_scaled_matmul as grouped_scaled
from tests.pallas_kernels import test_scaled_matmul as scaled
from tests.pallas_kernels import test_skinny_matmul as skinny
from tests.pallas_kernels.attention_cases import CASES, Case, make_inputs, oracle, tolerance

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("fill", [0.0, 0.5, 1.0])
def test_tree_attention_computes_the_definition(name, fill):
    case = CASES[name]
    lengths = [int(fill * case.shape.capacity)] * case.shape.batch
    arrays = make_inputs(case, lengths, seed=int(2 * fill))
    options = dict(scale=0.125, window=case.window)
    first = tree_attention_triton(**arrays, **options, tile=case.tile)
    again = tree_attention_triton(**arrays, **options, tile=case.tile)
    error = np.abs(np.asarray(first, np.float64) - oracle(**arrays, **options)).max()
    assert error < tolerance(case, tensor_cores=True)
    assert (jax.device_get(first) == jax.device_get(again)).all()


SHAPES = list(
    itertools.product((1, 16, 64, 200), (64, 128, 256), ("bfloat16", "float32"), (None, 90))
)


@pytest.mark.parametrize(("nodes", "dim", "dtype", "window"), SHAPES)
def test_tree_attention_with_the_chosen_tile(nodes, dim, dtype, window):
    shape = Shape(2, nodes, 8, 2, dim, 520, jnp.dtype(dtype))
    case = Case(shape, choose(shape), window)
    arrays = make_inputs(case, [519, 77])
    options = dict(scale=0.125, window=window)
    kernel = functools.partial(tree_attention, ordered=True, implementation="triton")
    found = jax.jit(lambda x: kernel(**x, **options))(arrays)
    error = np.abs(np.asarray(found, np.float64) - oracle(**arrays, **options)).max()
    assert error < tolerance(case, tensor_cores=True)


@pytest.mark.parametrize(
    ("nodes", "heads", "dim"), [(64, 8, 128), (192, 4, 64), (256, 16, 128)]
)
@pytest.mark.parametrize(
    "tile", [MosaicTile(1, 2), MosaicTile(4, 4), MosaicTile(16, 3)], ids=str
)
def test_tree_attention_by_mosaic(nodes, heads, dim, tile):
    case = Case(Shape(3, nodes, heads, 2, dim, 640, jnp.dtype("bfloat16")), tile)
    arrays = make_inputs(case, [640, 77, 0])
    attend = jax.jit(
        lambda x: tree_attention(**x, scale=0.125, tile=tile, implementation="triton")
    )
    error = np.abs(
        np.asarray(attend(arrays), np.float64) - oracle(**arrays, scale=0.125, window=None)
    ).max()
    assert error < tolerance(case, tensor_cores=True)


@pytest.mark.parametrize(
    "group_sizes", [(0, 1, 0, 0, 0, 0), (0, 17, 0, 20, 3, 0), (200, 0, 0, 0, 0, 0), (100,) * 6]
)
def test_grouped_matmul_computes_the_definition(group_sizes):
    arrays = grouped.make_inputs(group_sizes)
    found = jax.jit(lambda *x: grouped_matmul(*x, implementation="triton"))(*arrays)
    expected = grouped.oracle(*arrays[:2], group_sizes)
    assert np.abs(np.asarray(found) - expected).max() < 1e-3


@pytest.mark.parametrize("count", [1, 8, 17, 64, 100, 256, 512])
@pytest.mark.parametrize("block", [(128, 128), (64, 64), (1, 1024)])
def test_scaled_matmul_computes_the_definition(count, block):
    arrays = scaled.make_inputs(count, 256, 1024, block)
    found = jax.jit(lambda *x: scaled_matmul(*x, implementation="triton"))(*arrays)
    expected = scaled.oracle(*arrays)
    assert np.abs(np.asarray(found) - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("group_sizes", [(0, 1, 0, 0), (0, 17, 0, 23), (300, 0, 90, 10)])
@pytest.mark.parametrize("block", [(128, 128), (64, 64)])
def test_grouped_scaled_matmul_computes_the_definition(group_sizes, block):
    arrays = grouped_scaled.make_inputs(group_sizes, block)
    found = jax.jit(lambda *x: grouped_scaled_matmul(*x, implementation="triton"))(*arrays)
    expected = grouped_scaled.oracle(*arrays)
    assert np.abs(np.asarray(found) - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("rows", [16, 64, 100])
@pytest.mark.parametrize(
    "tile",
    [Tile(64, 64, 8, 4), Tile(96, 64, 4, 2), Tile(128, 64, 4), Tile(64, 128, 2)],
    ids=str,
)
def test_skinny_products_compute_the_definition(rows, tile):
    arrays = skinny.make_inputs(rows, 4096, 768)
    found = jax.jit(lambda *x: skinny_matmul(*x, tile=tile))(*arrays)
    expected = np.asarray(skinny_matmul_reference(*arrays))
    assert np.abs(np.asarray(found) - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("batch, children", [(1, 63), (2, 255)])
def test_the_levels_of_a_tree_hold_the_best_children(batch, children):
    depth, vocab, rank, parents = 4, 151_936, 256, 16
    draw = np.random.default_rng(children)
    base = jnp.asarray(3 * draw.standard_normal((batch, depth, vocab), np.float32))
    previous, output = (
        jnp.asarray(0.1 * draw.standard_normal((vocab, rank), np.float32), jnp.bfloat16)
        for _ in range(2)
    )
    # Likely tokens at every depth: without, deep levels lie below the floor.
    base = base.at[:, :, :5].add(14.0)
    levels = empty_levels(jnp.arange(batch), depth=depth, width=children)
    for slot in range(depth):
        latent = previous[levels.tokens[:, slot, :parents]]
        arguments = (levels, jnp.int32(slot), base, latent, output)
        expected = jax.device_get(jax.jit(grow_level_reference)(*arguments))
        levels = grow_level_triton(*arguments)
        found = jax.device_get(levels)
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
        np.testing.assert_allclose(found.floor, expected.floor, atol=1e-4)
        # Scores that differ by rounding alone may change places.
        assert (found.tokens == expected.tokens).mean() > 0.98
        again = jax.device_get(grow_level_triton(*arguments))
        jax.tree.map(np.testing.assert_array_equal, again, found)
