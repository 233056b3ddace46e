"""Weights stored outputs first, as in checkpoints: in 8 bits with scales, or unquantised."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from pallas_kernels.mesh import MODEL, WIDE, batch_axis, cut_axes, dividing
from pallas_kernels.scaled_matmul import scaled_matmul
from pallas_kernels.scaled_matmul.reference import scaled

# Mesh axes that shard a weight, by the letter of its axis: key/value heads (k), these merged
# with their query heads and dimensions (h), feed-forward channels (f), the vocabulary (v), and
# merged heads of gated delta nets (j).
CUT = dict.fromkeys("kh", (MODEL,)) | dict.fromkeys("fvj", WIDE)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "scale"),
    meta_fields=("inputs", "dtype", "leading"),
)
@dataclasses.dataclass(frozen=True)
class ScaledWeight:
    """A weight as 8-bit values, and scales of blocks of them.

    It replaces an array in `TargetParams`; `layers.project` multiplies with either.

    Attributes:
      values: float8_e4m3fn [*outputs, *inputs]: outputs first, as checkpoints store them.
      scale: float32, with as many axes. The last axis of outputs and the last of inputs are
        those of the values divided by the size of a block; the others are equal.
      inputs: number of input axes.
      dtype: of the activations it is multiplied with.
      leading: number of output axes that come before the inputs also in `TargetParams`: one for
        an LM head [V, M] and for experts [E, ...].
    """

    values: jax.Array
    scale: jax.Array
    inputs: int
    dtype: np.dtype
    leading: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the unquantised weight in `TargetParams`."""
        outputs, inputs = self.values.shape[: -self.inputs], self.values.shape[-self.inputs :]
        return (*outputs[: self.leading], *inputs, *outputs[self.leading :])

    def __getitem__(self, rows: jax.Array) -> ScaledWeight:
        """Chosen outputs of an LM head [V, M], each with its own scales."""
        block = self.values.shape[0] // self.scale.shape[0]
        values, scale = self.values[rows], self.scale[rows // block]
        return dataclasses.replace(self, values=values, scale=scale)

    def rounds(self, weight: jax.Array) -> bool:
        """Whether quantising a weight, outputs first, with these scales gives these values."""
        scale = scaled(jnp.ones(self.values.shape), self.scale)
        return bool(jnp.array_equal((weight / scale).astype(self.values.dtype), self.values))

    def merge_inputs(self) -> ScaledWeight:
        """The same with its inputs as one axis."""
        values, scale = (_merged(x, self.inputs) for x in (self.values, self.scale))
        return dataclasses.replace(self, values=values, scale=scale, inputs=1)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("values",), meta_fields=("inputs",)
)
@dataclasses.dataclass(frozen=True)
class OutputsFirst:
    """An unquantised weight stored outputs first, which CPUs multiply fastest.

    It replaces an array [*inputs, *outputs] of `TargetParams`. XLA:CPU multiplies a few rows
    with bfloat16 values in this order 1.3 to 2.5 times as fast: in the other order it first has
    to interleave pairs of inputs.

    Attributes:
      values: [*outputs, *inputs].
      inputs: number of input axes.
    """

    values: jax.Array
    inputs: int
    leading = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """In the order [*inputs, *outputs]."""
        outputs, inputs = self.values.shape[: -self.inputs], self.values.shape[-self.inputs :]
        return (*inputs, *outputs)

    @property
    def dtype(self) -> np.dtype:
        return self.values.dtype

    def merge_inputs(self) -> OutputsFirst:
        """The same with its inputs as one axis."""
        return OutputsFirst(_merged(self.values, self.inputs), inputs=1)


def _merged(x: jax.Array, inputs: int) -> jax.Array:
    return x.reshape(*x.shape[:-inputs], -1)


def is_scaled(x) -> bool:
    """Whether a value is an 8-bit weight; for `is_leaf` of `jax.tree`."""
    return isinstance(x, ScaledWeight)


def is_outputs_first(x) -> bool:
    """Whether a value is an `OutputsFirst`; for `is_leaf` of `jax.tree`."""
    return isinstance(x, OutputsFirst)


def by_value(weight: jax.Array | ScaledWeight | OutputsFirst) -> jax.Array:
    """A weight as one array in the order of `TargetParams`, in its activations' dtype."""
    if is_scaled(weight):
        values = scaled(weight.values, weight.scale).astype(weight.dtype)
    elif is_outputs_first(weight):
        values = weight.values
    else:
        return weight
    own = range(values.ndim - weight.inputs, values.ndim)
    return jnp.moveaxis(values, own, range(weight.leading, weight.leading + weight.inputs))


def scaled_product(
    spec: str, x: jax.Array, weight: ScaledWeight, *, function: Callable = scaled_matmul
) -> jax.Array:
    """einsum of activations and a weight with one axis of inputs: float32 result.

    Activations are rounded to the weight's dtype. Values of 8 bits are exact in it; sums and
    scales are float32.

    Args:
      spec: contracts the last axis of x with the only input axis, in the letters of the
        unquantised weight, at most one of which is in CUT.
      function: computes it from rows, values and scales; `scaled_swiglu` removes an axis of the
        weight, which the result of `spec` lacks too.
    """
    rows, (letters, out) = spec.split(",")[0], spec.split(",")[1].split("->")
    letters = letters.replace(rows[-1], "") + rows[-1]  # as the values are stored
    outputs = [letter for letter in letters[:-1] if letter in out]
    multiply = functools.partial(_multiply, function, letters, outputs, weight.dtype)
    batch = batch_axis(len(x))
    if batch is None and not cut_axes():
        return multiply(x, weight.values, weight.scale)
    letter = next((letter for letter in letters if letter in CUT), "")
    size = weight.scale.shape[letters.index(letter)] if letter else 1
    axes = dividing(jax.sharding.get_abstract_mesh(), CUT.get(letter, ()), size)

    def of_this_device(x, values, scale):
        own = multiply(x, values, scale)
        return jax.lax.psum(own, axes) if axes and letter == letters[-1] else own

    def cut(letters):
        return [axes if axis == letter else None for axis in letters]

    rows, whole = [batch, *[None] * (x.ndim - 2)], PartitionSpec(*cut(letters))
    return jax.shard_map(
        of_this_device,
        in_specs=(PartitionSpec(*rows, *cut(letters[-1])), whole, whole),
        out_specs=PartitionSpec(*rows, *cut(outputs)),
        check_vma=False,
    )(x, weight.values, weight.scale)


def _multiply(function, letters, outputs, dtype, x, values, scale) -> jax.Array:
    sizes = dict(zip(letters, values.shape, strict=True))
    depth = values.shape[-1]
    rows = x.reshape(-1, depth).astype(dtype)
    out = function(rows, values.reshape(-1, depth), scale.reshape(-1, scale.shape[-1]))
    return out.reshape(*x.shape[:-1], *(sizes[letter] for letter in outputs))
