"""Sharding of the training state over a mesh, and of batches over processes.

Sequences are sharded along `data`, and so are the drafter's weights and its optimizer (fully
sharded data parallelism); the frozen target is sharded along `model` (tensor parallelism). XLA
inserts the communication; results equal those of one device up to rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxspec.sharding import DATA


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """A sharding per array of a training state, along its longest axis that divides evenly."""

    def sharding(x):
        axes = sorted(range(x.ndim), key=lambda axis: -x.shape[axis])
        axis = next((axis for axis in axes if x.shape[axis] % mesh.shape[DATA] == 0), None)
        cut = () if axis is None else (*[None] * axis, DATA)
        return NamedSharding(mesh, PartitionSpec(*cut))

    return jax.tree.map(sharding, state)


def local_rows(mesh: Mesh | None, micro_batch: int) -> list[int]:
    """The rows of a micro-batch that devices of this process hold, ascending.

    Processes that share one copy of the target hold the same rows.

    Raises:
      ValueError: the mesh has no device of this process.
    """
    if mesh is None:
        return list(range(micro_batch))
    held = NamedSharding(mesh, PartitionSpec(DATA)).addressable_devices_indices_map(
        (micro_batch,)
    )
    if not held:
        raise ValueError(
            f"the mesh of {mesh.size} devices has none of process {jax.process_index()}; train "
            f"on all {jax.device_count()} devices"
        )
    return sorted({i for (part,) in held.values() for i in range(micro_batch)[part]})


def place_batch(mesh: Mesh | None, arrays: Any, rows: Sequence[int], micro_batch: int) -> Any:
    """Puts micro-batches [n, b, T, ...] on the devices; each process gives its own rows.

    Args:
      arrays: the `local_rows` of each micro-batch.
      rows: their indices.
      micro_batch: b.
    """
    if mesh is None:
        return jax.device_put(arrays)
    sharding = NamedSharding(mesh, PartitionSpec(None, DATA))
    where = {row: i for i, row in enumerate(rows)}

    def place(x):
        def part(index):
            own = [where[row] for row in range(micro_batch)[index[1]]]
            return x[:, own][(index[0], slice(None), *index[2:])]

        shape = (x.shape[0], micro_batch, *x.shape[2:])
        return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(place, arrays)


def gather(mesh: Mesh | None, tree: Any) -> Any:
    """Replicates every array on all devices, so that each process can read it.

    It is one program: many small ones in flight can hang the CPU client (`checksums`).
    """
    return tree if mesh is None else _replication(mesh)(tree)


@functools.cache
def _replication(mesh: Mesh) -> Callable[[Any], Any]:
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))
