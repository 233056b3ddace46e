"""Finds the fastest tiles of tree attention on this card.

    python examples/gpu/tune.py
    cp out/gpu/tiles.json pallas_kernels/tree_attention/tiles.json

Tiles, warps and stages first, at the longest context and with the table's number of splits;
then, at every context, the best of them with other splits and steps of new keys. Each
candidate walks several caches, more bytes than the card's second-level cache holds, as the
layers of a model do. A winner must agree with the definition. The Mosaic kernel, which has not
run on a GPU yet, follows when Triton's rows and tiles are written. Without a GPU the Triton
kernel is interpreted on small shapes: times mean nothing.
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
import numpy as np
import timing

from jaxspec.trees.tree import chain_nodes
from pallas_kernels.tree_attention.config import (
    MEASURED,
    MIN_TILE,
    MosaicTile,
    Shape,
    TileConfig,
    choose,
    from_table,
    unsupported_by_mosaic,
)
from pallas_kernels.tree_attention.mosaic import tree_attention_mosaic
from pallas_kernels.tree_attention.reference import tree_attention_reference
from pallas_kernels.tree_attention.triton import tree_attention_triton

SECOND_LEVEL = 60e6  # bytes; more than the GPU's L2 cache
SHARED_MEMORY = 227 * 1024  # bytes that one program may have
REGISTERS = 200  # of a thread, for scores and outputs in float32: above, they spill
KEPT = 2  # best tiles, which are tried with other splits
SPLITS = (1, 2, 4, 8, 16, 32, 64)
CALLS = 64  # fewest calls timed in one program
KERNELS = {"triton": TileConfig, "mosaic": MosaicTile}


def inputs(shape: Shape) -> tuple:
    """Queries, caches with a full prefix, and a chain for a tree."""
    keys = iter(jax.random.split(jax.random.key(0), 100))
    draw = lambda *size: jax.random.normal(next(keys), size, shape.dtype)  # noqa: E731
    new = (shape.batch, shape.nodes, shape.kv_heads, shape.head_dim)
    cache = (shape.batch, shape.kv_heads, shape.capacity, shape.head_dim)
    count = (
        1 if jax.default_backend() != "gpu" else math.ceil(SECOND_LEVEL / cache_bytes(shape))
    )
    return (
        draw(shape.batch, shape.nodes, shape.heads, shape.head_dim),
        tuple((draw(*cache), draw(*cache)) for _ in range(count)),
        jnp.full(shape.batch, shape.capacity, jnp.int32),
        draw(*new),
        draw(*new),
        chain_nodes(shape.batch, shape.nodes)[1],
    )


def cache_bytes(shape: Shape) -> int:
    rows = shape.batch * shape.kv_heads * shape.capacity
    return 2 * rows * shape.head_dim * jnp.dtype(shape.dtype).itemsize


def attend(q, cache, lengths, k_new, v_new, ancestors, tile: TileConfig | MosaicTile):
    arrays = q, *cache, lengths, k_new, v_new, ancestors
    options = dict(scale=q.shape[-1] ** -0.5, ordered=True, tile=tile)
    if isinstance(tile, MosaicTile):
        return tree_attention_mosaic(*arrays, **options)
    interpret = jax.default_backend() != "gpu"
    return tree_attention_triton(*arrays, **options, interpret=interpret)


@functools.partial(jax.jit, static_argnames=("tile", "loops"))
def walk(q, caches, *rest, tile: TileConfig, loops: int):
    """Attends to cache after cache; each output is the next query, so that all calls run."""

    def call(_, q):
        for cache in caches:
            q = attend(q, cache, *rest, tile)
        return q

    return jax.lax.fori_loop(0, loops, call, q)


def loops(shape: Shape, caches: int) -> int:
    return 1 if jax.default_backend() != "gpu" else math.ceil(CALLS / caches)


def candidates(kernel: str, shape: Shape) -> list[TileConfig | MosaicTile]:
    """The tile in use, if it is the kernel's, and others that may be fast."""
    tiles = of_triton(shape) if kernel == "triton" else of_mosaic(shape)
    return list(dict.fromkeys([*in_use(kernel, shape), *tiles]))


def in_use(kernel: str, shape: Shape) -> list[TileConfig | MosaicTile]:
    tile = choose(shape)
    return [tile] if isinstance(tile, KERNELS[kernel]) else []


def of_triton(shape: Shape) -> list[TileConfig]:
    """Tiles with the table's splits, without those that cannot be fast."""
    table = from_table(shape)
    rows = shape.nodes * shape.group
    most = max(MIN_TILE, min(128, 1 << (rows - 1).bit_length()))
    tiles = [table]
    options = itertools.product((16, 32, 64, 128), (32, 64, 128), (4, 8), (2, 3, 4))
    for tile_rows, keys, warps, stages in options:
        # Smaller tiles of rows read the cache more often, larger ones are padding.
        if not most // 2 <= tile_rows <= most:
            continue
        tile = TileConfig(tile_rows, keys, table.nodes, table.splits, warps, stages)
        if fits(tile, shape):
            tiles.append(tile)
    return tiles


def of_mosaic(shape: Shape) -> list[MosaicTile]:
    """The Mosaic kernel's tiles, where there is a GPU and the kernel takes the shape."""
    if jax.default_backend() != "gpu" or unsupported_by_mosaic(shape):
        return []
    most = max(1, shape.capacity // 128)
    return [MosaicTile(splits, 4) for splits in SPLITS if splits <= most]


def fits(tile: TileConfig, shape: Shape) -> bool:
    """Whether scores and outputs fit registers, and loads in flight shared memory."""
    size = jnp.dtype(shape.dtype).itemsize
    registers = tile.rows * (shape.head_dim + 1.5 * tile.keys) / (32 * tile.warps)
    loads = tile.stages * 2 * tile.keys * shape.head_dim * size
    queries = tile.rows * shape.head_dim * size
    return registers <= REGISTERS and loads + queries <= SHARED_MEMORY


def variations(tile: TileConfig | MosaicTile, shape: Shape) -> list[TileConfig | MosaicTile]:
    """The same tile with other splits, and other steps of new keys or of loads in flight."""
    if isinstance(tile, MosaicTile):
        others = of_mosaic(shape)
        return others + [dataclasses.replace(other, steps=3) for other in others]
    usual, most = from_table(shape).splits, max(1, shape.capacity // tile.keys)
    splits = [n for n in SPLITS if usual / 4 <= n <= min(most, 4 * usual)]
    tile = dataclasses.replace(tile, splits=usual)
    made = [dataclasses.replace(tile, splits=n) for n in splits]
    if tile.nodes > MIN_TILE:
        made.append(dataclasses.replace(tile, nodes=tile.nodes // 2))
    return made


class Tuning:
    """One shape, the times of a kernel's tiles, and why others were refused."""

    def __init__(self, shape: Shape):
        self.shape, self.inputs, self.ms, self.refused = shape, inputs(shape), {}, {}
        self.loops = loops(shape, len(self.inputs[1]))

    def compile(self, tile: TileConfig):
        return walk.lower(*self.inputs, tile=tile, loops=self.loops).compile()

    def time(self, tile: TileConfig, program) -> None:
        """Records a time, or why the compiler or the GPU refuses a tile."""
        try:
            found = timing.milliseconds(
                functools.partial(program(), *self.inputs), self.loops * len(self.inputs[1]), 5
            )
            self.ms[tile] = found["ms"]
        except TimeoutError:
            pass  # it was not compiled in time
        except Exception as error:  # too much shared memory, say; the next tile may work
            self.refused[tile] = f"{type(error).__name__}: {error}"[:200]

    def best(self, count: int) -> list[TileConfig | MosaicTile]:
        return sorted(self.ms, key=self.ms.get)[:count]

    def error(self, tile: TileConfig) -> float:
        """Error of a tile's output, relative to the reference in float32."""
        q, caches, *rest = self.inputs
        found = attend(q, caches[0], *rest, tile)
        lengths, k_new, v_new, ancestors = rest
        wide = [x.astype(jnp.float32) for x in (q, *caches[0])]
        with jax.default_matmul_precision("highest"):
            right = tree_attention_reference(
                *wide,
                lengths,
                k_new.astype(jnp.float32),
                v_new.astype(jnp.float32),
                ancestors,
                scale=q.shape[-1] ** -0.5,
            )
        found, right = np.asarray(found, np.float64), np.asarray(right, np.float64)
        return float(np.linalg.norm(found - right) / np.linalg.norm(right))

    def row(self) -> dict:
        """The fastest tile that agrees with the definition.

        Raises:
          TimeoutError: none was tried in time.
          ValueError: all were refused, or the fastest disagrees.
        """
        if not self.ms and self.refused:
            raise ValueError(f"the tiles that were tried were refused: {self.refused}")
        if not self.ms:
            raise TimeoutError("the time was over before a tile was timed")
        (tile,) = self.best(1)
        error = self.error(tile)
        if not error < 1e-2:
            raise ValueError(f"{tile} is off by {error:.1e}, relative to the definition")
        chosen = self.ms.get(choose(self.shape))
        return dict(
            ms=self.ms[tile],
            chosen_ms=chosen,
            cache_gb_s=round(cache_bytes(self.shape) / self.ms[tile] / 1e6),
            difference=error,
            tile=dataclasses.asdict(tile),
            tried=[
                [*dataclasses.astuple(tile), result]
                for tile, result in (self.ms | self.refused).items()
            ],
        )


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    heads, kv_heads, dim = options.heads, options.kv_heads, options.head_dim
    sizes = itertools.product(options.batch, options.nodes, options.contexts)
    shapes = [
        Shape(batch, nodes, heads, kv_heads, dim, context, jnp.dtype(options.dtype))
        for batch, nodes, context in sizes
    ]
    rows = timing.Rows("tune", options)
    found = []
    for kernel in options.kernels:
        found += tuned(kernel, shapes, rows, options.threads)
        write(found, options.tiles)
    return rows.finish()


def tuned(kernel: str, shapes: list[Shape], rows: timing.Rows, threads: int) -> list[dict]:
    """Writes a row per shape that a kernel takes; returns their entries for the tiles' file."""
    settings = {
        shape: dict(kernel=kernel) | described(shape)
        for shape in shapes
        if candidates(kernel, shape)
    }
    tunings = [Tuning(shape) for shape, own in settings.items() if not rows.known(**own)]
    longest = {}  # by all but the context
    for tuning in tunings:
        longest[tuning.shape.batch, tuning.shape.nodes] = max(
            tuning,
            longest.get((tuning.shape.batch, tuning.shape.nodes), tuning),
            key=lambda tuning: tuning.shape.capacity,
        )
    search([(t, candidates(kernel, t.shape)) for t in longest.values()], rows, threads)
    refined = []
    for tuning in tunings:
        best = longest[tuning.shape.batch, tuning.shape.nodes].best(KEPT)
        tiles = [other for tile in best for other in variations(tile, tuning.shape)]
        refined.append((tuning, [*in_use(kernel, tuning.shape), *tiles]))
    search(refined, rows, threads)
    by_shape = {tuning.shape: tuning for tuning in tunings}
    found = []
    for shape, own in settings.items():
        tuning = by_shape.get(shape)
        row = rows.measure(tuning and tuning.row, begun=bool(tuning and tuning.ms), **own)
        if row:
            entry = dict(shape=described(shape), tile=row["tile"], ms=row["ms"])
            found.append(dict(card=row["card"]) | entry)
    return found


def write(found: list[dict], path: Path) -> None:
    """Writes each shape's fastest tile, and those of the library for other shapes."""
    fastest = {}
    for entry in json.loads(MEASURED.read_text()) + sorted(found, key=lambda x: -x["ms"]):
        fastest[entry["card"], tuple(entry["shape"].items())] = entry
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(list(fastest.values()), indent=1) + "\n")
    print(f"wrote {len(fastest)} tiles to {path}", file=sys.stderr)


def search(
    tried: list[tuple[Tuning, list[TileConfig]]], rows: timing.Rows, threads: int
) -> None:
    """Compiles tiles of all shapes in parallel, then times them."""
    jobs = {
        (tuning, tile): functools.partial(tuning.compile, tile)
        for tuning, tiles in tried
        for tile in dict.fromkeys(tiles)
        if tile not in tuning.ms | tuning.refused
    }
    programs = timing.compile_all(jobs, threads=threads, seconds=rows.left)
    for (tuning, tile), program in programs.items():
        if rows.left > 0:
            tuning.time(tile, program)


def described(shape: Shape) -> dict:
    return dataclasses.asdict(shape) | dict(dtype=jnp.dtype(shape.dtype).name)


def parse(arguments: list[str] | None):
    parser = timing.parser(__doc__.splitlines()[0], "tune")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 32_768])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--tiles", type=Path, default=Path("out/gpu/tiles.json"))
    parser.add_argument("--model", choices=("tiny",), help="small shapes, for a CPU")
    heads = dict(heads=4, kv_heads=2, head_dim=64)
    return timing.parse(parser, arguments, nodes=[4], contexts=[64], dtype="float32", **heads)


if __name__ == "__main__":
    timing.leave(main())
