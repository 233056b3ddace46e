"""Head norm, rotation and rounding of a fused projection as one Triton kernel, in Pallas.

A program handles the heads of one row and one key/value head. The two halves of a head, which
the rotation pairs, are loaded separately; elements that do not rotate are divided between them.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


def unsupported(qkv: jax.Array, *_, **__) -> str | None:
    """Why the kernel does not support these shapes; None if it does."""
    dim = qkv.shape[-1]
    return f"heads have {dim} elements; expected a power of two" if dim & (dim - 1) else None


@functools.partial(jax.jit, static_argnames=("eps", "dtype", "gated", "interpret"))
def rotary_heads_triton(
    qkv: jax.Array,
    bias: jax.Array | None,
    q_gain: jax.Array | None,
    k_gain: jax.Array | None,
    cos: jax.Array,
    sin: jax.Array,
    *,
    eps: float,
    dtype,
    gated: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `rotary_heads_reference`; `interpret` runs it on the CPU, to check numbers."""
    rows, (kv_heads, columns, dim) = cos.shape[0], qkv.shape[1:]
    group = (columns - 2) // 2 if gated else columns - 2
    optional = [array for array in (bias, q_gain, k_gain) if array is not None]
    kernel = functools.partial(
        split_heads,
        kv_heads=kv_heads,
        group=group,
        gated=gated,
        biased=bias is not None,
        normed=q_gain is not None,
        eps=eps,
    )
    shape = lambda heads: jax.ShapeDtypeStruct((rows, heads, dim), dtype)  # noqa: E731
    return pl.pallas_call(
        kernel,
        out_shape=[shape(kv_heads * group), shape(kv_heads), shape(kv_heads)],
        grid=(rows, kv_heads),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="rotary_heads",
    )(qkv, cos, sin, *optional)


def split_heads(
    qkv_ref,
    cos_ref,
    sin_ref,
    *refs,
    kv_heads: int,
    group: int,
    gated: bool,
    biased: bool,
    normed: bool,
    eps,
):
    """The G queries, the key and the value of one row and one key/value head."""
    refs = list(refs)
    bias_ref = refs.pop(0) if biased else None
    q_gain_ref, k_gain_ref = (refs.pop(0), refs.pop(0)) if normed else (None, None)
    q_ref, k_ref, v_ref = refs
    row, kv_head = pl.program_id(0), pl.program_id(1)
    half, pairs = qkv_ref.shape[-1] // 2, cos_ref.shape[-1]
    count = pl.next_power_of_2(group + 2)
    head, lane = jnp.arange(count), jnp.arange(half)
    is_key, is_value = head == group, head == group + 1
    # A query's gate is the column after it.
    column = jnp.where(head < group, 2 * head, head + group) if gated else head
    # Lane i of the halves: the pair (i, i + pairs), past the last pair elements that stay.
    turns = lane < pairs
    low_at = lane if pairs == half else jnp.where(turns, lane, lane + pairs)
    high_at = lane + half if pairs == half else jnp.where(turns, lane + pairs, lane + half)

    def mask(which):
        return jnp.broadcast_to(which[:, None], (count, half))

    def load(at):
        place = (kv_head, column[:, None], at[None, :])
        exists = mask(head < group + 2)
        x = plgpu.load(qkv_ref.at[(row, *place)], mask=exists, other=0.0).astype(jnp.float32)
        if biased:
            x = x + plgpu.load(bias_ref.at[place], mask=exists, other=0.0).astype(jnp.float32)
        return x

    def gain(at):
        q, k = (
            plgpu.load(ref.at[at]).astype(jnp.float32)[None, :]
            for ref in (q_gain_ref, k_gain_ref)
        )
        return jnp.where(mask(is_key), k, q)

    def angle(ref, still):
        return plgpu.load(ref.at[row, lane], mask=turns, other=still)[None, :]

    low, high = load(low_at), load(high_at)
    values = low, high
    if normed:
        scale = lax.rsqrt(((low * low).sum(1) + (high * high).sum(1)) / (2 * half) + eps)[
            :, None
        ]
        low, high = low * scale * gain(low_at), high * scale * gain(high_at)
    cos, sin = angle(cos_ref, 1.0), angle(sin_ref, 0.0)
    rotated = low * cos - high * sin, high * cos + low * sin
    for at, x, v in zip((low_at, high_at), rotated, values, strict=True):
        queries = kv_head * group + head
        plgpu.store(
            q_ref.at[row, queries[:, None], at[None, :]],
            x.astype(q_ref.dtype),
            mask=mask(head < group),
        )
        key, value = (
            jnp.where(mask(is_key), x, 0).sum(0),
            jnp.where(mask(is_value), v, 0).sum(0),
        )
        plgpu.store(k_ref.at[row, kv_head, at], key.astype(k_ref.dtype))
        plgpu.store(v_ref.at[row, kv_head, at], value.astype(v_ref.dtype))
