"""Residual sum and RMS norm as one Triton kernel, written in Pallas: one program per row."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

ELEMENTS_PER_WARP = 512  # 16 of a thread: four loads of 16 bytes


@functools.partial(jax.jit, static_argnames=("eps", "dtype", "interpret"))
def add_norm_triton(
    x: jax.Array,
    update: jax.Array | None,
    gain: jax.Array,
    *,
    eps: float,
    dtype,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See `add_norm_reference`; `interpret` runs it on the CPU, to check numbers."""
    rows, width = x.shape
    padded = pl.next_power_of_2(width)
    outputs = [jax.ShapeDtypeStruct(x.shape, dtype)]
    if update is not None:
        outputs.append(jax.ShapeDtypeStruct(x.shape, jnp.float32))
    normed, *new = pl.pallas_call(
        functools.partial(norm_row, eps=eps, padded=padded, added=update is not None),
        out_shape=outputs,
        grid=(rows,),
        compiler_params=plgpu.CompilerParams(
            num_warps=min(16, max(1, padded // ELEMENTS_PER_WARP)), num_stages=1
        ),
        interpret=interpret,
        name="add_norm",
    )(x, gain, *([] if update is None else [update]))
    return (*new, normed) if new else (x, normed)


def norm_row(x_ref, gain_ref, *refs, eps: float, padded: int, added: bool):
    """One row, its lanes padded to a power of two."""
    refs = list(refs)
    update_ref = refs.pop(0) if added else None
    row, width = pl.program_id(0), x_ref.shape[-1]
    lane = jnp.arange(padded)
    real = lane < width

    def load(ref, *place):
        return plgpu.load(ref.at[(*place, lane)], mask=real, other=0.0).astype(jnp.float32)

    x = load(x_ref, row)
    if added:
        x = x + load(update_ref, row)
        plgpu.store(refs[1].at[row, lane], x, mask=real)
    normed = x * lax.rsqrt((x * x).sum() / width + eps) * load(gain_ref)
    plgpu.store(refs[0].at[row, lane], normed.astype(refs[0].dtype), mask=real)
