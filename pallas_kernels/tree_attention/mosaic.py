"""Tree attention in Mosaic GPU for Hopper, for trees of whole blocks of 64 nodes.

As in the Triton kernel, the blocks of a row's prefix and then those of its new keys form one
sequence, divided evenly among `splits` programs, and the parts are joined by the logs of their
denominators. A program holds 64 nodes of two or four query heads of one key/value head, so
that it reads a block of keys once for all of them. One warp group loads blocks by the tensor
memory accelerator, `steps` ahead; two compute, and take turns at the tensor cores: one
multiplies while the other takes its softmax.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.tree_attention.config import BLOCK, COMPUTING, MosaicTile
from pallas_kernels.tree_attention.reference import related_nodes
from pallas_kernels.tree_attention.triton import FLOOR, TINY, join


def heads_together(group: int) -> int:
    """Query heads of one warp group."""
    return 2 if group % (2 * COMPUTING) == 0 else 1


def tree_attention_mosaic(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    lengths: jax.Array,
    k_new: jax.Array,
    v_new: jax.Array,
    ancestors: jax.Array,
    *,
    scale: float,
    tile: MosaicTile,
    rows: int | None = None,
    **options,
) -> jax.Array:
    """See `tree_attention_reference` for shapes and meaning; cache rows must be finite.

    Args:
      rows: see `tree_attention`.
      options: of `plgpu.kernel`.
    """
    batch, n, heads, dim = q.shape
    kv_heads, dtype = k_cache.shape[1], k_cache.dtype
    group = heads // kv_heads
    together = heads_together(group)
    program = functools.partial(
        _program,
        tile=tile,
        scale=scale * math.log2(math.e),
        together=together,
        interpreted=options.get("interpret") is not None,
    )
    made = plgpu.kernel(
        program,
        out_type=(
            jax.ShapeDtypeStruct((tile.splits, batch, n, heads, dim), dtype),
            jax.ShapeDtypeStruct((tile.splits, batch, heads, n), jnp.float32),
        ),
        grid=(n // BLOCK * group // (COMPUTING * together), batch * kv_heads, tile.splits),
        grid_names=("tile", "kv_head", "split"),
        num_threads=COMPUTING + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **options,
    )
    hidden = jnp.where(related_nodes(ancestors, n), 0.0, -jnp.inf).astype(dtype)
    nodes = (x.astype(dtype) for x in (q, k_new, v_new))
    parts, logs = made(lengths, next(nodes), k_cache, v_cache, *nodes, hidden)

    def place(query):  # logs are [B, H, N]
        node, head = query // heads, query % heads
        return (node // n * heads + head) * n + node % n

    result = join(
        parts.reshape(tile.splits, -1, dim),
        logs.reshape(tile.splits, -1),
        batch * n * heads if rows is None else rows * heads,
        place,
        interpret="interpret" in options,
    )
    return result.reshape(q.shape if rows is None else (rows, heads, dim)).astype(q.dtype)


def _program(
    lengths_ref, q_ref, k_ref, v_ref, k_new_ref, v_new_ref, hidden_ref, *refs, **static
):
    """Allocates what the warp groups of a program share."""
    dim, dtype = q_ref.shape[-1], q_ref.dtype
    steps, together = static["tile"].steps, static["together"]
    rows = together * BLOCK

    def swizzled(*shape):
        transforms = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
        return plgpu.SMEM(shape, dtype, transforms=transforms)

    loaded = plgpu.Barrier(num_barriers=steps)
    consumed = plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=steps)
    pl.run_scoped(
        functools.partial(
            _attend,
            (lengths_ref, q_ref, k_ref, v_ref, k_new_ref, v_new_ref, hidden_ref),
            refs,
            **static,
        ),
        swizzled(COMPUTING, rows, dim),
        swizzled(steps, BLOCK, dim),
        swizzled(steps, BLOCK, dim),
        swizzled(rows, BLOCK),
        plgpu.SMEM((COMPUTING, rows), jnp.float32),
        plgpu.Barrier(num_arrivals=together, num_barriers=COMPUTING),
        loaded,
        loaded,
        plgpu.Barrier(num_arrivals=together),
        consumed,
        consumed,
        plgpu.Barrier(num_arrivals=COMPUTING),
        plgpu.Barrier(num_arrivals=COMPUTING),
        collective_axes="group",
    )


def _attend(
    inputs,
    outputs,
    q_smem,
    k_smem,
    v_smem,
    hidden_smem,
    log_smem,
    q_loaded,
    k_loaded,
    v_loaded,
    hidden_loaded,
    k_consumed,
    v_consumed,
    hidden_consumed,
    turn,
    *,
    tile: MosaicTile,
    scale: float,
    together: int,
    interpreted: bool,
):
    """One tile of query rows of one key/value head against one split of its keys."""
    lengths_ref, q_ref, k_ref, v_ref, k_new_ref, v_new_ref, hidden_ref = inputs
    out_ref, log_ref = outputs
    n, heads, dim = q_ref.shape[1:]
    kv_heads = k_ref.shape[1]
    group, rows = heads // kv_heads, together * BLOCK
    b, kv_head = (
        lax.div(lax.axis_index("kv_head"), kv_heads),
        lax.axis_index("kv_head") % kv_heads,
    )
    wide = group // (COMPUTING * together)  # programs that share 64 nodes
    at, part = lax.div(lax.axis_index("tile"), wide), lax.axis_index("tile") % wide
    nodes = pl.ds(at * BLOCK, BLOCK)
    split, this = lax.axis_index("split"), lax.axis_index("group")
    first_head = kv_head * group + part * (COMPUTING * together)

    length = lengths_ref[b]
    whole, prefix = lax.div(length, BLOCK), lax.div(length + BLOCK - 1, BLOCK)
    blocks = prefix + n // BLOCK
    share = lax.div(blocks + tile.splits - 1, tile.splits)
    start = jnp.minimum(split * share, blocks)
    stop = jnp.minimum(start + share, blocks)

    def slot_of(block):
        return lax.rem(block - start, tile.steps)

    @pl.when(this == COMPUTING)
    def _load():
        plgpu.set_max_registers(40, action="decrease")

        def load(block, key, value):
            slot = slot_of(block)

            @pl.when(block - start >= tile.steps)
            def _():
                plgpu.barrier_wait(k_consumed.at[slot])

            plgpu.copy_gmem_to_smem(key, k_smem.at[slot], k_loaded.at[slot])

            @pl.when(block - start >= tile.steps)
            def _():
                plgpu.barrier_wait(v_consumed.at[slot])

            plgpu.copy_gmem_to_smem(value, v_smem.at[slot], v_loaded.at[slot])

        @pl.loop(start, jnp.minimum(stop, prefix))
        def _(block):
            own = b, kv_head, pl.ds(block * BLOCK, BLOCK)
            load(block, k_ref.at[own], v_ref.at[own])

        first = jnp.maximum(start, prefix)

        @pl.loop(first, stop)
        def _(block):
            @pl.when(block > first)
            def _():
                plgpu.barrier_wait(hidden_consumed)

            others = pl.ds((block - prefix) * BLOCK, BLOCK)
            for i in range(together):
                own = hidden_smem.at[pl.ds(i * BLOCK, BLOCK)]
                plgpu.copy_gmem_to_smem(hidden_ref.at[b, nodes, others], own, hidden_loaded)
            own = b, others, kv_head
            load(block, k_new_ref.at[own], v_new_ref.at[own])

        # Nothing is left to be seen when the barriers end.
        @pl.loop(jnp.maximum(start, stop - tile.steps), stop)
        def _(block):
            plgpu.barrier_wait(k_consumed.at[slot_of(block)])
            plgpu.barrier_wait(v_consumed.at[slot_of(block)])

        @pl.when(first < stop)
        def _():
            plgpu.barrier_wait(hidden_consumed)

    @pl.when(this < COMPUTING)
    def _compute():
        plgpu.set_max_registers(232, action="increase")
        q, log = q_smem.at[this], log_smem.at[this]

        def heads_of(ref, index):
            """Each head's rows of a block in shared memory, and where they are in memory."""
            for i in range(together):
                head = first_head + this * together + i
                yield ref.at[pl.ds(i * BLOCK, BLOCK)], index(head)

        for rows_of_head, own in heads_of(q, lambda head: (b, nodes, head)):
            plgpu.copy_gmem_to_smem(q_ref.at[own], rows_of_head, q_loaded.at[this])
        plgpu.barrier_wait(q_loaded.at[this])

        def laid_out(x):
            """As a product's result is held in registers, or the maximum of its rows."""
            layout = plgpu.Layout.WGMMA
            return plgpu.layout_cast(x, layout if x.ndim == 2 else layout.reduce(1))

        def pass_turn():
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        def step(block, carry, mask):
            out, peak, total = carry
            slot = slot_of(block)
            plgpu.barrier_wait(k_loaded.at[slot])

            def multiply_keys(scores_ref):
                plgpu.wgmma(scores_ref, q, k_smem.at[slot].transpose((1, 0)))
                pass_turn()
                return scores_ref[...]

            scores = pl.run_scoped(multiply_keys, plgpu.ACC((rows, BLOCK), jnp.float32))
            plgpu.barrier_arrive(k_consumed.at[slot])
            scores = mask(scores * scale, block)
            new_peak = jnp.maximum(peak, scores.max(axis=1))
            decay = jnp.exp2(peak - new_peak)
            p = jnp.exp2(scores - lax.broadcast_in_dim(new_peak, scores.shape, [0]))
            out *= lax.broadcast_in_dim(decay, out.shape, [0])
            total = total * decay + p.sum(axis=1)
            narrow = p.astype(q.dtype)
            out, new_peak, total, narrow = lax.optimization_barrier(
                (out, new_peak, total, narrow)
            )
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(v_loaded.at[slot])
            plgpu.barrier_wait(turn)

            out = _add_product(out, narrow, v_smem.at[slot], interpreted)
            plgpu.barrier_arrive(v_consumed.at[slot])
            return out, new_peak, total

        def all_seen(scores, block):
            return scores

        def committed(scores, block):
            iota = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA)
            return jnp.where(iota + block * BLOCK < length, scores, -jnp.inf)

        def related(scores, block):
            plgpu.barrier_wait(hidden_loaded)
            scores = scores + hidden_smem[...].astype(jnp.float32)
            plgpu.barrier_arrive(hidden_consumed)
            return scores

        def filled(value, *shape):
            return laid_out(jnp.full(shape, value, jnp.float32))

        carry = filled(0.0, rows, dim), filled(FLOOR, rows), filled(0.0, rows)
        pl.when(this == 1)(pass_turn)
        for first, last, mask in (
            (start, jnp.minimum(stop, whole), all_seen),
            (jnp.maximum(start, whole), jnp.minimum(stop, prefix), committed),
            (jnp.maximum(start, prefix), stop, related),
        ):
            body = functools.partial(step, mask=mask)
            carry = lax.fori_loop(first, last, body, carry)
        pl.when(this == 0)(pass_turn)

        out, peak, total = carry
        total = jnp.maximum(total, TINY)
        out /= lax.broadcast_in_dim(total, out.shape, [0])
        q[...] = out.astype(q.dtype)
        log[...] = peak + jnp.log(total) * math.log2(math.e)
        plgpu.commit_smem()
        for rows_of_head, own in heads_of(q, lambda head: (split, b, nodes, head)):
            plgpu.copy_smem_to_gmem(rows_of_head, out_ref.at[own])
        for rows_of_head, own in heads_of(log, lambda head: (split, b, head, nodes)):
            plgpu.copy_smem_to_gmem(rows_of_head, log_ref.at[own])
        plgpu.wait_smem_to_gmem(0)


def _add_product(total: jax.Array, x: jax.Array, y_ref, interpreted: bool) -> jax.Array:
    """total + x · y; the interpreter multiplies no x in registers."""
    if interpreted:
        return total + jnp.dot(x, y_ref[...], preferred_element_type=jnp.float32)
    return pl.run_state(lambda out: plgpu.wgmma(out, x, y_ref))(plgpu.ACC.init(total))
