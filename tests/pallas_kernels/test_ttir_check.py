"""The Triton IR interpreter: it agrees with the definition, and it catches planted faults."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.tree_attention.triton import tree_attention_triton
from tests.pallas_kernels.attention_cases import CASES, make_inputs, oracle, tolerance
from tests.pallas_kernels.ttir_check import KernelFault, execute

PARAMS = plgpu.CompilerParams(num_warps=4, num_stages=1)


@pytest.mark.parametrize(
    "name, lengths",
    [
        ("decode", (0, 96)),
        ("odd group", (33, 70)),
        ("half words", (64,)),
        ("window", (31, 128)),
        ("bfloat16 throughout", (99,)),
    ],
)
def test_the_lowered_kernels_stay_in_bounds_and_compute_the_definition(name, lengths):
    case = CASES[name]
    arrays = make_inputs(case, lengths)
    options = dict(scale=0.125, window=case.window)
    names, values = zip(*arrays.items(), strict=True)

    def call(*values):
        return tree_attention_triton(
            **dict(zip(names, values, strict=True)), **options, ordered=True, tile=case.tile
        )

    (actual,) = execute(call, *values)
    error = np.abs(np.asarray(actual, np.float64) - oracle(**arrays, **options)).max()
    assert error < tolerance(case)


def double(x, *, tile, programs, size, mask=True):
    """x * 2 with `programs` tiles of `tile` elements, written into `size` elements."""

    def kernel(x_ref, out_ref):
        index = pl.program_id(0) * tile + jnp.arange(tile)
        inside = index < size if mask else index >= 0
        values = plgpu.load(x_ref.at[index], mask=inside, other=0.0)
        plgpu.store(out_ref.at[index], 2 * values, mask=inside)

    out = jax.ShapeDtypeStruct((size,), x.dtype)
    return pl.pallas_call(kernel, out_shape=out, grid=(programs,), compiler_params=PARAMS)(x)


def test_a_sound_kernel_passes():
    x = jnp.arange(24.0)
    (out,) = execute(functools.partial(double, tile=16, programs=2, size=24), x)
    assert out.tolist() == [2.0 * i for i in range(24)]


def test_a_missing_mask_is_an_access_out_of_bounds():
    call = functools.partial(double, tile=16, programs=2, size=24, mask=False)
    with pytest.raises(KernelFault, match="program 1 reads element 24 of input 0, .* has 24"):
        execute(call, jnp.arange(24.0))


def test_a_store_past_the_end_is_caught_where_the_load_is_not():
    call = functools.partial(double, tile=16, programs=2, size=24, mask=False)
    with pytest.raises(KernelFault, match="program 1 .* element 24 of output 0"):
        execute(call, jnp.arange(32.0))


def test_a_grid_too_small_leaves_elements_unwritten():
    call = functools.partial(double, tile=16, programs=1, size=24)
    with pytest.raises(KernelFault, match="no program writes element 16 of output 0"):
        execute(call, jnp.arange(24.0))


def test_two_programs_that_write_one_element_are_caught():
    def kernel(x_ref, out_ref):
        index = pl.program_id(0) * 8 + jnp.arange(16)  # overlaps its neighbour by half
        plgpu.store(out_ref.at[index], x_ref[index])

    def call(x):
        out = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return pl.pallas_call(kernel, out_shape=out, grid=(2,), compiler_params=PARAMS)(x)

    with pytest.raises(KernelFault, match="program 1 writes element 8 .* program 0 wrote"):
        execute(call, jnp.arange(24.0))


def test_two_lanes_that_write_one_element_are_caught():
    def kernel(x_ref, out_ref):
        plgpu.store(out_ref.at[jnp.arange(16) // 2], x_ref[:])

    def call(x):
        out = jax.ShapeDtypeStruct((8,), x.dtype)
        return pl.pallas_call(kernel, out_shape=out, grid=(1,), compiler_params=PARAMS)(x)

    with pytest.raises(KernelFault, match="two lanes of program 0"):
        execute(call, jnp.arange(16.0))


def running_sum(x, *, barrier=True, programs=1):
    """Row i is x[i] plus row i - 1, read where it was written."""

    def kernel(x_ref, out_ref):
        lane, program = jnp.arange(16), pl.program_id(0)
        plgpu.store(out_ref.at[program, lane], plgpu.load(x_ref.at[program, lane]))
        if barrier:
            plgpu.debug_barrier()
        for i in range(programs, x.shape[0]):
            before = plgpu.load(out_ref.at[i - 1, lane])
            plgpu.store(out_ref.at[i, lane], before + plgpu.load(x_ref.at[i, lane]))
            plgpu.debug_barrier()

    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    call = pl.pallas_call(kernel, out_shape=out, grid=(programs,), compiler_params=PARAMS)
    return call(x)


def test_a_program_reads_what_it_wrote_before_a_barrier():
    x = jnp.arange(48.0).reshape(3, 16)
    (out,) = execute(running_sum, x)
    np.testing.assert_array_equal(out, np.cumsum(x, axis=0))
    match = "program 0 reads element 0 of output 0, which it has not written before a barrier"
    with pytest.raises(KernelFault, match=match):
        execute(functools.partial(running_sum, barrier=False), x)


def test_a_program_that_reads_what_another_writes_is_caught():
    with pytest.raises(KernelFault, match="program 0 reads element 16 of output 0"):
        execute(functools.partial(running_sum, programs=2), jnp.ones((3, 16)))
