"""Moves rows of many arrays in one Triton kernel, written in Pallas.

Keys and values of each layer are separate arrays, so that no step slices a stack. A round
commits few rows, so one kernel per array would mostly be launch overhead. Here program (b, k,
g) moves the rows of sequence b and head k in the g-th group of arrays: all loads of a group,
then all stores, so that their memory latencies overlap.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

ELEMENTS = 8192  # elements of a group that a program holds in registers
ARRAYS = 16  # most arrays in a group, as each needs its own pointers
MOST_ARRAYS = 96  # most arrays in a call: a kernel's parameters are at most 4 KiB


@functools.partial(jax.jit, static_argnames="interpret")
def take_rows_triton(
    arrays: tuple[jax.Array, ...], index: jax.Array, *, interpret: bool = False
) -> tuple[jax.Array, ...]:
    """See `take_rows_reference`; `interpret` runs it on the CPU, to check numbers."""
    batch, count = index.shape
    kv_heads, dim = arrays[0].shape[2:]

    def kernel(index_ref, *refs):
        b, k, row, lane, real = _place(count, dim)
        node = plgpu.load(index_ref.at[b, row], mask=row < count, other=0)
        sources, targets = refs[: len(refs) // 2], refs[len(refs) // 2 :]
        _move(
            sources,
            targets,
            lambda ref: ref.at[b, node[:, None], k, lane],
            lambda ref: ref.at[b, row[:, None], k, lane],
            real,
        )

    results = []
    for part in _parts(arrays):
        shapes = [jax.ShapeDtypeStruct((batch, count, kv_heads, dim), x.dtype) for x in part]
        grid = (batch, kv_heads, _groups(len(part), count, dim))
        results += _call(kernel, "take_rows", shapes, grid, {}, interpret)(index, *part)
    return tuple(results)


@functools.partial(jax.jit, static_argnames="interpret")
def write_rows_triton(
    caches: tuple[jax.Array, ...],
    news: tuple[jax.Array, ...],
    starts: jax.Array,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """See `write_rows_reference`; the caches are updated in place.

    `interpret` runs it on the CPU, to check numbers.
    """
    batch, count, kv_heads, dim = news[0].shape

    def kernel(starts_ref, *refs):
        b, k, row, lane, real = _place(count, dim)
        start = starts_ref[b]
        third = len(refs) // 3  # new rows, caches, and the same caches as results
        _move(
            refs[:third],
            refs[2 * third :],
            lambda ref: ref.at[b, row[:, None], k, lane],
            lambda ref: ref.at[b, k, start + row[:, None], lane],
            real & (start + row < refs[-1].shape[2])[:, None],  # nothing beyond the cache
        )

    results = []
    for cache, new in zip(_parts(caches), _parts(news), strict=True):
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in cache]
        grid = (batch, kv_heads, _groups(len(cache), count, dim))
        aliases = {1 + len(new) + i: i for i in range(len(cache))}
        call = _call(kernel, "write_rows", shapes, grid, aliases, interpret)
        results += call(starts, *new, *cache)
    return tuple(results)


def _parts(arrays):
    return [arrays[i : i + MOST_ARRAYS] for i in range(0, len(arrays), MOST_ARRAYS)]


def _per_group(count: int, dim: int) -> int:
    return min(ARRAYS, max(1, ELEMENTS // (pl.next_power_of_2(count) * dim)))


def _groups(arrays: int, count: int, dim: int) -> int:
    return pl.cdiv(arrays, _per_group(count, dim))


def _call(kernel, name, shapes, grid, aliases, interpret):
    return pl.pallas_call(
        kernel,
        out_shape=shapes,
        grid=grid,
        input_output_aliases=aliases,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name=name,
    )


def _place(count: int, dim: int):
    """Sequence, head, rows [C'], lanes [1, D], and a mask [C', D] without padding."""
    row, lane = jnp.arange(pl.next_power_of_2(count)), jnp.arange(dim)[None, :]
    real = jnp.broadcast_to((row < count)[:, None], (row.size, dim))
    return pl.program_id(0), pl.program_id(1), row, lane, real


def _move(sources, targets, source, target, real) -> None:
    """target(targets[i]) = source(sources[i]) for the i of this program's group."""
    size = _per_group(*real.shape)
    for group in range(pl.cdiv(len(sources), size)):
        members = slice(group * size, (group + 1) * size)

        @pl.when(pl.program_id(2) == group)
        def _(members=members):
            rows = [plgpu.load(source(ref), mask=real, other=0.0) for ref in sources[members]]
            for ref, x in zip(targets[members], rows, strict=True):
                plgpu.store(target(ref), x.astype(ref.dtype), mask=real)
