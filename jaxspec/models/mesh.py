"""The axes of a mesh that cut weights, for programs that follow the cuts."""

from __future__ import annotations

import jax

WEIGHT_AXES = ("model", "rest")  # of a mesh; key/value heads are cut over the first alone


def cut_axes() -> tuple[str, ...]:
    """Axes that weights are cut over, of the mesh set by `jax.set_mesh` if there is one."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(name for name in WEIGHT_AXES if dict(mesh.shape).get(name, 1) > 1)
