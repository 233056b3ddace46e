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
    count, outer = rows.shape[0], weight.shape[1]
    rows = jnp.pad(rows, ((0, padded(count) - count), (0, 0)))
    made = plgpu.kernel(
        functools.partial(_program, tile=tile),
        out_type=jax.ShapeDtypeStruct((tile.splits, len(rows), outer), jnp.float32),
        grid=(outer // tile.columns, tile.splits),
        grid_names=("column", "split"),
        num_threads=groups(count) + 1,  # warp groups
        thread_name="group",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        **options,
    )
    return made(rows, weight)[:, :count].sum(axis=0)


def _swizzled(width: int, dtype) -> tuple:
    """How a block of so many columns is laid out in shared memory."""
    size = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(8 * size * width)
    return plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle)


def _program(rows_ref, weight_ref, out_ref, *, tile: Tile):
    """One tile of columns, over one part of the contracted axis."""
    count, columns, multiplying = rows_ref.shape[0], tile.columns, groups(rows_ref.shape[0])
    share = count // multiplying
    width = math.gcd(columns, SWIZZLE // 4)  # float32 columns written at a time
    length = rows_ref.shape[1] // tile.splits
    split, column = lax.axis_index("split"), lax.axis_index("column")
    part = pl.ds(split * length, length)
    operands = rows_ref.at[:, part], weight_ref.at[part, pl.ds(column * columns, columns)]
    # Both operands of a product have one swizzle.
    transforms = _swizzled(min(columns & -columns, tile.depth), rows_ref.dtype)

    def block(shape, index):
        options = dict(transforms=transforms, memory_space=plgpu.SMEM)
        return plgpu.BlockSpec(shape, index, **options)

    def pipeline(body, context):
        return plgpu.emit_pipeline_warp_specialized(
            body,
            grid=(length // tile.depth,),
            memory_registers=40,
            in_specs=[
                block((count, tile.depth), lambda i: (0, i)),
                block((tile.depth, columns), lambda i: (i, 0)),
            ],
            wg_axis="group",
            num_compute_wgs=multiplying,
            max_concurrent_steps=tile.steps,
            compute_context=context,
        )

    def nothing(*_, **__):
        return None

    @functools.partial(
        pl.run_scoped,
        allocations=pipeline(nothing, nothing).get_allocations(rows_ref, weight_ref),
        out=plgpu.SMEM((count, width), jnp.float32, transforms=_swizzled(width, jnp.float32)),
        collective_axes="group",
    )
    def _(allocations, out):
        mine = pl.ds(lax.axis_index("group") * share, share)

        def context(run):
            @functools.partial(pl.run_scoped, total=plgpu.ACC((share, columns), jnp.float32))
            def _(total):
                run(total)
                found = total[...]
                for start in range(0, columns, width):
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last copy's block
                    out.at[mine][...] = found[:, start : start + width]
                    plgpu.commit_smem()
                    own = pl.ds(column * columns + start, width)
                    plgpu.copy_smem_to_gmem(out.at[mine], out_ref.at[split, mine, own])

        def step(_, rows, weight, total):
            plgpu.wgmma(total, rows.at[mine], weight)
            plgpu.wgmma_wait(0)
            return total

        pipeline(step, context)(*operands, allocations=allocations)

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
