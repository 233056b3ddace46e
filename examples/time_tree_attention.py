"""Times tree attention on a GPU, each implementation beside the bytes it must read.

    python examples/time_tree_attention.py [--nodes 1 64 256] [--contexts 4096 32768]

Every time is the median of repeated calls on the device, after a first call that compiles.
"""

import argparse
import functools
import statistics
import sys
import time

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from jaxspec.trees.tree import causal_bits
from pallas_kernels.tree_attention import tree_attention
from pallas_kernels.tree_attention.config import Shape


def make_arrays(shape: Shape) -> tuple:
    """Random inputs with a full prefix, and a chain for a tree."""
    q, k_cache, v_cache, k_new, v_new = jax.random.split(jax.random.key(0), 5)
    cache = (shape.batch, shape.kv_heads, shape.capacity, shape.head_dim)
    new = (shape.batch, shape.nodes, shape.kv_heads, shape.head_dim)
    queries = (shape.batch, shape.nodes, shape.heads, shape.head_dim)
    bits = causal_bits(shape.nodes)
    return (
        jax.random.normal(q, queries, shape.dtype),
        jax.random.normal(k_cache, cache, shape.dtype),
        jax.random.normal(v_cache, cache, shape.dtype),
        jnp.full(shape.batch, shape.capacity, jnp.int32),
        jax.random.normal(k_new, new, shape.dtype),
        jax.random.normal(v_new, new, shape.dtype),
        jnp.broadcast_to(bits, (shape.batch, *bits.shape)),
    )


@functools.partial(jax.jit, static_argnames=("implementation", "tile", "repeats"))
def run(arrays, implementation=None, tile=None, repeats=20):
    """Calls in a chain, each one's output the next one's query, so that none is left out."""

    def call(_, q):
        return tree_attention(
            q, *arrays[1:], scale=1.0, implementation=implementation, tile=tile
        )

    return jax.lax.fori_loop(0, repeats, call, arrays[0])


def milliseconds(arrays, *, repeats: int = 20, samples: int = 7, **options) -> float:
    """Median time of one call."""
    run(arrays, repeats=repeats, **options).block_until_ready()
    times = []
    for _ in range(samples):
        start = time.perf_counter()
        run(arrays, repeats=repeats, **options).block_until_ready()
        times.append((time.perf_counter() - start) / repeats)
    return 1e3 * statistics.median(times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 16, 64, 128, 256])
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 32_768])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    options = parser.parse_args()
    if jax.default_backend() != "gpu":
        print("there is no GPU here; nothing was timed", file=sys.stderr)
        return 1

    table = Table(title=f"{jax.devices()[0].device_kind}, bfloat16, ms per call")
    for column in ("nodes", "context", "xla", "triton", "GB/s of cache, triton"):
        table.add_column(column, justify="right")
    for context in options.contexts:
        for nodes in options.nodes:
            shape = Shape(
                options.batch,
                nodes,
                options.heads,
                options.kv_heads,
                options.head_dim,
                context,
                jnp.dtype("bfloat16"),
            )
            arrays = make_arrays(shape)
            xla, triton = (milliseconds(arrays, implementation=i) for i in ("xla", "triton"))
            rate = (arrays[1].nbytes + arrays[2].nbytes) / triton / 1e6
            table.add_row(
                str(nodes), str(context), f"{xla:.4f}", f"{triton:.4f}", f"{rate:.0f}"
            )
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
