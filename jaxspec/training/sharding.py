"""Where arrays live on a mesh of devices, named ("data", "model").

Sequences are divided along `data`, and so are the drafter's weights and its optimizer (fully
sharded data parallelism); the frozen target is divided along `model` (tensor parallelism). XLA
inserts the communication; results equal those of one device up to rounding.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxspec.models.params import TargetParams

DATA, MODEL = "data", "model"

# The axis of each weight of the target that is divided; the others are on every device.
TENSOR_AXES = {
    "embed": 0,
    "lm_head": 0,
    "qkv": 1,
    "qkv_bias": 0,
    "out": 0,
    "gate_up": -1,
    "down": -2,
}


def make_mesh(data: int, model: int = 1) -> Mesh:
    """A mesh of the first data · model devices, those of all processes.

    Raises:
      ValueError: there are fewer devices.
    """
    if data * model > jax.device_count():
        raise ValueError(
            f"a mesh of {data} x {model} needs {data * model} devices; there are "
            f"{jax.device_count()}"
        )
    devices = jax.devices()[: data * model]
    axes = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((data, model), (DATA, MODEL), axis_types=axes, devices=devices)


def target_shardings(mesh: Mesh, params: TargetParams) -> TargetParams:
    """A sharding per weight of the target."""

    def sharding(path, x):
        axis = TENSOR_AXES.get(path[-1].name)
        return _divided(mesh, x, MODEL, [] if axis is None else [axis % x.ndim])

    return jax.tree.map_with_path(sharding, params)


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """A sharding per array of a training state: its longest axis that divides evenly."""

    def sharding(x):
        axes = sorted(range(x.ndim), key=lambda axis: -x.shape[axis])
        return _divided(mesh, x, DATA, axes)

    return jax.tree.map(sharding, state)


def place_batch(mesh: Mesh | None, arrays: Any) -> Any:
    """This process's share of micro-batches [n, b, T], joined with those of the others."""
    if mesh is None:
        return arrays
    sharding = NamedSharding(mesh, PartitionSpec(None, DATA))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), arrays)


def gather(mesh: Mesh | None, tree: Any) -> Any:
    """Every array whole on every device, so that each process can read it."""
    if mesh is None:
        return tree
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def any_process(flag: bool) -> bool:
    """Whether any process says so; all must ask."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def _divided(mesh: Mesh, x: jax.Array, name: str, axes: list[int]) -> NamedSharding:
    """Along the first of the axes that divides evenly; everywhere whole if none does."""
    parts = mesh.shape[name]
    axis = next((axis for axis in axes if x.shape[axis] % parts == 0), None)
    if axis is None:
        return NamedSharding(mesh, PartitionSpec())
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, name))
