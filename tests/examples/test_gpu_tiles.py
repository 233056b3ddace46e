"""`tune` and `products`: which tiles they time, keep and write."""

import argparse
import dataclasses
import json

import numpy as np
import pytest

from pallas_kernels.skinny_matmul.config import MEASURED
from tests.pallas_kernels import test_skinny_matmul as skinny


@pytest.mark.slow
def test_tune_writes_tiles_that_the_kernel_reads(run, tmp_path):
    from pallas_kernels.tree_attention.config import read_measured

    tiles = tmp_path / "tiles.json"
    status, (row,) = run("tune", "--model", "tiny", "--tiles", tiles)
    assert status == 0
    ((card, shape, tile),) = read_measured(tiles)
    assert card.endswith("CPU") and (shape.nodes, shape.capacity) == (4, 64)
    assert row["ms"] == min(tried[-1] for tried in row["tried"]) and row["difference"] < 1e-5
    assert row["tile"] == dict(
        rows=tile.rows,
        keys=tile.keys,
        nodes=tile.nodes,
        splits=tile.splits,
        warps=tile.warps,
        stages=tile.stages,
    )


@pytest.fixture
def tune(script, monkeypatch):
    """The module, with a Mosaic tile for every shape, and arrays and errors of none."""
    tune = script("tune")
    monkeypatch.setattr(tune, "of_mosaic", lambda shape: [tune.MosaicTile(1, 2)])
    monkeypatch.setattr(tune, "inputs", lambda shape: ((), ((),)))
    monkeypatch.setattr(tune.Tuning, "error", lambda self, tile: 0.0)
    return tune


def test_tune_writes_tritons_tiles_before_it_tries_mosaics(run, tune, monkeypatch, tmp_path):
    tiles = tmp_path / "tiles.json"

    def search(tried, rows, threads):
        for tuning, candidates in tried:
            mosaic = isinstance(candidates[0], tune.MosaicTile)
            assert tiles.exists() == mosaic
            tuning.ms |= dict.fromkeys(candidates, 1.0 if mosaic else 2.0)

    monkeypatch.setattr(tune, "search", search)
    status, rows = run("tune", "--model", "tiny", "--tiles", tiles)
    assert status == 0
    assert [(row["kernel"], row["ms"]) for row in rows] == [("triton", 2.0), ("mosaic", 1.0)]
    fastest = json.loads(tiles.read_text())[-1]
    assert fastest["tile"] == dict(splits=1, steps=2) and fastest["shape"] == {
        name: rows[0][name] for name in fastest["shape"]
    }


def test_a_tile_that_fails_in_any_way_is_recorded_and_the_next_is_timed(tune):
    def fail():
        raise NotImplementedError("no such instruction")

    shape = tune.Shape(1, 64, 8, 2, 128, 128, np.dtype("float32"))
    tuning, (bad, good) = tune.Tuning(shape), tune.of_triton(shape)[:2]
    tuning.time(bad, fail)
    with pytest.raises(ValueError, match="NotImplementedError: no such instruction"):
        tuning.row()
    tuning.time(good, lambda: lambda *_: ())
    assert tuning.best(2) == [good] and bad in tuning.refused
    results = {tuple(tile): result for *tile, result in tuning.row()["tried"]}
    assert results[dataclasses.astuple(bad)] == "NotImplementedError: no such instruction"


@pytest.mark.slow
def test_products_of_every_weight_are_timed_and_no_tile_changes_without_a_gpu(run, tmp_path):
    tiles = tmp_path / "products.json"
    status, rows = run("products", "--model", "tiny", "--nodes", 4, "--tiles", tiles)
    assert status == 0
    assert {row["product"] for row in rows} == {"qkv", "out", "gate_up", "down"}
    assert all(row["tile"] is None and row["us"] > 0 for row in rows)
    assert json.loads(tiles.read_text()) == json.loads(MEASURED.read_text())


def test_measured_products_replace_the_entries_of_the_same_shapes(script):
    def entry(rows, tile):
        return dict(card="card", rows=rows, inner=64, outer=64, tile=tile, us=1, xla_us=2)

    old, new = dict(columns=64), dict(columns=128)
    found = script("products").updated(
        [entry(16, old), entry(32, old), entry(64, old)], [entry(32, new), entry(64, None)]
    )
    assert found == [entry(16, old), entry(32, new)]


def test_gate_and_up_which_have_most_tiles_come_last(script):
    products = script("products")
    for model in ("qwen3-8b", "qwen3.5-9b"):
        assert list(products.products_of(products.MODELS[model]))[-1] == "gate_up"


@pytest.mark.parametrize("timed, entries", [(100, 1), (3, 0)])
def test_a_product_without_all_its_tiles_changes_no_entry(script, monkeypatch, timed, entries):
    products = script("products")

    class Rows:
        left, seen, skipped = 1.0, 0, 0

        def measure(self, find, *, tile, **settings):
            self.seen += 1
            if self.seen > timed:
                self.skipped += 1
                return None
            return dict(card="card", tile=tile, us=20.0 if tile else 30.0)

        known = staticmethod(dict)

    monkeypatch.setattr(products.timing, "compile_all", lambda jobs, **_: jobs)
    monkeypatch.setattr(products, "normal", lambda *_, **__: None)
    options = argparse.Namespace(nodes=[64], kernel=True, threads=1)
    found = products.compare(Rows(), products.Product(4096, 6144), {}, options)
    assert len(found) == entries


def test_tiles_of_a_product_divide_it_and_fit_the_card(script):
    product = script("products").Product(inner=4096, outer=6144)
    for nodes in (16, 64, 128):
        found = script("products").tiles(product, nodes)
        assert len(found) > 1 and all(tile.divides(4096, 6144) for tile in found)
        largest = max(found, key=lambda tile: tile.steps * (nodes + tile.columns) * tile.depth)
        # The kernel's own check of shared memory, made while lowering.
        assert "mosaic_gpu" in skinny.lowered(nodes, 4096, 6144, largest)
