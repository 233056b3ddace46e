"""Inputs of tree attention, and what it must return, written as slowly as it is defined."""

import dataclasses

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np

from pallas_kernels.tree_attention.config import Shape, TileConfig, choose


@dataclasses.dataclass(frozen=True)
class Case:
    """Static shapes of one call; what varies within them is for `make_inputs`."""

    shape: Shape
    tile: TileConfig
    window: int | None = None
    activations: str = "float32"  # dtype of queries and of new keys and values


def case(batch, nodes, heads, kv_heads, dim, capacity, dtype, tile, **options):
    shape = Shape(batch, nodes, heads, kv_heads, dim, capacity, jnp.dtype(dtype))
    return Case(shape, TileConfig(*tile), **options)


# Tiles are rows, keys, nodes, splits, warps, stages.
CASES = {
    "decode": case(2, 1, 4, 2, 64, 96, "float32", (16, 32, 16, 2, 4, 2)),
    "odd group": case(2, 7, 6, 2, 64, 70, "float32", (16, 32, 16, 1, 4, 2)),
    "tree of several steps": case(1, 75, 4, 2, 64, 96, "float32", (32, 32, 32, 4, 4, 2)),
    "half words": case(1, 40, 2, 1, 64, 64, "float32", (32, 32, 16, 2, 4, 2)),
    "window": case(2, 33, 4, 2, 64, 128, "float32", (16, 32, 32, 2, 4, 2), window=20),
    "window inside the tree": case(
        1, 20, 2, 2, 64, 64, "float32", (16, 32, 16, 1, 4, 2), window=3
    ),
    "more splits than blocks": case(1, 4, 4, 2, 64, 64, "float32", (16, 32, 16, 8, 4, 2)),
    "bfloat16": case(2, 64, 8, 2, 128, 128, "bfloat16", (128, 64, 64, 2, 8, 3)),
    "bfloat16 throughout": case(
        1, 16, 4, 1, 64, 100, "bfloat16", (64, 64, 16, 1, 4, 3), activations="bfloat16"
    ),
    "heads of 256": case(1, 24, 12, 2, 256, 100, "bfloat16", (64, 32, 32, 2, 4, 2)),
    "512 nodes": case(1, 512, 2, 1, 64, 200, "bfloat16", (128, 128, 64, 2, 8, 2)),
}


@st.composite
def chosen_cases(draw):
    """Any small shape, cut as the library cuts it."""
    kv_heads = draw(st.sampled_from([1, 2, 4]))
    shape = Shape(
        batch=draw(st.integers(1, 3)),
        nodes=draw(st.integers(1, 48)),
        heads=kv_heads * draw(st.integers(1, 5)),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([64, 128, 256])),
        capacity=draw(st.integers(1, 600)),
        dtype=jnp.dtype(draw(st.sampled_from(["bfloat16", "float32"]))),
    )
    window = draw(st.none() | st.integers(1, shape.capacity + 8))
    return Case(shape, choose(shape), window)


def edge_lengths(case: Case):
    """Committed rows of each sequence, a strategy: nothing, one, the edges of a block, full."""
    full, block = case.shape.capacity, case.tile.keys
    lengths = {0, 1, block - 1, block, block + 1, full - 1, full}
    one = st.sampled_from(sorted(length for length in lengths if length <= full))
    return st.tuples(*[one] * case.shape.batch)


def make_inputs(case: Case, lengths, *, seed=0, depth=0.5):
    """Arrays for `tree_attention` by name, over random trees.

    Args:
      depth: how often a node is the child of the one before it, and not of any earlier one:
        1 makes a chain, 0 a bush.
    """
    s = case.shape
    rng = np.random.default_rng(seed)
    seen = np.zeros((s.batch, s.nodes, s.nodes), bool)
    depths = np.zeros((s.batch, s.nodes), np.int32)
    for b in range(s.batch):
        for i in range(1, s.nodes):
            parent = i - 1 if rng.random() < depth else rng.integers(i)
            seen[b, i] = seen[b, parent] | (np.arange(s.nodes) == parent)
            depths[b, i] = depths[b, parent] + 1
    seen |= np.eye(s.nodes, dtype=bool)

    def normal(dtype, *shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    cache = (s.batch, s.kv_heads, s.capacity, s.head_dim)
    new = (s.batch, s.nodes, s.kv_heads, s.head_dim)
    return dict(
        q=normal(case.activations, s.batch, s.nodes, s.heads, s.head_dim),
        k_cache=normal(s.dtype, *cache),
        v_cache=normal(s.dtype, *cache),
        lengths=jnp.asarray(lengths, jnp.int32),
        k_new=normal(case.activations, *new),
        v_new=normal(case.activations, *new),
        ancestors=pack(seen),
        depths=jnp.asarray(depths),
    )


def pack(seen: np.ndarray):
    """bool [B, N, N] -> uint32 [B, N, ceil(N / 32)]; bit j of word w is column 32 w + j."""
    padded = np.pad(seen, ((0, 0), (0, 0), (0, -seen.shape[-1] % 32)))
    little = np.packbits(padded, axis=-1, bitorder="little")
    return jnp.asarray(little.view(np.uint32))


def oracle(q, k_cache, v_cache, lengths, k_new, v_new, ancestors, depths, *, scale, window):
    """Float64, one query at a time: softmax over the rows it sees, one matrix of values."""
    narrow = lambda x: np.asarray(x.astype(k_cache.dtype), np.float64)  # noqa: E731
    q, k_cache, v_cache, k_new, v_new = map(narrow, (q, k_cache, v_cache, k_new, v_new))
    lengths, ancestors, depths = map(np.asarray, (lengths, ancestors, depths))
    batch, n, heads, _ = q.shape
    group = heads // k_cache.shape[1]
    out = np.zeros(q.shape)
    for b, i, h in np.ndindex(batch, n, heads):
        position = lengths[b] + depths[b, i]
        first = 0 if window is None else max(0, position - window + 1)
        nodes = [
            j
            for j in range(n)
            if ancestors[b, i, j // 32] >> (j % 32) & 1 and lengths[b] + depths[b, j] >= first
        ]
        cached = slice(first, max(first, lengths[b]))
        keys = np.concatenate([k_cache[b, h // group, cached], k_new[b, nodes, h // group]])
        values = np.concatenate([v_cache[b, h // group, cached], v_new[b, nodes, h // group]])
        scores = scale * keys @ q[b, i, h]
        weights = np.exp(scores - scores.max())
        out[b, i, h] = weights @ values / weights.sum()
    return out


def tolerance(case: Case, *, tensor_cores: bool = False) -> float:
    """Scores, and their errors, are sums over a head. In bfloat16 weights, the outputs of each
    split and the merged output are rounded. On tensor cores three TF32 terms keep 21 bits or
    more of float32's 24, and exp2 is approximate."""
    if case.shape.dtype == jnp.float32:
        return (3e-5 if tensor_cores else 3e-6) * max(1, case.shape.head_dim / 128)
    # Values of up to 5, two roundings of up to 2^-8; of weights less.
    return (5 if tensor_cores else 1) * 2 * 2**-8 * 5
