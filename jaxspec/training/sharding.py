"""Where a training state lives on a mesh (`jaxspec.sharding`), and how processes share batches.

Sequences are divided along `data`, and so are the drafter's weights and its optimizer (fully
sharded data parallelism); the frozen target is divided along `model` (tensor parallelism). XLA
inserts the communication; results equal those of one device up to rounding.
"""

from __future__ import annotations

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


def place_batch(mesh: Mesh | None, arrays: Any) -> Any:
    """This process's share of micro-batches [n, b, T, ...], joined with those of the others."""
    if mesh is None:
        return jax.device_put(arrays)
    sharding = NamedSharding(mesh, PartitionSpec(None, DATA))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), arrays)


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
