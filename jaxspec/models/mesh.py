"""The mesh axes that shard weights."""

from __future__ import annotations

import jax

WEIGHT_AXES = ("model", "rest")  # mesh axes; key/value heads are sharded over the first only


def cut_axes() -> tuple[str, ...]:
    """Axes of the mesh set by `jax.set_mesh`, if any, that weights are sharded over."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(name for name in WEIGHT_AXES if dict(mesh.shape).get(name, 1) > 1)
