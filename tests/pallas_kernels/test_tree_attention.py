"""Tree attention, every implementation, against its definition."""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.h100.target import lowering_for_h100
from pallas_kernels.tree_attention import config, tree_attention
from pallas_kernels.tree_attention.config import (
    Shape,
    TileConfig,
    choose,
    from_table,
    unsupported,
)
from pallas_kernels.tree_attention.reference import tree_attention_reference
from pallas_kernels.tree_attention.triton import tree_attention_triton
from pallas_kernels.tree_attention.xla import tree_attention_xla
from tests.pallas_kernels.attention_cases import (
    CASES,
    chosen_cases,
    edge_lengths,
    make_inputs,
    oracle,
    tolerance,
)
from tests.slow import slow_but

reference = jax.jit(tree_attention_reference, static_argnames=("scale", "window"))
blocks = jax.jit(tree_attention_xla, static_argnames=("scale", "window", "block"))
SCALE = 0.125


def check(case, arrays):
    """Every implementation against the definition, and the kernel against itself."""
    options = dict(scale=SCALE, window=case.window)
    expected = oracle(**arrays, **options)
    kernel = functools.partial(
        tree_attention_triton, **arrays, **options, tile=case.tile, interpret=True
    )
    first, again = kernel(), kernel()
    assert first.dtype == arrays["q"].dtype
    in_blocks = blocks(**arrays, **options, block=case.tile.keys)
    ordered = kernel(ordered=True)
    for actual in (first, ordered, reference(**arrays, **options), in_blocks):
        error = np.abs(np.asarray(actual, np.float64) - expected).max()
        assert error < tolerance(case)
    assert (first == again).all()


def draw_inputs(case, data):
    return make_inputs(
        case,
        data.draw(edge_lengths(case)),
        seed=data.draw(st.integers(0, 2**32 - 1)),
        depth=data.draw(st.floats(0, 1)),
    )


QUICK = ("decode", "tree of several steps", "window", "bfloat16", "heads of 256")


@pytest.mark.parametrize("name", slow_but(QUICK, CASES))
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_every_implementation_computes_the_definition(name, data):
    check(CASES[name], draw_inputs(CASES[name], data))


@settings(max_examples=8, deadline=None)
@given(case=chosen_cases(), data=st.data())
@pytest.mark.slow
def test_any_shape_cut_as_the_library_cuts_it(case, data):
    check(case, draw_inputs(case, data))


def test_rows_past_the_length_are_not_read():
    case = CASES["decode"]
    arrays = make_inputs(case, (0, 40))
    kernel = functools.partial(
        tree_attention_triton, scale=SCALE, tile=case.tile, interpret=True
    )
    spoiled = jnp.arange(case.shape.capacity)[:, None] >= arrays["lengths"][:, None, None, None]
    expected = kernel(**arrays)
    for name in ("k_cache", "v_cache"):
        arrays[name] = jnp.where(spoiled, jnp.nan, arrays[name])
    assert (kernel(**arrays) == expected).all()


def test_blocks_of_later_nodes_are_not_read_where_trees_are_ordered():
    case = CASES["tree of several steps"]  # 16 nodes of a tile, blocks of 32
    arrays = make_inputs(case, (40,))
    kernel = functools.partial(
        tree_attention_triton, scale=SCALE, tile=case.tile, interpret=True
    )
    expected = kernel(**arrays, ordered=True)[:, :32]
    arrays["v_new"] = arrays["v_new"].at[:, 32:].set(jnp.nan)
    assert jnp.isnan(kernel(**arrays)[:, :32]).any()
    assert (kernel(**arrays, ordered=True)[:, :32] == expected).all()


def test_a_longer_row_beside_it_changes_nothing_of_a_row_in_blocks():
    arrays = make_inputs(CASES["decode"], (40, 96))
    both = blocks(**arrays, scale=SCALE, block=32)
    alone = blocks(
        **{**arrays, "lengths": jnp.array([40, 1], jnp.int32)}, scale=SCALE, block=32
    )
    assert (both[0] == alone[0]).all()


def abstract(shape: Shape, **changes):
    """Arguments of `tree_attention` as shapes."""
    s, f = shape, jnp.float32
    cache = (s.batch, s.kv_heads, s.capacity, s.head_dim)
    new = (s.batch, s.nodes, s.kv_heads, s.head_dim)
    shapes = dict(
        q=((s.batch, s.nodes, s.heads, s.head_dim), f),
        k_cache=(cache, s.dtype),
        v_cache=(cache, s.dtype),
        lengths=((s.batch,), jnp.int32),
        k_new=(new, f),
        v_new=(new, f),
        ancestors=((s.batch, s.nodes, -(-s.nodes // 32)), jnp.uint32),
    )
    return {name: jax.ShapeDtypeStruct(*spec) for name, spec in shapes.items()}


@functools.partial(jax.jit, static_argnames="implementation")
def attention(implementation=None, **arrays):
    return tree_attention(**arrays, scale=SCALE, implementation=implementation)


@pytest.mark.parametrize(
    ("nodes", "dim", "dtype"),
    slow_but(
        [(1, 64, "float32"), (8, 128, "bfloat16"), (60, 256, "bfloat16"), (512, 64, "float32")],
        itertools.product([1, 8, 60, 512], [64, 128, 256], ["bfloat16", "float32"]),
    ),
)
def test_supported_shapes_lower_to_triton_where_a_gpu_is_the_target(nodes, dim, dtype):
    arguments = abstract(Shape(1, nodes, 12, 4, dim, 4096, jnp.dtype(dtype)))
    with lowering_for_h100():
        lowered = attention.trace(**arguments).lower(lowering_platforms=("cuda",))
    assert "__gpu$xla.gpu.triton" in lowered.as_text()


def test_on_a_cpu_the_kernel_does_not_run():
    arguments = abstract(Shape(1, 8, 12, 4, 64, 128, jnp.dtype("float32")))
    assert "triton" not in attention.lower(**arguments).as_text()


def test_an_unsupported_shape_falls_back_unless_the_kernel_was_asked_for():
    arguments = abstract(Shape(1, 8, 12, 4, 80, 128, jnp.dtype("float32")))
    with lowering_for_h100():
        lowered = attention.trace(**arguments).lower(lowering_platforms=("cuda",))
    assert "triton" not in lowered.as_text()
    with pytest.raises(ValueError, match="head dim is 80; expected one of .64, 128, 256."):
        attention.trace(**arguments, implementation="triton")


def test_arguments_that_make_no_sense_are_named():
    arguments = abstract(Shape(1, 8, 12, 4, 64, 128, jnp.dtype("float32")))
    with pytest.raises(ValueError, match="implementation is 'cuda'; expected"):
        attention.trace(**arguments, implementation="cuda")
    with pytest.raises(ValueError, match="window is set but depths is None"):
        jax.eval_shape(
            functools.partial(tree_attention, scale=SCALE, window=4), *arguments.values()
        )
    with pytest.raises(ValueError, match="TileConfig.keys is 48; .* power of two"):
        TileConfig(16, 48, 16, 1, 4, 2)
    with pytest.raises(ValueError, match="TileConfig.rows is 8; .* at least 16"):
        TileConfig(8, 64, 16, 1, 4, 2)


def qwen3_8b(nodes, capacity, batch=1):
    return Shape(batch, nodes, 32, 8, 128, capacity, jnp.dtype("bfloat16"))


def qwen3_5_9b(nodes, capacity):
    return Shape(1, nodes, 16, 4, 256, capacity, jnp.dtype("bfloat16"))


@pytest.mark.parametrize(
    "shape, tile",
    [
        # Decoding: 4 query rows per key/value head, so only splits can fill 132 processors.
        (qwen3_8b(1, 4096), TileConfig(16, 64, 16, 16, 4, 3)),
        (qwen3_8b(1, 32768), TileConfig(16, 64, 16, 32, 4, 3)),
        (qwen3_8b(1, 4096, batch=32), TileConfig(16, 64, 16, 1, 4, 3)),
        # Verifying: wgmma tiles of 64 or 128 rows, fewer splits as rows fill the processors.
        (qwen3_8b(16, 4096), TileConfig(64, 64, 16, 16, 4, 3)),
        (qwen3_8b(64, 4096), TileConfig(128, 64, 64, 8, 8, 3)),
        (qwen3_8b(256, 4096), TileConfig(128, 64, 64, 2, 8, 3)),
        (qwen3_8b(512, 4096), TileConfig(128, 64, 64, 1, 8, 3)),
        # Heads of 256 take twice the registers and the shared memory: steps of half the keys.
        (qwen3_5_9b(1, 4096), TileConfig(16, 32, 16, 32, 4, 3)),
        (qwen3_5_9b(64, 4096), TileConfig(128, 32, 32, 16, 8, 3)),
    ],
)
def test_the_tile_of_a_shape_that_was_not_measured(shape, tile):
    assert from_table(shape) == tile


@settings(max_examples=200, deadline=None)
@given(
    st.builds(
        Shape,
        batch=st.integers(1, 64),
        nodes=st.integers(1, 512),
        heads=st.sampled_from([8, 24, 40]),
        kv_heads=st.sampled_from([1, 2, 4, 8]),
        head_dim=st.sampled_from([64, 128, 256]),
        capacity=st.integers(1, 40_960),
        dtype=st.sampled_from([jnp.dtype("bfloat16"), jnp.dtype("float32")]),
    )
)
def test_every_supported_shape_has_a_tile_of_powers_of_two(shape):
    assert unsupported(shape) is None
    tile = from_table(shape)  # TileConfig checks itself
    assert tile.splits == 1 or tile.splits * 4 * tile.keys <= shape.capacity


def test_the_nearest_shape_measured_on_the_card_gives_its_tile(monkeypatch, tmp_path):
    tiles = {
        (1, 4096): TileConfig(16, 128, 16, 32, 4, 4),
        (64, 4096): TileConfig(64, 64, 32, 16, 4, 4),
        (64, 32_768): TileConfig(64, 32, 32, 8, 4, 4),
    }
    entries = [
        dict(
            card="card",
            shape=dataclasses.asdict(qwen3_8b(*size)) | dict(dtype="bfloat16"),
            tile=dataclasses.asdict(tile),
        )
        for size, tile in tiles.items()
    ]
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps(entries))
    monkeypatch.setattr(config, "MEASURED", path)

    def chosen(*size, card="card"):
        return choose(qwen3_8b(*size), card)

    assert chosen(1, 4096) == tiles[1, 4096]
    assert chosen(1, 6144) == tiles[1, 4096]
    assert chosen(48, 5000) == tiles[64, 4096]
    assert chosen(64, 20_000) == tiles[64, 32_768]
    # More than twice as far, of another card, or other rows: nothing measured applies.
    table = from_table(qwen3_8b(64, 8500))
    assert chosen(64, 8500) == table and table not in tiles.values()
    assert chosen(64, 4096, card="other") == from_table(qwen3_8b(64, 4096))
    assert chosen(64, 4096, 2) == from_table(qwen3_8b(64, 4096, 2))


def test_the_measured_tiles_that_ship_can_be_read():
    for _, shape, tile in config.read_measured(config.MEASURED):
        assert unsupported(shape) is None
        assert tile.splits * tile.keys <= shape.capacity
