"""The axes of meshes (`jaxspec.sharding`), and the mesh set by `jax.set_mesh`, if any: XLA
cannot partition a Pallas call over it.

Work is cut over axes of the type Auto alone. A user's program may have others: inside its own
`shard_map` a device computes by itself, and over Explicit axes arrays stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

DATA, MODEL, REST = "data", "model", "rest"
WIDE = (MODEL, REST)  # both shard weights; key/value heads are sharded over the first only


def on_one_device() -> bool:
    """Whether each device computes by itself: without a mesh, or inside `shard_map`."""
    return math.prod(_sizes(AxisType.Auto, AxisType.Explicit).values()) <= 1


def devices_along(axis: str) -> int:
    """Number of devices of the mesh along an axis; 1 where it has none."""
    return _sizes(AxisType.Auto).get(axis, 1)


def batch_axis(size: int) -> str | None:
    """The mesh axis that shards `size` sequences, or rows of them; None if it does not divide
    them."""
    devices = devices_along(DATA)
    return DATA if devices > 1 and size % devices == 0 else None


def cut_axes() -> tuple[str, ...]:
    """Axes of the mesh that weights are sharded over."""
    return tuple(name for name in WIDE if devices_along(name) > 1)


def dividing(mesh: Mesh | AbstractMesh, axes: Iterable[str], size: int) -> tuple[str, ...]:
    """The first of the `axes` that the mesh has, as many as divide `size` evenly."""
    names = [name for name in axes if name in mesh.shape]
    while names and size % math.prod(mesh.shape[name] for name in names):
        names.pop()
    return tuple(names)


def _sizes(*types: AxisType) -> dict[str, int]:
    """Sizes of the mesh's axes of these types."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {name: size for name, size, kind in axes if kind in types}
