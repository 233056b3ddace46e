"""Times the matrix products of a layer: XLA's, and a kernel for few rows (`skinny_matmul`).

    python examples/gpu/products.py
    cp out/gpu/products.json pallas_kernels/skinny_matmul/tiles.json

With few nodes a product takes as long as reading its weight. XLA's products read at the
memory's rate for one node, and at 0.7 … 0.9 of it for 64 (docs/h100.md). Every tile of the
kernel that divides a product is tried; those that are faster than XLA are written beside the
library's others, and it uses the kernel for no other product.

Every call walks through more copies of the weight than the card's second-level cache holds.
`share` compares with reading the weight at a copy's rate. Without a GPU only XLA is timed, on
small shapes: times mean nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import timing
from jax import lax
from shapes import MODELS, dtype_here, normal

from jaxspec.config import TargetConfig
from jaxspec.models.params import abstract_params
from pallas_kernels.skinny_matmul import skinny_matmul
from pallas_kernels.skinny_matmul.config import KEY, MEASURED, Tile, bucket, groups, padded
from pallas_kernels.skinny_matmul.reference import skinny_matmul_reference
from pallas_kernels.tree_attention.config import MULTIPROCESSORS

SECOND_LEVEL = 120e6  # bytes of weights per walk; more than twice the GPU's L2 cache
CALLS = 160  # fewest calls timed in one program
SHARED_MEMORY = 224 * 1024  # bytes that one program may have
ACCUMULATED = 128 * 128  # float32 sums that the registers of a warp group hold
STEPS = (3, 4, 5, 6, 8)  # loads in flight
BUSY = 0.6  # fewest multiprocessors with work, as a share, averaged over waves of programs
XLA = jax.jit(skinny_matmul_reference)
GAIN = 0.98  # of XLA's time, at most, for the library to use the kernel


@dataclasses.dataclass(frozen=True)
class Product:
    """Some rows times a weight [inner, outer]."""

    inner: int
    outer: int


def products_of(config: TargetConfig) -> dict[str, Product]:
    """The products of a model's layers, by the names of their weights.

    Gate and up come last: they have most tiles, and none was faster than XLA so far.
    """
    found = {}
    for layer in abstract_params(config, jnp.bfloat16).layers:
        for name in ("qkv", "out", "inputs", "output"):
            if (weight := getattr(layer.attention, name, None)) is not None:
                width = config.hidden_size
                inner = weight.size // width if name in ("out", "output") else width
                found[name] = Product(inner, weight.size // inner)
        if hasattr(layer.mlp, "gate_up") and layer.mlp.gate_up.ndim == 3:
            inner, both, outer = layer.mlp.gate_up.shape
            found |= dict(gate_up=Product(inner, both * outer), down=Product(outer, inner))
    return dict(sorted(found.items(), key=lambda product: product[0] == "gate_up"))


def tiles(product: Product, nodes: int) -> list[Tile]:
    """Those that divide a product and keep the card busy.

    With as many steps as fit: of one program on a multiprocessor, and of two.
    """
    found, rows = {}, padded(nodes)
    for columns, depth, splits, steps, beside in itertools.product(
        (64, 96, 128, 192), (64, 128), (1, 2, 3, 4), STEPS, (1, 2)
    ):
        tile = Tile(columns, depth, steps, splits)
        # As `skinny_matmul.mosaic` has it.
        shared = 2 * steps * (rows + columns) * depth + 128 * rows + 1024
        fits = beside * shared <= SHARED_MEMORY
        fits &= beside * rows * columns <= groups(rows) * ACCUMULATED
        waves = product.outer // columns * splits / (beside * MULTIPROCESSORS)
        if (
            tile.divides(product.inner, product.outer)
            and fits
            and waves / math.ceil(waves) > BUSY
        ):
            found[columns, depth, splits, beside] = tile
    return list(dict.fromkeys(found.values()))


@functools.partial(jax.jit, static_argnums=(0, 3))
def walk(call, rows, weights, times: int):
    """Multiplies with one weight after another; each result decides the next operand."""

    def once(_, rows):
        for weight in weights:
            out = call(rows, weight)
            rows = rows + (1e-9 * out[:, :1]).astype(rows.dtype)
        return rows

    return lax.fori_loop(0, times, once, rows)


def measure(single, program, rows, weights, rates: dict) -> dict:
    """us of a product, its share of the floor, and its difference from XLA's.

    Args:
      single, program: compiled, one product and a walk.
    """
    right = XLA(rows, weights[0])
    found = single(rows, weights[0])
    error = float(jnp.linalg.norm(found - right) / jnp.linalg.norm(right))
    if not error < 1e-2:
        raise ValueError(f"off by {error:.1e}, relative to XLA's product")
    run = functools.partial(program, rows, weights)
    found = timing.milliseconds(run, _times(weights) * len(weights))
    floor = weights[0].nbytes / rates["copy_gb_s"] / 1e6
    us, share = 1e3 * found["ms"], floor / found["ms"]
    return found | dict(us=round(us, 2), share=round(share, 3), difference=error)


def compare(rows: timing.Rows, product: Product, settings: dict, options) -> list[dict]:
    """Times XLA's product and every tile of the kernel, for every number of nodes.

    Returns:
      For each number of nodes, if no tile was skipped, an entry as
      `pallas_kernels.skinny_matmul.config` reads it; its tile is None where XLA is faster.
    """
    dtype = dtype_here()
    copies = max(2, math.ceil(SECOND_LEVEL / (2 * product.inner * product.outer)))
    *keys, key = jax.random.split(jax.random.key(0), 1 + (copies if options.kernel else 1))
    shape = product.inner, product.outer
    weights = [normal(key, 0.02, shape=shape, dtype=dtype) for key in keys]
    tried, jobs, found = {}, {}, []
    for nodes in options.nodes:
        x = normal(key, 1.0, shape=(nodes, product.inner), dtype=dtype)
        for tile in [None, *(tiles(product, nodes) if options.kernel else [])]:
            call = jax.jit(functools.partial(skinny_matmul, tile=tile)) if tile else XLA
            tried[nodes, tile] = x
            if not rows.known(**_key(settings, nodes, tile)):
                jobs[nodes, tile] = functools.partial(_compile, call, x, weights)
    programs = timing.compile_all(jobs, threads=options.threads, seconds=rows.left)

    def find(case):
        return measure(*programs[case](), tried[case], weights, rows.rates)

    for nodes in options.nodes:
        timed, skipped = {}, rows.skipped
        for case in (case for case in tried if case[0] == nodes):
            own = _key(settings, *case)
            timed[case[1]] = rows.measure(functools.partial(find, case), **own)
        usual = timed.pop(None)
        best = min(filter(None, timed.values()), key=lambda row: row["us"], default=None)
        if usual and best and rows.skipped == skipped:  # else another may be the fastest
            tile = best["tile"] if best["us"] <= GAIN * usual["us"] else None
            entry = dict(card=best["card"], rows=bucket(nodes), **dataclasses.asdict(product))
            found.append(entry | dict(tile=tile, us=best["us"], xla_us=usual["us"]))
    return found


def updated(entries: list[dict], measured: list[dict]) -> list[dict]:
    """The library's entries, those of the measured products replaced or left out."""

    def of(entry):
        return tuple(entry[name] for name in KEY)

    seen = set(map(of, measured))
    kept = [entry for entry in entries if of(entry) not in seen]
    return kept + [entry for entry in measured if entry["tile"]]


def _key(settings: dict, nodes: int, tile: Tile | None) -> dict:
    return settings | dict(nodes=nodes, tile=tile and dataclasses.asdict(tile))


def _times(weights: list) -> int:
    return math.ceil(CALLS / len(weights))


def _compile(call, rows, weights):
    """One product and a walk, compiled."""
    single = call.lower(rows, weights[0]).compile()
    return single, walk.lower(call, rows, weights, _times(weights)).compile()


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    rows = timing.Rows("products", options)
    measured = []
    for name, product in products_of(MODELS[options.model]).items():
        if name in (options.products or [name]):
            settings = dict(model=options.model, product=name)
            measured += compare(rows, product, settings, options)
    options.tiles.parent.mkdir(parents=True, exist_ok=True)
    faster = updated(json.loads(MEASURED.read_text()), measured)
    options.tiles.write_text(json.dumps(faster, indent=1) + "\n")
    print(f"wrote {len(faster)} tiles to {options.tiles}", file=sys.stderr)
    return rows.finish()


def parse(arguments: list[str] | None):
    parser = timing.parser(__doc__.splitlines()[0], "products")
    parser.add_argument("--model", choices=MODELS, default="qwen3-8b")
    parser.add_argument("--products", nargs="+", help="names of weights; all by default")
    parser.add_argument("--nodes", type=int, nargs="+", default=[64])
    parser.add_argument("--tiles", type=Path, default=Path("out/gpu/products.json"))
    options = timing.parse(parser, arguments, nodes=[4])
    options.kernel = jax.default_backend() == "gpu"
    return options


if __name__ == "__main__":
    timing.leave(main())
