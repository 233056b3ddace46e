"""Convolution, norm and rates of a gated delta net as one Triton kernel, written in Pallas.

A program handles one node and one key head: it walks up the tree, once per tap, and computes
the query, the key and the values one after the other. It copies the gates: XLA then fuses what
follows with their use.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.delta_heads.reference import NO_PARENT, unit

WARPS, STAGES = 4, 1


def unsupported(
    inputs: jax.Array, kernel: jax.Array, log_rate: jax.Array, *_, key_dim: int
) -> str | None:
    """Why the kernel does not support these shapes; None if it does."""
    value_dim = (kernel.shape[1] - 2 * key_dim) // log_rate.shape[1]
    if key_dim & (key_dim - 1) or value_dim & (value_dim - 1):
        return f"keys have {key_dim} elements and values {value_dim}; expected powers of two"
    return None


@functools.partial(jax.jit, static_argnames=("key_dim", "interpret"))
def delta_heads_triton(
    inputs: jax.Array,
    kernel: jax.Array,
    log_rate: jax.Array,
    step_bias: jax.Array,
    window: jax.Array,
    parents: jax.Array,
    begun: jax.Array,
    *,
    key_dim: int,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """See `delta_heads_reference`; `interpret` runs it on the CPU, to check numbers."""
    (batch, n), (key_heads, group) = parents.shape, log_rate.shape
    value_dim = (kernel.shape[1] - 2 * key_dim) // group
    values = group * value_dim

    def shape(last, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((batch, n, key_heads, last), dtype)

    q, k, v, gate, decay, rate = pl.pallas_call(
        functools.partial(split_heads, value_dim=value_dim),
        out_shape=[
            *(shape(key_dim), shape(key_dim), shape(values), shape(values, inputs.dtype)),
            *(shape(group), shape(group)),
        ],
        grid=(n, key_heads, batch),
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        interpret=interpret,
        name="delta_heads",
    )(inputs, kernel, log_rate, step_bias, window, parents, begun.astype(jnp.int32))
    v, gate = (x.reshape(*decay.shape, value_dim) for x in (v, gate))
    return q, k, v, gate, decay, rate


def split_heads(
    inputs_ref,
    kernel_ref,
    log_rate_ref,
    step_bias_ref,
    window_ref,
    parents_ref,
    begun_ref,
    q_ref,
    k_ref,
    v_ref,
    gate_ref,
    decay_ref,
    rate_ref,
    *,
    value_dim: int,
):
    """The query, the key, the R values and their gates of one node and one key head."""
    node, head, b = (pl.program_id(axis) for axis in range(3))
    n, group = parents_ref.shape[1], decay_ref.shape[-1]
    key_dim, before, channels = q_ref.shape[-1], window_ref.shape[1], window_ref.shape[-1]
    row = b * n + node
    begun = begun_ref[b] == 1

    def parent_of(place):
        """One step up the line of the window's inputs and then the nodes'."""
        parent = parents_ref[b, jnp.maximum(place - before, 0)]
        above = jnp.where(parent == NO_PARENT, before - 1, parent + before)
        return jnp.where(place < before, jnp.maximum(place - 1, 0), above)

    places = [node + before]
    for _ in range(before):
        places.append(parent_of(places[-1]))

    def read(place, lanes):
        of_nodes = plgpu.load(
            inputs_ref.at[b * n + jnp.maximum(place - before, 0), head, lanes],
            mask=jnp.broadcast_to(place >= before, lanes.shape),
            other=0.0,
        )
        of_window = plgpu.load(
            window_ref.at[b, jnp.minimum(place, before - 1), head, lanes],
            mask=jnp.broadcast_to((place < before) & begun, lanes.shape),
            other=0.0,
        )
        return of_nodes.astype(jnp.float32) + of_window

    def convolved(first, size):
        """Channels [first, first + size) after the convolution and its activation."""
        lanes = first + jnp.arange(size)
        total = jnp.zeros(size, jnp.float32)
        for tap, place in zip(reversed(range(before + 1)), places, strict=True):
            weight = plgpu.load(kernel_ref.at[head, lanes, tap]).astype(jnp.float32)
            total = total + weight * read(place, lanes)
        return total * sigmoid(total)

    def store(ref, first, x):
        plgpu.store(ref.at[b, node, head, first + jnp.arange(x.size)], x)

    store(q_ref, 0, unit(convolved(0, key_dim)) * key_dim**-0.5)
    store(k_ref, 0, unit(convolved(key_dim, key_dim)))
    for first in range(0, group * value_dim, value_dim):
        store(v_ref, first, convolved(2 * key_dim + first, value_dim))
        lanes = channels + first + jnp.arange(value_dim)
        store(gate_ref, first, plgpu.load(inputs_ref.at[row, head, lanes]))

    members = jnp.arange(pl.next_power_of_2(group))
    real = members < group
    columns = inputs_ref.shape[-1] - 2 * group + members

    def load(ref, *place):
        return plgpu.load(ref.at[place], mask=real, other=0.0).astype(jnp.float32)

    rate, step = (load(inputs_ref, row, head, at) for at in (columns, columns + group))
    step = step + load(step_bias_ref, head, members)
    softplus = jnp.maximum(step, 0.0) + lax.log1p(jnp.exp(-jnp.maximum(step, -step)))
    decay = -jnp.exp(load(log_rate_ref, head, members)) * softplus
    plgpu.store(decay_ref.at[b, node, head, members], decay, mask=real)
    plgpu.store(rate_ref.at[b, node, head, members], sigmoid(rate), mask=real)


def sigmoid(x: jax.Array) -> jax.Array:
    return 1.0 / (1.0 + jnp.exp(-x))
