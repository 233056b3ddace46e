"""The axes of meshes (`jaxspec.sharding`), and the mesh set by `jax.set_mesh`, if any: XLA
cannot partition a Pallas call over it."""

from __future__ import annotations

import math
from collections.abc import Iterable

import jax
from jax.sharding import AbstractMesh, Mesh

DATA, MODEL, REST = "data", "model", "rest"
WIDE = (MODEL, REST)  # both shard weights; key/value heads are sharded over the first only


def on_one_device() -> bool:
    """Whether there is no mesh, or one of a single device."""
    return jax.sharding.get_abstract_mesh().size <= 1


def batch_axis(size: int) -> str | None:
    """The mesh axis that shards `size` sequences, or rows of them; None if it does not divide
    them."""
    devices = dict(jax.sharding.get_abstract_mesh().shape).get(DATA, 1)
    return DATA if devices > 1 and size % devices == 0 else None


def cut_axes() -> tuple[str, ...]:
    """Axes of the mesh that weights are sharded over."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(name for name in WIDE if dict(mesh.shape).get(name, 1) > 1)


def dividing(mesh: Mesh | AbstractMesh, axes: Iterable[str], size: int) -> tuple[str, ...]:
    """The first of the `axes` that the mesh has, as many as divide `size` evenly."""
    names = [name for name in axes if name in mesh.shape]
    while names and size % math.prod(mesh.shape[name] for name in names):
        names.pop()
    return tuple(names)
