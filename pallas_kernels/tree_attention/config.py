"""Chooses tiles: one measured on this GPU for a similar shape, or the table's."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path

import jax.numpy as jnp

from pallas_kernels.dispatch import this_card

# Written by `examples/gpu/tune.py`: a list of shapes, each with the card and its fastest tile.
MEASURED = Path(__file__).with_name("tiles.json")
NEAR = 2  # factor in nodes and in capacity within which a measured tile is used

MULTIPROCESSORS = 132  # of an H100 SXM
MIN_TILE = 16  # the smallest side of a Triton matrix product
MAX_SPLITS = 32

BLOCK = 64  # nodes of a program of the Mosaic kernel, and keys of a step
COMPUTING = 2  # warp groups of such a program, for different heads


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """How one call is divided into programs.

    Attributes:
      rows: query rows (nodes x group) of a program.
      keys: cached keys per step of its loop over the prefix.
      nodes: new keys per step of its loop over the tree.
      splits: programs that share the keys of one tile of rows.
      warps: of 32 threads, per program; 4 form the warpgroup of a Hopper matrix product.
      stages: loads in flight in the software pipeline.
    """

    rows: int
    keys: int
    nodes: int
    splits: int
    warps: int
    stages: int

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "stages" and (value < 1 or value & (value - 1)):
                raise ValueError(
                    f"TileConfig.{field.name} is {value}; Triton needs a power of two"
                )
        for name in ("rows", "keys", "nodes"):
            if getattr(self, name) < MIN_TILE:
                raise ValueError(
                    f"TileConfig.{name} is {getattr(self, name)}; "
                    f"a matrix product needs at least {MIN_TILE}"
                )


@dataclasses.dataclass(frozen=True)
class MosaicTile:
    """How one call of the Mosaic kernel is divided into programs.

    Attributes:
      splits: programs that share the keys of one tile of rows.
      steps: blocks of keys, and of values, in flight.
    """

    splits: int
    steps: int


@dataclasses.dataclass(frozen=True)
class Shape:
    """The shape that a tile is chosen for; letters are the project's."""

    batch: int  # B
    nodes: int  # N
    heads: int  # H
    kv_heads: int  # K
    head_dim: int  # D
    capacity: int  # S
    dtype: jnp.dtype  # of the cache, in which scores and outputs are multiplied

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads


# (dtype, head dim, rows) -> keys, most nodes per step, warps, stages. Chosen from a static
# sweep (`python -m pallas_kernels.h100 --sweep`), not timed: no spill, no ptxas warning, and in
# bfloat16 64 KiB or more of keys and values in flight per multiprocessor. Beside each:
# registers per thread, KiB of shared memory.
TILES = {
    ("bfloat16", 256, 16): (32, 16, 4, 3),  # 96, 73
    ("bfloat16", 256, 32): (32, 32, 4, 3),  # 136, 82
    ("bfloat16", 256, 64): (32, 32, 4, 2),  # 232, 96
    ("bfloat16", 256, 128): (32, 32, 8, 3),  # 228, 161
    ("bfloat16", 128, 16): (64, 16, 4, 3),  # 92, 70
    ("bfloat16", 128, 32): (64, 32, 4, 3),  # 168, 76
    ("bfloat16", 128, 64): (64, 64, 4, 3),  # 168, 113
    ("bfloat16", 128, 128): (64, 64, 8, 3),  # 166, 131
    ("bfloat16", 64, 16): (128, 16, 4, 3),  # 88, 70
    ("bfloat16", 64, 32): (128, 32, 4, 3),  # 168, 76
    ("bfloat16", 64, 64): (64, 64, 4, 3),  # 120, 57
    ("bfloat16", 64, 128): (128, 64, 8, 2),  # 182, 80
    ("float32", 256, 16): (16, 16, 8, 2),  # 251, 66
    ("float32", 128, 16): (32, 16, 4, 2),  # 190, 52
    ("float32", 64, 16): (32, 16, 4, 2),  # 125, 28
    ("float32", 64, 32): (32, 32, 4, 2),  # 166, 41
}


def unsupported(shape: Shape) -> str | None:
    """Why the Triton kernel does not support this shape; None if it does."""
    dtypes = sorted({key[0] for key in TILES})
    dims = sorted({key[1] for key in TILES})
    if jnp.dtype(shape.dtype).name not in dtypes:
        return f"the cache is {jnp.dtype(shape.dtype).name}; expected one of {dtypes}"
    if shape.head_dim not in dims:
        return f"the head dim is {shape.head_dim}; expected one of {dims}"
    return None


def unsupported_by_mosaic(shape: Shape, window: int | None = None) -> str | None:
    """Why the Mosaic kernel does not support this shape; None if it does."""
    if jnp.dtype(shape.dtype) != jnp.bfloat16 or shape.head_dim not in (64, 128):
        return f"heads of {shape.head_dim} in {shape.dtype}; expected 64 or 128 in bfloat16"
    if shape.nodes % BLOCK or shape.capacity % BLOCK or shape.group % COMPUTING:
        return (
            f"{shape.nodes} nodes, {shape.capacity} cache rows and groups of {shape.group} "
            f"heads; expected multiples of {BLOCK}, {BLOCK} and {COMPUTING}"
        )
    return None if window is None else f"a window of {window}; expected none"


def choose(
    shape: Shape, card: str | None = None, *, window: int | None = None
) -> TileConfig | MosaicTile:
    """The tile for a shape that the Triton kernel supports, of whichever kernel is faster.

    The Mosaic kernel's only where it was measured on this GPU, for a shape that it supports.

    Args:
      card: the GPU's `device_kind`; this machine's by default.
    """
    return measured(shape, card or this_card(), window) or from_table(shape)


def measured(
    shape: Shape, card: str, window: int | None = None
) -> TileConfig | MosaicTile | None:
    """The tile of the most similar shape measured on a GPU, if near enough, else None.

    Nodes and capacity may differ; cache dtype, head dim, group and the number of key/value
    heads over all rows must be equal.
    """

    def kind(shape: Shape):
        rows = shape.batch * shape.kv_heads
        return jnp.dtype(shape.dtype), shape.head_dim, shape.group, rows

    def distances(other: Shape):
        pairs = (shape.nodes, other.nodes), (shape.capacity, other.capacity)
        return [abs(math.log2(ours / theirs)) for ours, theirs in pairs]

    found = [
        (sum(distances(other)), tile)
        for measured_on, other, tile in read_measured(MEASURED)
        if measured_on == card
        and (isinstance(tile, TileConfig) or not unsupported_by_mosaic(shape, window))
        and kind(other) == kind(shape)
        and max(distances(other)) <= math.log2(NEAR)
    ]
    return min(found, key=lambda pair: pair[0])[1] if found else None


@functools.cache
def read_measured(path: Path) -> tuple[tuple[str, Shape, TileConfig | MosaicTile], ...]:
    """(card, shape, tile) of every entry of a file of measured tiles."""
    return tuple(
        (
            entry["card"],
            Shape(**entry["shape"] | dict(dtype=jnp.dtype(entry["shape"]["dtype"]))),
            (TileConfig if "rows" in entry["tile"] else MosaicTile)(**entry["tile"]),
        )
        for entry in json.loads(path.read_text())
    )


def from_table(shape: Shape) -> TileConfig:
    """The tile of `TILES`, with as many splits as fill an H100."""
    dtype = jnp.dtype(shape.dtype).name
    rows = shape.nodes * shape.group
    sizes = sorted(key[2] for key in TILES if key[:2] == (dtype, shape.head_dim))
    # The smallest tile that holds every row: the cache is then read once.
    fits = [size for size in sizes if size >= rows]
    tile_rows = fits[0] if fits else sizes[-1]
    keys, most_nodes, warps, stages = TILES[dtype, shape.head_dim, tile_rows]
    # A tree smaller than a step would only load masked lanes.
    nodes = min(most_nodes, max(MIN_TILE, 1 << (shape.nodes - 1).bit_length()))
    # Two warpgroups per multiprocessor: one multiplies while the other takes its softmax.
    programs = math.ceil(rows / tile_rows) * shape.batch * shape.kv_heads
    wanted = 2 * MULTIPROCESSORS * 4 // (programs * warps)
    # Fewer than four steps would not fill the pipeline.
    splits = max(1, min(wanted, shape.capacity // (4 * keys), MAX_SPLITS))
    return TileConfig(
        rows=tile_rows,
        keys=keys,
        nodes=nodes,
        splits=1 << (splits.bit_length() - 1),
        warps=warps,
        stages=stages,
    )
