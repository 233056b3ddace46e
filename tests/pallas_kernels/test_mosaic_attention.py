"""Tree attention in Mosaic GPU: interpreted, lowered for an H100, and when it is used."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import ASSUMED_CARD
from pallas_kernels.h100.target import lowering_for_h100
from pallas_kernels.tree_attention import config, tree_attention
from pallas_kernels.tree_attention.config import MosaicTile, Shape, TileConfig, choose
from pallas_kernels.tree_attention.mosaic import tree_attention_mosaic
from tests.pallas_kernels.attention_cases import Case, make_inputs, oracle, tolerance
from tests.pallas_kernels.test_skinny_matmul import interpreted
from tests.slow import slow_but

BFLOAT16 = jnp.dtype("bfloat16")
# Batch, nodes, heads, key/value heads, head dim, capacity; lengths; splits, steps.
CASES = {
    "two heads a warp group": ((1, 64, 4, 1, 64, 192), [100], (2, 2)),
    "one head a warp group": ((2, 64, 2, 1, 128, 128), [0, 128], (1, 2)),
    "two blocks of nodes": ((1, 128, 4, 2, 64, 192), [65], (3, 2)),
    "two programs for 64 nodes": ((1, 64, 8, 1, 64, 128), [64], (1, 3)),
    "more splits than blocks": ((2, 64, 4, 1, 64, 128), [1, 63], (8, 2)),
}


def needs_interpreter(test):
    """Marks a test that runs where a newer JAX is tested."""
    old = jax.__version_info__ < (0, 11)
    return pytest.mark.h100(
        pytest.mark.skipif(old, reason="its interpreter lacks layouts")(test)
    )


@needs_interpreter
@pytest.mark.parametrize("name", slow_but(["two heads a warp group"], CASES))
def test_the_kernel_computes_the_definition(name):
    shape, lengths, tile = CASES[name]
    case = Case(Shape(*shape, BFLOAT16), MosaicTile(*tile))
    arrays = make_inputs(case, lengths)
    options = dict(scale=0.125, tile=case.tile, interpret=interpreted())
    expected = oracle(**arrays, scale=0.125, window=None)
    del arrays["depths"]  # for windows
    found = np.asarray(tree_attention_mosaic(**arrays, **options), np.float64)
    assert np.abs(found - expected).max() < tolerance(case, tensor_cores=True)


@needs_interpreter
def test_blocks_of_later_nodes_are_not_read_where_trees_are_ordered():
    shape, lengths, tile = CASES["two blocks of nodes"]
    case = Case(Shape(*shape, BFLOAT16), MosaicTile(*tile))
    arrays = make_inputs(case, lengths)
    expected = oracle(**arrays, scale=0.125, window=None)[:, :64]
    del arrays["depths"]  # for windows
    arrays["v_new"] = arrays["v_new"].at[:, 64:].set(jnp.nan)
    options = dict(scale=0.125, tile=case.tile, ordered=True, interpret=interpreted())
    found = np.asarray(tree_attention_mosaic(**arrays, **options), np.float64)[:, :64]
    assert np.abs(found - expected).max() < tolerance(case, tensor_cores=True)


def lowered(shape: Shape, tile=None, window=None) -> str:
    """A call compiled for an H100, up to the kernel's own program."""
    s, array = shape, jax.ShapeDtypeStruct
    nodes, cache = (s.batch, s.nodes), (s.batch, s.kv_heads, s.capacity, s.head_dim)
    arrays = (
        array((*nodes, s.heads, s.head_dim), BFLOAT16),
        *(array(cache, BFLOAT16),) * 2,
        array(nodes[:1], jnp.int32),
        *(array((*nodes, s.kv_heads, s.head_dim), BFLOAT16),) * 2,
        array((*nodes, -(-s.nodes // 32)), jnp.uint32),
    )
    call = functools.partial(
        tree_attention, scale=0.125, tile=tile, window=window, implementation="triton"
    )
    depths = array(nodes, jnp.int32)
    with lowering_for_h100():
        traced = jax.jit(lambda *x: call(*x[:-1], depths=x[-1])).trace(*arrays, depths)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("nodes", [64, 256])
def test_it_lowers_for_an_h100(nodes):
    shape = Shape(2, nodes, 32, 8, 128, 4096, BFLOAT16)
    assert "mosaic_gpu" in lowered(shape, MosaicTile(splits=8, steps=4))


def test_it_is_used_where_it_was_measured_and_takes_the_shape(monkeypatch, tmp_path):
    shape = Shape(1, 64, 32, 8, 128, 4096, BFLOAT16)
    entry = dict(card=ASSUMED_CARD, shape=vars(shape) | dict(dtype="bfloat16"), ms=0.01)
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps([entry | dict(tile=dict(splits=8, steps=4))]))
    assert isinstance(choose(shape, ASSUMED_CARD), TileConfig) and "mosaic_gpu" not in lowered(
        shape
    )
    monkeypatch.setattr(config, "MEASURED", path)
    assert choose(shape, ASSUMED_CARD) == MosaicTile(
        splits=8, steps=4
    ) and "mosaic_gpu" in lowered(shape)
    near = Shape(1, 48, 32, 8, 128, 4096, BFLOAT16)
    assert isinstance(choose(near, ASSUMED_CARD), TileConfig)  # not whole blocks of nodes
    assert isinstance(choose(shape, ASSUMED_CARD, window=100), TileConfig)
    assert "mosaic_gpu" not in lowered(shape, window=100)


def test_a_shape_that_it_does_not_take_is_refused():
    shape = Shape(1, 48, 32, 8, 128, 4096, BFLOAT16)
    with pytest.raises(
        ValueError, match="48 nodes, 4096 cache rows .* multiples of 64, 64 and 2"
    ):
        lowered(shape, MosaicTile(splits=8, steps=4))
