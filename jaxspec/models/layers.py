"""Building blocks of layers. Activations are float32; matrix products take operands in the
weights' dtype and accumulate in float32."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxspec.models.scaled import OutputsFirst, ScaledWeight, scaled_product
from pallas_kernels.mesh import batch_axis, cut_axes, devices_along, on_one_device
from pallas_kernels.scaled_matmul import scaled_swiglu
from pallas_kernels.skinny_matmul import skinny_matmul


def project(
    spec: str,
    x: jax.Array,
    weight: jax.Array | ScaledWeight | OutputsFirst,
    result=jnp.float32,
) -> jax.Array:
    """einsum of activations and a weight: operands in the weight's dtype, float32 sums.

    A single row of narrow operands is multiplied twice: XLA has kernels for matrices of them,
    and for a vector widens or rearranges the whole weight, on CPUs and GPUs alike.

    Args:
      spec: names the axes of any weight in the order of its array in `TargetParams`.
      result: dtype of the result; products with 8-bit weights are always float32.
    """
    if isinstance(weight, ScaledWeight):
        return _where_it_stands(functools.partial(scaled_product, spec), x, weight)
    if isinstance(weight, OutputsFirst):
        return _project_flat(x, weight, result)
    x = x.astype(weight.dtype)
    letters, others = spec.split("->")[0].split(",")
    single = math.prod(x.shape[:-1]) == 1 and letters[-2:-1] not in others
    single = single and x.dtype != jnp.float32
    if single:
        x = jnp.repeat(x, 2, axis=-2)

    turned = others[-1] in letters  # the weight's last axis is contracted
    einsum = functools.partial(product, spec, dtype=result)
    out = _where_it_stands(einsum, x, weight) if turned else einsum(x, weight)
    return jax.lax.slice_in_dim(out, 0, 1, axis=x.ndim - 2) if single else out


def _project_flat(x: jax.Array, weight: OutputsFirst, result) -> jax.Array:
    """`project` of the last axis of x: XLA:CPU is fast with weights of two axes only."""
    outputs, width = weight.values.shape[:-1], weight.values.shape[-1]
    rows, matrix = x.reshape(-1, width), weight.values.reshape(-1, width)
    return project("tm,nm->tn", rows, matrix, result).reshape(*x.shape[:-1], *outputs)


def project_swiglu(
    x: jax.Array, gate_up: jax.Array | ScaledWeight | OutputsFirst, result=jnp.float32
) -> jax.Array:
    """silu(gate) · up of activations [..., M] and a weight [M, 2, F]: [..., F].

    Float32, except that an 8-bit weight's kernel already rounds to the weight's dtype.

    Args:
      result: dtype to which gates and ups are rounded first.
    """
    if isinstance(gate_up, ScaledWeight):
        both = functools.partial(scaled_product, "...m,mcf->...f", function=scaled_swiglu)
        return _where_it_stands(both, x, gate_up)
    return swiglu(project("...m,mcf->...cf", x, gate_up, result))


def project_out(
    x: Float[Array, "B N inputs"], weight: jax.Array | ScaledWeight | OutputsFirst
) -> Float[Array, "B N M"]:
    """The product of heads side by side and a weight [..., M].

    The weight's axes of inputs are merged: with three axes XLA would transpose it.
    """
    if isinstance(weight, (ScaledWeight, OutputsFirst)):
        weight = weight.merge_inputs()
    else:
        weight = weight.reshape(-1, weight.shape[-1])
    return project("bnh,hm->bnm", x, weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def product(spec: str, x: jax.Array, y: jax.Array, dtype=jnp.float32) -> jax.Array:
    """einsum of operands of one dtype: float32 sums, rounded to `dtype`.

    The cotangent is rounded to that dtype too. JAX's own rule multiplies a float32 cotangent
    with narrow operands, which are then widened: half as fast on CPUs, slower still on GPUs.
    """
    found = _skinny_product(spec, x, y)
    if found is not None:
        return found.astype(dtype)
    return jnp.einsum(spec, x, y, preferred_element_type=dtype)


def _skinny_product(spec: str, x: jax.Array, y: jax.Array) -> jax.Array | None:
    """The product of few rows, by a kernel measured to be faster than XLA on this GPU."""
    operands, out = spec.split("->")
    left, right = operands.split(",")
    if not on_one_device() or right[0] != left[-1] or out != left[:-1] + right[1:]:
        return None
    found = skinny_matmul(x.reshape(-1, x.shape[-1]), y.reshape(len(y), -1))
    return None if found is None else found.reshape(*x.shape[:-1], *y.shape[1:])


def _product_forward(spec, x, y, dtype):
    return product(spec, x, y, dtype), (x, y)


def _product_backward(spec, dtype, operands, slope):
    x, y = operands
    (left, right), out = spec.split("->")[0].split(","), spec.split("->")[1]
    slope = slope.astype(x.dtype)
    dx = product(f"{out},{right}->{left}", slope, y)
    dy = product(f"{out},{left}->{right}", slope, x)
    return dx.astype(x.dtype), dy.astype(y.dtype)


product.defvjp(_product_forward, _product_backward)


def _where_it_stands(function, x: jax.Array, weight: jax.Array | ScaledWeight) -> jax.Array:
    """function(x, weight), whose work on a narrow weight stays where it is used.

    XLA:CPU would hoist transposing or widening the whole weight out of a loop, in every call of
    a program. It does not hoist out of branches, so this is one; the other branch is never
    taken, not even for NaN.
    """

    def branch(x, weight):
        shape = jax.eval_shape(function, x, weight)
        never = lambda *_: jnp.zeros(shape.shape, shape.dtype)  # noqa: E731
        return jax.lax.cond(x.ravel()[0] == jnp.inf, never, function, x, weight)

    narrow = isinstance(weight, ScaledWeight) or weight.dtype != jnp.float32
    if not narrow or not x.size:
        return function(x, weight)
    return jax.lax.platform_dependent(x, weight, cpu=branch, default=function)


def lookup(table: Float[Array, "V M"], index: Int[Array, "*L"]) -> Float[Array, "*L M"]:
    """Rows of a table [V, M] in float32: index [...] -> [..., M].

    Under a mesh that shards weights, rows are sharded: each device gives its own rows and zeros
    for the others, and a sum joins them. For a single index XLA would gather the whole table.
    """
    axes = cut_axes()
    if not axes or table.shape[0] % math.prod(map(devices_along, axes)):
        return lookup_whole(table, index)

    def of_this_device(table, index):
        own = index - jax.lax.axis_index(axes) * table.shape[0]
        here = (own >= 0) & (own < table.shape[0])
        found = table[jnp.where(here, own, 0)].astype(jnp.float32)
        return jax.lax.psum(jnp.where(here[..., None], found, 0), axes)

    rows = PartitionSpec(batch_axis(len(index)))
    return jax.shard_map(
        of_this_device, in_specs=(PartitionSpec(axes), rows), out_specs=rows, check_vma=False
    )(table, index)


def lookup_whole(table: Float[Array, "V M"], index: Int[Array, "*L"]) -> Float[Array, "*L M"]:
    """`lookup` in a replicated table, without communication."""
    rows = lambda index, table: table[index].astype(jnp.float32)  # noqa: E731
    return _where_it_stands(rows, index, table)


def rms_norm(
    x: Float[Array, "*L M"], weight: Float[Array, "... M"], eps: float
) -> Float[Array, "*L M"]:
    """x / sqrt(mean(x²) + eps) · weight over the last axis, in float32."""
    x = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return x * scale * weight.astype(jnp.float32)


def rotate(
    x: Float[Array, "*L heads D"], cos: Float[Array, "*L pairs"], sin: Float[Array, "*L pairs"]
) -> Float[Array, "*L heads D"]:
    """Rotary embedding, half-split convention: pairs are (i, i + D / 2).

    Args:
      x: [..., heads, D].
      cos, sin: [..., D / 2], without the heads axis.
    """
    low, high = jnp.split(x, 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def swiglu(gate_up: Float[Array, "*L 2 F"]) -> Float[Array, "*L F"]:
    """silu(gate) · up for [..., 2, F] -> [..., F], float32."""
    gate, up = gate_up[..., 0, :].astype(jnp.float32), gate_up[..., 1, :].astype(jnp.float32)
    return jax.nn.silu(gate) * up
