"""Tree attention in Mosaic GPU for Hopper, for trees of whole blocks of 64 nodes.

As in the Triton kernel, the blocks of a row's prefix and then those of its new keys form one
sequence, divided evenly among `splits` programs, and the parts are joined by the logs of their
denominators. A program holds 64 nodes of two or four query heads of one key/value head, so
that it reads a block of keys once for all of them. One warp group loads blocks by the tensor
memory accelerator, `steps` ahead; two compute, and take turns at the tensor cores: one
multiplies while the other takes its softmax.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

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
    ordered: bool = False,
    tile: MosaicTile,
    rows: int | None = None,
    **options,
) -> jax.Array:
    """See `tree_attention_reference` for shapes and meaning; cache rows must be finite.

    Args:
      ordered, rows: see `tree_attention`.
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
        ordered=ordered,
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


class _Shared(NamedTuple):
    """What the warp groups of a program share: memory, and barriers of its blocks.

    Attributes:
      q, log: queries, then outputs, of each computing group, and the logs of its softmax.
      k, v: blocks in flight.
      hidden: 0 where a node sees another, else -inf, for each head of a group.
      turn: whose turn it is to multiply.
    """

    q: Any
    k: Any
    v: Any
    hidden: Any
    log: Any
    q_loaded: Any
    k_loaded: Any
    v_loaded: Any
    hidden_loaded: Any
    k_consumed: Any
    v_consumed: Any
    hidden_consumed: Any
    turn: Any


@dataclasses.dataclass(frozen=True)
class _Work:
    """What a program computes: 64 nodes of some heads against the blocks start … stop - 1.

    Attributes:
      length: rows of the prefix; `whole` blocks of it are full, `prefix` have any.
    """

    b: jax.Array
    kv_head: jax.Array
    first_head: jax.Array
    nodes: Any
    split: jax.Array
    length: jax.Array
    whole: jax.Array
    prefix: jax.Array
    start: jax.Array
    stop: jax.Array
    steps: int
    together: int

    def slot(self, block):
        return lax.rem(block - self.start, self.steps)


def _program(
    lengths_ref, q_ref, k_ref, v_ref, k_new_ref, v_new_ref, hidden_ref, *out_refs, **static
):
    """Divides the work, and gives each warp group its part."""
    tile, together, interpreted = static["tile"], static["together"], static["interpreted"]
    n, heads, dim = q_ref.shape[1:]
    kv_heads = k_ref.shape[1]
    group, rows = heads // kv_heads, together * BLOCK
    row, at = lax.axis_index("kv_head"), lax.axis_index("tile")
    b, kv_head = lax.div(row, kv_heads), lax.rem(row, kv_heads)
    wide = group // (COMPUTING * together)  # programs that share 64 nodes
    length, split = lengths_ref[b], lax.axis_index("split")
    prefix = lax.div(length + BLOCK - 1, BLOCK)
    own = lax.div(at, wide)  # the program's block of nodes
    blocks = prefix + (own + 1 if static["ordered"] else n // BLOCK)
    share = lax.div(blocks + tile.splits - 1, tile.splits)
    start = jnp.minimum(split * share, blocks)
    work = _Work(
        b=b,
        kv_head=kv_head,
        first_head=kv_head * group + lax.rem(at, wide) * (COMPUTING * together),
        nodes=pl.ds(own * BLOCK, BLOCK),
        split=split,
        length=length,
        whole=lax.div(length, BLOCK),
        prefix=prefix,
        start=start,
        stop=jnp.minimum(start + share, blocks),
        steps=tile.steps,
        together=together,
    )

    def memory(*shape):
        transforms = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
        return plgpu.SMEM(shape, q_ref.dtype, transforms=transforms)

    loaded = plgpu.Barrier(num_barriers=tile.steps)
    consumed = plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=tile.steps)
    shared = _Shared(
        q=memory(COMPUTING, rows, dim),
        k=memory(tile.steps, BLOCK, dim),
        v=memory(tile.steps, BLOCK, dim),
        hidden=memory(rows, BLOCK),
        log=plgpu.SMEM((COMPUTING, rows), jnp.float32),
        q_loaded=plgpu.Barrier(num_arrivals=together, num_barriers=COMPUTING),
        k_loaded=loaded,
        v_loaded=loaded,
        hidden_loaded=plgpu.Barrier(num_arrivals=together),
        k_consumed=consumed,
        v_consumed=consumed,
        hidden_consumed=plgpu.Barrier(num_arrivals=COMPUTING),
        turn=plgpu.Barrier(num_arrivals=COMPUTING),
    )

    @functools.partial(pl.run_scoped, shared=shared, collective_axes="group")
    def _(shared):
        this = lax.axis_index("group")

        @pl.when(this == COMPUTING)
        def _():
            _load(work, shared, (k_ref, v_ref), (k_new_ref, v_new_ref), hidden_ref)

        @pl.when(this < COMPUTING)
        def _():
            scale = static["scale"]
            _compute(work, shared, this, q_ref, out_refs, scale=scale, interpreted=interpreted)


def _load(work: _Work, shared: _Shared, cache, new, hidden_ref):
    """Loads the blocks of keys and values, as many ahead as there is memory for."""
    plgpu.set_max_registers(40, action="decrease")

    def load(block, source, own):
        slot = work.slot(block)
        key, value = (ref.at[own] for ref in source)

        def when_free(consumed):
            @pl.when(block - work.start >= work.steps)
            def _():
                plgpu.barrier_wait(consumed.at[slot])

        when_free(shared.k_consumed)
        plgpu.copy_gmem_to_smem(key, shared.k.at[slot], shared.k_loaded.at[slot])
        when_free(shared.v_consumed)
        plgpu.copy_gmem_to_smem(value, shared.v.at[slot], shared.v_loaded.at[slot])

    @pl.loop(work.start, jnp.minimum(work.stop, work.prefix))
    def _(block):
        load(block, cache, (work.b, work.kv_head, pl.ds(block * BLOCK, BLOCK)))

    first = jnp.maximum(work.start, work.prefix)

    @pl.loop(first, work.stop)
    def _(block):
        @pl.when(block > first)
        def _():
            plgpu.barrier_wait(shared.hidden_consumed)

        others = pl.ds((block - work.prefix) * BLOCK, BLOCK)
        for i in range(work.together):
            own = shared.hidden.at[pl.ds(i * BLOCK, BLOCK)]
            source = hidden_ref.at[work.b, work.nodes, others]
            plgpu.copy_gmem_to_smem(source, own, shared.hidden_loaded)
        load(block, new, (work.b, others, work.kv_head))

    # A barrier ends when all that arrived at it was seen.
    @pl.loop(jnp.maximum(work.start, work.stop - work.steps), work.stop)
    def _(block):
        plgpu.barrier_wait(shared.k_consumed.at[work.slot(block)])
        plgpu.barrier_wait(shared.v_consumed.at[work.slot(block)])

    @pl.when(first < work.stop)
    def _():
        plgpu.barrier_wait(shared.hidden_consumed)


def _compute(work: _Work, shared: _Shared, this, q_ref, out_refs, *, scale, interpreted):
    """Attention of the heads of one warp group."""
    plgpu.set_max_registers(232, action="increase")
    q, log = shared.q.at[this], shared.log.at[this]
    rows, dim = q.shape
    own_heads = [work.first_head + this * work.together + i for i in range(work.together)]

    def of_each_head(ref):
        return [ref.at[pl.ds(i * BLOCK, BLOCK)] for i in range(work.together)]

    for head, part in zip(own_heads, of_each_head(q), strict=True):
        source = q_ref.at[work.b, work.nodes, head]
        plgpu.copy_gmem_to_smem(source, part, shared.q_loaded.at[this])
    plgpu.barrier_wait(shared.q_loaded.at[this])

    def all_seen(scores, block):
        return scores

    def committed(scores, block):
        iota = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA)
        return jnp.where(iota + block * BLOCK < work.length, scores, -jnp.inf)

    def related(scores, block):
        plgpu.barrier_wait(shared.hidden_loaded)
        scores = scores + shared.hidden[...].astype(jnp.float32)
        plgpu.barrier_arrive(shared.hidden_consumed)
        return scores

    carry = _filled(0.0, rows, dim), _filled(FLOOR, rows), _filled(0.0, rows)
    pl.when(this == 1)(functools.partial(_pass, shared.turn))
    for first, last, mask in (
        (work.start, jnp.minimum(work.stop, work.whole), all_seen),
        (jnp.maximum(work.start, work.whole), jnp.minimum(work.stop, work.prefix), committed),
        (jnp.maximum(work.start, work.prefix), work.stop, related),
    ):
        body = functools.partial(
            _step, work, shared, q, mask=mask, scale=scale, interpreted=interpreted
        )
        carry = lax.fori_loop(first, last, body, carry)
    pl.when(this == 0)(functools.partial(_pass, shared.turn))

    out, peak, total = carry
    total = jnp.maximum(total, TINY)
    q[...] = (out / lax.broadcast_in_dim(total, out.shape, [0])).astype(q.dtype)
    log[...] = peak + jnp.log(total) * math.log2(math.e)
    plgpu.commit_smem()
    out_ref, log_ref = out_refs
    for head, part, logs in zip(own_heads, of_each_head(q), of_each_head(log), strict=True):
        plgpu.copy_smem_to_gmem(part, out_ref.at[work.split, work.b, work.nodes, head])
        plgpu.copy_smem_to_gmem(logs, log_ref.at[work.split, work.b, head, work.nodes])
    plgpu.wait_smem_to_gmem(0)


def _step(work: _Work, shared: _Shared, q, block, carry, *, mask, scale, interpreted):
    """One block of keys: (outputs, peaks, totals) -> the same."""
    out, peak, total = carry
    slot = work.slot(block)
    plgpu.barrier_wait(shared.k_loaded.at[slot])

    def multiply_keys(scores_ref):
        plgpu.wgmma(scores_ref, q, shared.k.at[slot].transpose((1, 0)))
        _pass(shared.turn)
        return scores_ref[...]

    scores = pl.run_scoped(multiply_keys, plgpu.ACC((q.shape[0], BLOCK), jnp.float32))
    plgpu.barrier_arrive(shared.k_consumed.at[slot])
    scores = mask(scores * scale, block)
    new_peak = jnp.maximum(peak, scores.max(axis=1))
    decay = jnp.exp2(peak - new_peak)
    p = jnp.exp2(scores - lax.broadcast_in_dim(new_peak, scores.shape, [0]))
    out *= lax.broadcast_in_dim(decay, out.shape, [0])
    total = total * decay + p.sum(axis=1)
    # The softmax ends before the other group's turn does.
    kept = lax.optimization_barrier((out, new_peak, total, p.astype(q.dtype)))
    out, new_peak, total, narrow = kept
    plgpu.barrier_arrive(shared.turn)
    plgpu.barrier_wait(shared.v_loaded.at[slot])
    plgpu.barrier_wait(shared.turn)
    out = _add_product(out, narrow, shared.v.at[slot], interpreted)
    plgpu.barrier_arrive(shared.v_consumed.at[slot])
    return out, new_peak, total


def _pass(turn) -> None:
    plgpu.barrier_arrive(turn)
    plgpu.barrier_wait(turn)


def _filled(value: float, *shape: int) -> jax.Array:
    """Held in registers as a product's result is, or as the maximum of its rows."""
    layout = plgpu.Layout.WGMMA
    layout = layout if len(shape) == 2 else layout.reduce(1)
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _add_product(total: jax.Array, x: jax.Array, y_ref, interpreted: bool) -> jax.Array:
    """total + x · y; the interpreter multiplies no x in registers."""
    if interpreted:
        return total + jnp.dot(x, y_ref[...], preferred_element_type=jnp.float32)
    return pl.run_state(lambda out: plgpu.wgmma(out, x, y_ref))(plgpu.ACC.init(total))
