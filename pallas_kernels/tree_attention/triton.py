"""Tree attention as two Triton kernels, written in Pallas.

Prefix and tree form one sequence of key blocks: first the blocks of the cache that hold
committed rows, then those of the new keys. `attend` divides it evenly among `splits` programs
per tile of query rows; blocks past a row's length are skipped. With one split the program
writes the output itself. Otherwise each writes its part of the output and the log of its
softmax's denominator, by which `merge` weighs the parts. Sums are float32 throughout; parts are
written in the cache's dtype, as the output is: in float32 they would be most of attention's
writes.

The softmax runs in base 2. A masked score is -inf while the running peak starts at a finite
floor, so a program that saw no key contributes exp2(floor - peak) = 0 and never a NaN.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.tree_attention.config import TileConfig

WORD_BITS = 32
FLOOR = -1e30
TINY = 1e-30  # below the total of any program that saw a key, which is at least 1
MERGE_ELEMENTS = 4096  # partial outputs that one program of `merge` holds in registers


@functools.partial(
    jax.jit, static_argnames=("scale", "window", "ordered", "tile", "rows", "interpret")
)
def tree_attention_triton(
    q,
    k_cache,
    v_cache,
    lengths,
    k_new,
    v_new,
    ancestors,
    *,
    scale: float,
    depths=None,
    window: int | None = None,
    ordered: bool = False,
    tile: TileConfig,
    rows: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See `tree_attention_reference` for shapes and meaning.

    Everything is read and written in the cache's dtype: queries and new rows are rounded where
    they are computed, and so is the output, which a matrix product in that dtype consumes. In
    float32 separate kernels would write, read and convert all four.

    Args:
      ordered, rows: see `tree_attention`.
      tile: see `choose`.
      interpret: run on the CPU, program by program, to check numbers. Shapes, bounds and
        races are not checked: `tests/pallas_kernels/ttir_check.py` does that.
    """
    batch, n, heads, dim = q.shape
    kv_heads, capacity = k_cache.shape[1], k_cache.shape[2]
    group = heads // kv_heads
    queries, dtype = batch * n * heads, k_cache.dtype
    # Rows are addressed flat, as they lie in memory: query (b, node, head), new key
    # (b, node, kv head), cached key (b, kv head, position).
    inputs = [
        lengths,
        q.astype(dtype).reshape(queries, dim),
        k_cache.reshape(-1, dim),
        v_cache.reshape(-1, dim),
        k_new.astype(dtype).reshape(-1, dim),
        v_new.astype(dtype).reshape(-1, dim),
        lax.bitcast_convert_type(ancestors, jnp.int32).reshape(batch * n, -1),
    ]
    if window is not None:
        inputs.append(depths.reshape(-1))
    out = jax.ShapeDtypeStruct((queries, dim), dtype)
    partials = (
        jax.ShapeDtypeStruct((tile.splits, queries, dim), dtype),
        jax.ShapeDtypeStruct((tile.splits, queries), jnp.float32),
    )
    result = pl.pallas_call(
        functools.partial(
            attend,
            tile=tile,
            scale=scale * math.log2(math.e),
            n=n,
            group=group,
            kv_heads=kv_heads,
            capacity=capacity,
            window=window,
            ordered=ordered,
            products=products_of(dtype, interpret),
        ),
        out_shape=out if tile.splits == 1 else partials,
        grid=(pl.cdiv(n * group, tile.rows), batch * kv_heads, tile.splits),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="tree_attention",
    )(*inputs)
    padded = queries if rows is None else rows * heads
    if tile.splits > 1:
        result = join(*result, padded, interpret=interpret)
    elif padded > queries:
        result = jnp.pad(result, ((0, padded - queries), (0, 0)))
    shape = q.shape if rows is None else (rows, heads, dim)
    return result.reshape(shape).astype(q.dtype)


def join(
    parts: jax.Array,
    logs: jax.Array,
    padded: int,
    place: Callable[[jax.Array], jax.Array] = lambda row: row,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Joins the splits [S, Q, D] of queries, whose logs are [S, Q]: [padded, D].

    Args:
      place: where the log of a query is.
    """
    splits, _, dim = parts.shape
    per_program = max(1, MERGE_ELEMENTS // (splits * dim))
    return pl.pallas_call(
        functools.partial(merge, rows=per_program, place=place),
        out_shape=jax.ShapeDtypeStruct((padded, dim), parts.dtype),
        grid=(pl.cdiv(padded, per_program),),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="tree_attention_merge",
    )(parts, logs)


def products_of(dtype, interpret: bool):
    """Precision of matrix products: float32 is split in three TF32 terms, which keep 21 bits.

    Plain TF32 keeps 10, and exact float32 has no tensor core: its tiles spill. The CPU knows
    neither, so interpret mode multiplies in float32.
    """
    if dtype != jnp.float32:
        return None
    return lax.Precision.HIGHEST if interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3


def attend(
    lengths_ref,
    q_ref,
    k_cache_ref,
    v_cache_ref,
    k_new_ref,
    v_new_ref,
    ancestors_ref,
    *refs,
    tile: TileConfig,
    scale: float,
    n: int,
    group: int,
    kv_heads: int,
    capacity: int,
    window: int | None,
    ordered: bool,
    products,
):
    """One tile of query rows of one key/value head against one split of its keys."""
    depths_ref, refs = (None, refs) if window is None else (refs[0], refs[1:])
    dim, words = q_ref.shape[-1], ancestors_ref.shape[-1]
    lane = jnp.arange(dim)[None, :]
    b, kv_head = pl.program_id(1) // kv_heads, pl.program_id(1) % kv_heads
    split = pl.program_id(2)
    length = lengths_ref[b]

    row = pl.program_id(0) * tile.rows + jnp.arange(tile.rows)  # of the N * G of this head
    node = row // group
    real = node < n
    query = (b * n + node) * kv_heads * group + kv_head * group + row % group
    whole_row = jnp.broadcast_to(real[:, None], (tile.rows, dim))

    def rows_of(ref, index, exists):
        mask = jnp.broadcast_to(exists[:, None], (index.size, dim))
        return plgpu.load(ref.at[index[:, None], lane], mask=mask, other=0.0)

    q = rows_of(q_ref, query, real)
    if window is not None:
        depth = plgpu.load(depths_ref.at[b * n + node], mask=real, other=0)
        oldest = length + depth - window + 1

    def step(carry, k, v, visible):
        out, peak, total = carry
        scores = scale * plgpu.dot(q, k.T, precision=products)
        scores = jnp.where(visible, scores, -jnp.inf)
        new_peak = jnp.maximum(peak, scores.max(1))
        decay = jnp.exp2(peak - new_peak)
        p = jnp.exp2(scores - new_peak[:, None])
        out = out * decay[:, None] + plgpu.dot(p.astype(v.dtype), v, precision=products)
        return out, new_peak, total * decay + p.sum(1)

    def prefix_step(i, carry):
        position = i * tile.keys + jnp.arange(tile.keys)
        committed = position < length
        index = (b * kv_heads + kv_head) * capacity + position
        visible = jnp.broadcast_to(committed[None, :], (tile.rows, tile.keys))
        if window is not None:
            visible = visible & (position[None, :] >= oldest[:, None])
        k, v = rows_of(k_cache_ref, index, committed), rows_of(v_cache_ref, index, committed)
        return step(carry, k, v, visible)

    def tree_step(i, carry):
        column = jnp.arange(tile.nodes)
        other = i * tile.nodes + column
        exists = other < n
        index = (b * n + other) * kv_heads + kv_head
        # Each row's words of ancestor bits that cover these columns, one load per word.
        bits = jnp.zeros((tile.rows, tile.nodes), jnp.int32)
        for w in range(pl.cdiv(tile.nodes, WORD_BITS)):
            word = jnp.broadcast_to(i * tile.nodes // WORD_BITS + w, node.shape)
            bits_w = plgpu.load(
                ancestors_ref.at[b * n + node, word], mask=real & (word < words), other=0
            )
            bits = jnp.where(column[None, :] // WORD_BITS == w, bits_w[:, None], bits)
        # A step of 16 nodes starts in the middle of every other word.
        visible = (bits >> (other % WORD_BITS)[None, :]) & 1 == 1
        visible = visible & exists[None, :]
        if window is not None:
            far = plgpu.load(depths_ref.at[b * n + other], mask=exists, other=0)
            visible = visible & ((length + far)[None, :] >= oldest[:, None])
        return step(
            carry, rows_of(k_new_ref, index, exists), rows_of(v_new_ref, index, exists), visible
        )

    # Blocks of the prefix and then of the tree that any row sees, shared evenly.
    first = 0 if window is None else jnp.maximum(length - window + 1, 0) // tile.keys
    prefix = pl.cdiv(length, tile.keys) - first
    seen = n
    if ordered:
        seen = jnp.minimum(pl.cdiv((pl.program_id(0) + 1) * tile.rows, group), n)
    tree = pl.cdiv(seen, tile.nodes)
    share = pl.cdiv(prefix + tree, tile.splits)
    start = split * share
    stop = jnp.minimum(start + share, prefix + tree)
    carry = (
        jnp.zeros((tile.rows, dim), jnp.float32),
        jnp.full((tile.rows,), FLOOR, jnp.float32),
        jnp.zeros((tile.rows,), jnp.float32),
    )
    carry = lax.fori_loop(first + start, first + jnp.minimum(stop, prefix), prefix_step, carry)
    carry = lax.fori_loop(jnp.maximum(start - prefix, 0), stop - prefix, tree_step, carry)

    out, peak, total = carry
    total = jnp.maximum(total, TINY)
    out = (out / total[:, None]).astype(refs[0].dtype)
    if tile.splits == 1:
        (out_ref,) = refs
        plgpu.store(out_ref.at[query[:, None], lane], out, mask=whole_row)
        return
    out_ref, log_ref = refs
    plgpu.store(out_ref.at[split, query[:, None], lane], out, mask=whole_row)
    plgpu.store(log_ref.at[split, query], peak + jnp.log2(total), mask=real)


def merge(out_ref, log_ref, result_ref, *, rows: int, place):
    """Joins the splits of `rows` queries, weighing each part by its share of the softmax.

    Results past the last query are zeros: equal shares of nothing.
    """
    splits, queries, dim = out_ref.shape
    row = pl.program_id(0) * rows + jnp.arange(rows)
    split = jnp.arange(splits)[:, None]
    exists = jnp.broadcast_to(row < queries, (splits, rows))
    log = plgpu.load(log_ref.at[split, place(row)[None, :]], mask=exists, other=FLOOR)
    weight = jnp.exp2(log - log.max(0)[None, :])  # [splits, rows]
    lane = jnp.arange(dim)
    out = plgpu.load(
        out_ref.at[split[..., None], row[None, :, None], lane[None, None, :]],
        mask=jnp.broadcast_to(exists[..., None], (splits, rows, dim)),
        other=0.0,
    )
    out = (out.astype(jnp.float32) * weight[..., None]).sum(0) / weight.sum(0)[:, None]
    plgpu.store(
        result_ref.at[row[:, None], lane[None, :]],
        out.astype(result_ref.dtype),
        mask=jnp.broadcast_to((row < result_ref.shape[0])[:, None], (rows, dim)),
    )
