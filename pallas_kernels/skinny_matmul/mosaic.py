"""Product of few rows with a weight, in Mosaic GPU for Hopper.

A product of so few rows takes as long as reading the weight, so all that counts is how many
bytes are in flight. One warp group of a program loads blocks of rows and weight by the tensor
memory accelerator, `steps` of them ahead; another multiplies what has arrived, or two, which
share the rows if there are more than 64.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.skinny_matmul.config import Tile, groups, padded

SWIZZLE = 128  # bytes of a row in shared memory that are swizzled together


def skinny_matmul_mosaic(
    rows: jax.Array, weight: jax.Array, tile: Tile, **options
) -> jax.Array:
    """See `skinny_matmul_reference`; `options` are those of `plgpu.kernel`."""
    parts = _call(rows, (weight,), tile, jnp.float32, lambda total: total, options)
    return parts.sum(axis=0)


def skinny_swiglu_mosaic(
    rows: jax.Array, weight: jax.Array, tile: Tile, **options
) -> jax.Array:
    """See `skinny_swiglu_reference`; `options` are those of `plgpu.kernel`."""
    if tile.splits != 1:
        raise ValueError(f"{tile} splits the sums of SwiGLU; expected splits = 1")
    inner, _, outer = weight.shape
    both = weight.reshape(inner, 2 * outer)
    return _call(rows, (both, both), tile, rows.dtype, _swiglu, options)[0]


def _swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    return gate / (1.0 + jnp.exp(-gate)) * up


def _call(rows, weights, tile: Tile, dtype, finish, options) -> jax.Array:
    """Parts [splits, R, O] of finish(*[rows · weight for weight in weights]).

    Weights are one array whose columns lie side by side.
    """
    count, inner = rows.shape
    outer = weights[0].shape[1] // len(weights)
    rows = jnp.pad(rows, ((0, padded(count) - count), (0, 0)))
    program = functools.partial(_program, tile=tile, finish=finish, outer=outer)
    made = plgpu.kernel(
        program,
        out_type=jax.ShapeDtypeStruct((tile.splits, len(rows), outer), dtype),
        grid=(outer // tile.columns, tile.splits),
        grid_names=("column", "split"),
        num_threads=groups(count) + 1,  # warp groups
        thread_name="group",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        **options,
    )
    return made(rows, *weights)[:, :count]


def _swizzled(width: int, dtype) -> tuple:
    """How a block of so many columns is laid out in shared memory."""
    size = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(8 * size * width)
    return plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle)


def _program(rows_ref, *refs, tile: Tile, finish, outer: int):
    """One tile of columns, over one part of the contracted axis."""
    *weight_refs, out_ref = refs
    count, columns, multiplying = rows_ref.shape[0], tile.columns, groups(rows_ref.shape[0])
    share = count // multiplying
    width = math.gcd(columns, SWIZZLE // jnp.dtype(out_ref.dtype).itemsize)  # written at a time
    length = rows_ref.shape[1] // tile.splits
    split, column = lax.axis_index("split"), lax.axis_index("column")
    part = pl.ds(split * length, length)
    operands = [rows_ref.at[:, part]] + [
        ref.at[part, pl.ds(i * outer + column * columns, columns)]
        for i, ref in enumerate(weight_refs)
    ]
    # Both operands of a product have one swizzle.
    transforms = _swizzled(min(columns & -columns, tile.depth), rows_ref.dtype)

    def block(shape, index):
        options = dict(transforms=transforms, memory_space=plgpu.SMEM)
        return plgpu.BlockSpec(shape, index, **options)

    def pipeline(body, context):
        weights = [block((tile.depth, columns), lambda i: (i, 0)) for _ in weight_refs]
        return plgpu.emit_pipeline_warp_specialized(
            body,
            grid=(length // tile.depth,),
            memory_registers=40,
            in_specs=[block((count, tile.depth), lambda i: (0, i)), *weights],
            wg_axis="group",
            num_compute_wgs=multiplying,
            max_concurrent_steps=tile.steps,
            compute_context=context,
        )

    def nothing(*_, **__):
        return None

    @functools.partial(
        pl.run_scoped,
        allocations=pipeline(nothing, nothing).get_allocations(rows_ref, *weight_refs),
        out=plgpu.SMEM(
            (count, width), out_ref.dtype, transforms=_swizzled(width, out_ref.dtype)
        ),
        collective_axes="group",
    )
    def _(allocations, out):
        mine = pl.ds(lax.axis_index("group") * share, share)

        def context(run):
            accumulators = [plgpu.ACC((share, columns), jnp.float32) for _ in weight_refs]

            @functools.partial(pl.run_scoped, totals=accumulators)
            def _(totals):
                run(totals)
                found = finish(*(total[...] for total in totals)).astype(out_ref.dtype)
                for start in range(0, columns, width):
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last copy's block
                    out.at[mine][...] = found[:, start : start + width]
                    plgpu.commit_smem()
                    own = pl.ds(column * columns + start, width)
                    plgpu.copy_smem_to_gmem(out.at[mine], out_ref.at[split, mine, own])

        def step(_, rows, *blocks):
            *weights, totals = blocks
            for weight, total in zip(weights, totals, strict=True):
                plgpu.wgmma(total, rows.at[mine], weight)
            plgpu.wgmma_wait(0)
            return totals

        pipeline(step, context)(*operands, allocations=allocations)

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
