"""Products of few rows: the Mosaic GPU kernel interpreted on the CPU, and when it is used."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.models.layers import project
from pallas_kernels.dispatch import ASSUMED_CARD
from pallas_kernels.h100.target import lowering_for_h100
from pallas_kernels.skinny_matmul import config, skinny_matmul
from pallas_kernels.skinny_matmul.config import Tile, choose
from pallas_kernels.skinny_matmul.mosaic import skinny_matmul_mosaic
from pallas_kernels.skinny_matmul.reference import skinny_matmul_reference


def make_inputs(rows: int, inner: int, outer: int):
    draw = np.random.default_rng(rows)
    x, weight = draw.standard_normal((rows, inner)), 0.1 * draw.standard_normal((inner, outer))
    return jnp.asarray(x, jnp.bfloat16), jnp.asarray(weight, jnp.bfloat16)


def interpreted():
    # Public since JAX 0.11.
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams()


@pytest.mark.parametrize(
    ("rows", "columns", "depth", "splits"),
    [(64, 64, 64, 1), (37, 64, 64, 2), (16, 96, 64, 1), (100, 96, 128, 1), (128, 64, 64, 2)],
)
def test_the_kernel_computes_the_definition(rows, columns, depth, splits):
    tile = Tile(columns, depth, steps=2, splits=splits)
    arrays = make_inputs(rows, 2 * 128, 192)
    found = skinny_matmul_mosaic(*arrays, tile, interpret=interpreted())
    expected = skinny_matmul_reference(*arrays)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def lowered(rows: int, inner: int, outer: int, tile: Tile) -> str:
    """The kernel's program for an H100; an error if it needs too much shared memory."""
    arrays = (jax.ShapeDtypeStruct(x, jnp.bfloat16) for x in ((rows, inner), (inner, outer)))
    call = jax.jit(functools.partial(skinny_matmul_mosaic, tile=tile))
    with lowering_for_h100():
        return call.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(("rows", "columns"), [(16, 64), (64, 96), (128, 64)])
def test_it_lowers_for_an_h100(rows, columns):
    assert "mosaic_gpu" in lowered(rows, 4096, 6144, Tile(columns, 64, 3))


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """measured(rows, inner, outer) -> the tile that is measured for such products."""

    def of(rows, inner, outer):
        tile = dict(columns=64, depth=64, steps=4, splits=1)
        shape = dict(rows=rows, inner=inner, outer=outer)
        path = tmp_path / "tiles.json"
        path.write_text(
            json.dumps([dict(card=ASSUMED_CARD, **shape, tile=tile, us=1.0, xla_us=2.0)])
        )
        monkeypatch.setattr(config, "MEASURED", path)
        return Tile(**tile)

    return of


def test_a_measurement_counts_for_its_card_shape_and_rows_up_to_a_power_of_two(measured):
    tile = measured(64, 256, 128)
    assert (
        choose(64, 256, 128, card=ASSUMED_CARD)
        == choose(33, 256, 128, card=ASSUMED_CARD)
        == tile
    )
    for rows, inner, outer in ((32, 256, 128), (65, 256, 128), (64, 128, 128), (64, 256, 64)):
        assert choose(rows, inner, outer, card=ASSUMED_CARD) is None
    assert choose(64, 256, 128, card="NVIDIA A100") is None


def test_the_tiles_that_ship_divide_their_products_and_were_faster():
    for entry in json.loads(config.MEASURED.read_text()):
        tile = Tile(**entry["tile"])
        assert tile.divides(entry["inner"], entry["outer"]) and entry["us"] < entry["xla_us"]
        assert "mosaic_gpu" in lowered(entry["rows"], entry["inner"], entry["outer"], tile)


def test_a_layer_uses_the_kernel_only_where_it_was_measured_to_be_faster(measured):
    multiply = functools.partial(project, "bnm,mf->bnf")
    x, weight = make_inputs(64, 256, 128)

    def uses_kernel(x, weight):
        return "platform_index" in str(jax.make_jaxpr(multiply)(x[None], weight))

    # JAX keeps what it traced: other rows than below.
    assert not uses_kernel(x[:60], weight)
    measured(64, 256, 128)
    assert uses_kernel(x, weight) and not uses_kernel(x[:16], weight)
    assert not uses_kernel(x.astype(jnp.float32), weight.astype(jnp.float32))
    found = multiply(x[None], weight)[0]  # this CPU computes the definition
    np.testing.assert_array_equal(found, skinny_matmul_reference(x, weight))


def test_its_derivative_is_the_definitions(measured):
    x, weight = make_inputs(64, 256, 128)
    measured(64, 256, 128)
    slopes = [
        jax.grad(lambda x, f=f: f(x, weight).sum())(x)
        for f in (skinny_matmul, skinny_matmul_reference)
    ]
    np.testing.assert_array_equal(*slopes)


def test_a_tile_that_does_not_divide_the_product_is_refused():
    with pytest.raises(ValueError, match="a multiple of 96 outputs and of 64 inputs"):
        skinny_matmul(*make_inputs(64, 256, 128), tile=Tile(96, 64, 4))
