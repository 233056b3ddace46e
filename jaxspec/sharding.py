"""Sharding over a mesh of devices: one table, from an array's path to its partition.

A mesh has up to three axes. `data` shards sequences (and, in training, the drafter and its
optimizer). `model` shards key/value heads. `rest` is for devices beyond the number of
key/value heads: together with `model` it shards wide axes (channels, experts, vocabulary,
heads of gated delta nets); attention heads are replicated along it.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels.mesh import DATA, MODEL, REST, WIDE, dividing

# End of a path (regular expression), and the mesh axis that shards each axis of the array. The
# first matching row with as many axes counts; an array that matches none is replicated.
RULES: tuple[tuple[str, tuple], ...] = (
    (r"(embed|unembed|lm_head)(/(values|scale))?", (WIDE, None)),  # [V, M]
    (r"qkv|q|kv", (None, MODEL, None, None)),  # [M, K, ., D]
    (r"qkv_bias", (MODEL, None, None)),  # [K, G + 2, D]
    (r"out", (MODEL, None, None, None)),  # [K, G, D, M]
    (r"gate_up", (None, None, WIDE)),  # [M, 2, F]
    (r"down", (WIDE, None)),  # [F, M]
    (r"gate_up", (WIDE, None, None, None)),  # [E, M, 2, F]
    (r"down", (WIDE, None, None)),  # [E, F, M]
    (r"(keys|values)/\d+", (None, MODEL, None, None)),  # caches [B, K, S, D]
    # the same matrices stored outputs first, and the scales of those in 8 bits
    (r"qkv/(values|scale)", (MODEL, None, None, None)),  # [K, G + 2, D, M]
    (r"out/(values|scale)", (None, MODEL, None, None)),  # [M, K, G, D]
    (r"gate_up/(values|scale)", (None, WIDE, None)),  # [2, F, M]
    (r"down/(values|scale)", (None, WIDE)),  # [M, F]
    (r"gate_up/(values|scale)", (WIDE, None, None, None)),  # [E, 2, F, M]
    (r"down/(values|scale)", (WIDE, None, None)),  # [E, M, F]
    # gated delta nets, sharded by key head together with its value heads
    (r"inputs", (None, WIDE, None)),  # [M, J, .]
    (r"inputs/values", (WIDE, None, None)),  # [J, ., M]
    (r"convolution", (WIDE, None, None)),  # [J, C, taps]
    (r"log_rate|step_bias", (WIDE, None)),  # [J, R]
    (r"output", (WIDE, None, None, None)),  # [J, R, dv, M]
    (r"output/(values|scale)", (None, WIDE, None, None)),  # [M, J, R, dv]
    (r"memory", (None, WIDE, None, None)),  # [B, J, dk, R dv]
    (r"window", (None, None, WIDE, None)),  # [B, taps - 1, J, C]
)


def make_mesh(*, data: int = 1, model: int = 1, rest: int = 1) -> Mesh:
    """A mesh of the first data · model · rest devices of all processes.

    Raises:
      ValueError: there are fewer devices.
    """
    sizes = {DATA: data, MODEL: model, REST: rest}
    count = data * model * rest
    if min(sizes.values()) < 1 or count > jax.device_count():
        raise ValueError(
            f"a mesh of {data} x {model} x {rest} (data, model, rest) needs {count} devices; "
            f"there are {jax.device_count()}"
        )
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),
        devices=jax.devices()[:count],
    )


def check_mesh(mesh: Mesh) -> None:
    """Raises ValueError unless a mesh is as from `make_mesh`; JAX's own default is not."""
    automatic = all(kind == AxisType.Auto for kind in mesh.axis_types)
    if set(mesh.axis_names) != {DATA, MODEL, REST} or not automatic:
        raise ValueError(
            f"the mesh has axes {mesh.axis_names} of types {mesh.axis_types}; expected one of "
            "jaxspec.sharding.make_mesh"
        )


def decoding_mesh(devices: int, num_kv_heads: int) -> Mesh:
    """A mesh for decoding: heads over as many devices as divide them, the others on `rest`.

    Raises:
      ValueError: there are fewer devices.
    """
    model = math.gcd(devices, num_kv_heads)
    return make_mesh(model=model, rest=devices // model)


def join_processes() -> None:
    """Makes this process one of several that share a mesh; call it before JAX is used.

    The processes find each other through JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID, or else, under SLURM and Open MPI, through `jax.distributed`.

    Raises:
      ValueError: neither works.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = [os.environ.get(name) for name in names]
    try:
        if all(given):
            address, count, process = given
            jax.distributed.initialize(address, int(count), int(process))
        else:
            jax.distributed.initialize()
    except ValueError as error:
        raise ValueError(
            f"the other processes cannot be found ({error}); start this under SLURM's srun, or "
            f"set {', '.join(names)}"
        ) from error


def any_process(flag: bool) -> bool:
    """Whether `flag` is true in any process; all processes must call this."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def first_process(value: Any) -> np.ndarray:
    """The first process's value, an array or number; all processes must call this."""
    return np.asarray(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def over_processes(tree: Any) -> bool:
    """Whether a pytree's arrays lie on devices of several processes, which then run the same
    programs together."""
    return not jax.tree.leaves(tree)[0].is_fully_addressable


@contextlib.contextmanager
def mesh_of(tree: Any) -> Iterator[Mesh | None]:
    """The context to compute in with a pytree's arrays: their mesh, or none if they are on
    none, whatever mesh is set outside. Inside a traced function nothing changes."""
    arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]
    traced = any(isinstance(x, jax.core.Tracer) for x in (*arrays, jnp.zeros(())))
    place = arrays[0].sharding if arrays and not traced else None
    mesh = place.mesh if isinstance(place, NamedSharding) else None
    if mesh is not None:
        context = jax.set_mesh(mesh)
    elif traced or jax.sharding.get_abstract_mesh().empty:
        context = contextlib.nullcontext()
    else:  # JAX unsets a mesh by one without axes
        device = next(iter(place.device_set)) if place else jax.local_devices()[0]
        context = jax.set_mesh(Mesh(np.array(device, object), ()))
    with context:
        yield mesh


def shardings(mesh: Mesh, tree: Any, rules: Sequence[tuple[str, tuple]] = RULES) -> Any:
    """A sharding per array of a pytree: weights, caches, states, or their shapes.

    An axis that does not divide evenly over its devices is sharded over fewer, or replicated.

    Args:
      rules: as `RULES`; with (), every array is replicated.
    """

    def sharding(path, x):
        name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        return NamedSharding(mesh, _partition(mesh, name, x.shape, rules))

    return jax.tree.map_with_path(sharding, tree)


def place(mesh: Mesh, tree: Any, rules: Sequence[tuple[str, tuple]] = RULES) -> Any:
    """Shards a pytree of arrays, whole in every process, as `shardings` says."""
    return jax.device_put(tree, shardings(mesh, tree, rules))


def beside(tree: Any, weights: Any) -> Any:
    """Commits a pytree to the weights' device, as a compiled call on them would.

    A loop would compile twice if its first call got uncommitted arrays and later calls its own
    committed results. Weights on a mesh, or uncommitted, leave the tree as it is.
    """
    first = jax.tree.leaves(weights)[0]
    bound = isinstance(first, jax.Array) and first.committed
    on_mesh = not bound or isinstance(first.sharding, NamedSharding)
    return tree if on_mesh else jax.device_put(tree, first.sharding)


def _partition(mesh: Mesh, name: str, shape: tuple[int, ...], rules) -> PartitionSpec:
    for pattern, axes in rules:
        if len(axes) == len(shape) and re.search(rf"(^|/)({pattern})$", name):
            cuts = [_fitting(mesh, axis, n) for axis, n in zip(axes, shape, strict=True)]
            while cuts and cuts[-1] is None:
                cuts.pop()
            return PartitionSpec(*cuts)
    return PartitionSpec()


def _fitting(mesh: Mesh, axis: str | tuple[str, ...] | None, size: int):
    wanted = () if axis is None else (axis,) if isinstance(axis, str) else axis
    names = dividing(mesh, wanted, size)
    return names if len(names) > 1 else next(iter(names), None)
