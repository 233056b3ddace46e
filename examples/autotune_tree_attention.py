"""Times every tile that compiles for a shape on this GPU and writes the best ones as JSON.

    python examples/autotune_tree_attention.py --output tiles.json

Pass a result to `tree_attention(..., tile=TileConfig(**tile))`, or put it in the table of
`pallas_kernels/tree_attention/config.py`, whose tiles were chosen without timing any.
"""

import argparse
import dataclasses
import itertools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from time_tree_attention import make_arrays, milliseconds
from tqdm import tqdm

from pallas_kernels.tree_attention.config import MIN_TILE, Shape, TileConfig, choose


def candidates(shape: Shape) -> list[TileConfig]:
    """Tiles around the chosen one; those that do not compile are found out."""
    most = max(MIN_TILE, min(128, 1 << (shape.nodes * shape.group - 1).bit_length()))
    step = min(64, max(MIN_TILE, 1 << (shape.nodes - 1).bit_length()))
    tiles = [choose(shape)]
    for tile_rows, keys, splits, warps, stages in itertools.product(
        (16, 32, 64, 128), (32, 64, 128), (1, 2, 4, 8, 16, 32), (4, 8), (2, 3, 4)
    ):
        # Smaller tiles of rows read the cache more often, larger ones are padding.
        if most // 4 <= tile_rows <= most and splits * keys <= shape.capacity:
            tiles.append(TileConfig(tile_rows, keys, step, splits, warps, stages))
    return list(dict.fromkeys(tiles))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 32_768])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--output", type=Path, default=Path("tiles.json"))
    options = parser.parse_args()
    if jax.default_backend() != "gpu":
        print("there is no GPU here; nothing was tuned", file=sys.stderr)
        return 1

    found = []
    sizes = itertools.product(options.batch, options.nodes, options.contexts)
    for batch, nodes, context in sizes:
        shape = Shape(
            batch,
            nodes,
            options.heads,
            options.kv_heads,
            options.head_dim,
            context,
            jnp.dtype("bfloat16"),
        )
        arrays, timed = make_arrays(shape), []
        for tile in tqdm(candidates(shape), desc=f"B={batch} N={nodes} S={context}"):
            try:
                timed.append((milliseconds(arrays, implementation="triton", tile=tile), tile))
            except jax.errors.JaxRuntimeError:  # too much shared memory
                continue
        best, tile = min(timed, key=lambda pair: pair[0])
        untuned = next(ms for ms, tile in timed if tile == choose(shape))
        found.append(
            dataclasses.asdict(shape)
            | dict(
                dtype=shape.dtype.name,
                tile=dataclasses.asdict(tile),
                milliseconds=best,
                chosen_milliseconds=untuned,
                device=jax.devices()[0].device_kind,
            )
        )
        options.output.write_text(json.dumps(found, indent=1))
    print(f"wrote {len(found)} tiles to {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
