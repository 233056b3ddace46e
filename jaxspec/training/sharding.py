"""Where a training state lives on a mesh (`jaxspec.sharding`), and how processes share batches.

Sequences are divided along `data`, and so are the drafter's weights and its optimizer (fully
sharded data parallelism); the frozen target is divided along `model` (tensor parallelism). XLA
inserts the communication; results equal those of one device up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxspec.sharding import DATA


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """A sharding per array of a training state: its longest axis that divides evenly."""

    def sharding(x):
        axes = sorted(range(x.ndim), key=lambda axis: -x.shape[axis])
        axis = next((axis for axis in axes if x.shape[axis] % mesh.shape[DATA] == 0), None)
        cut = () if axis is None else (*[None] * axis, DATA)
        return NamedSharding(mesh, PartitionSpec(*cut))

    return jax.tree.map(sharding, state)


def local_rows(mesh: Mesh | None, micro_batch: int) -> list[int]:
    """The rows of a micro-batch that devices of this process hold, ascending.

    Where a copy of the target is cut over devices of several processes, these hold the same.

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
            f"the {mesh.size} devices of the mesh are all of other processes than number "
            f"{jax.process_index()}; train on the {jax.device_count()} devices of all of them"
        )
    return sorted({i for (part,) in held.values() for i in range(micro_batch)[part]})


def place_batch(mesh: Mesh | None, arrays: Any, rows: Sequence[int], micro_batch: int) -> Any:
    """Micro-batches [n, b, T, ...] on the devices, each process giving what its own hold.

    Args:
      arrays: the `local_rows` of each micro-batch.
      rows: which these are.
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
    """Every array whole on every device, so that each process can read it."""
    if mesh is None:
        return tree
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def any_process(flag: bool) -> bool:
    """Whether `flag` is true in any process; all processes must call this."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())
