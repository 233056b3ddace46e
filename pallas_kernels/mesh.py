"""The mesh set by `jax.set_mesh`, if any: XLA cannot partition a Pallas call over it."""

from __future__ import annotations

import jax

BATCH_AXIS, HEADS_AXIS = "data", "model"


def on_one_device() -> bool:
    """Whether there is no mesh, or one of a single device."""
    return jax.sharding.get_abstract_mesh().size <= 1


def batch_axis(size: int) -> str | None:
    """The mesh axis that shards `size` sequences, or rows of them; None if it does not divide
    them."""
    devices = dict(jax.sharding.get_abstract_mesh().shape).get(BATCH_AXIS, 1)
    return BATCH_AXIS if devices > 1 and size % devices == 0 else None
