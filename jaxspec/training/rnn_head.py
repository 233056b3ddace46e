"""How the transition of an RNN head is trained, so that it learns at all in a short run.

Its inputs are hundreds of numbers, whose sign a few steps of AdamW settle; then tanh is
saturated and passes no gradient (measured: examples/shipped_drafter/README.md). So the head
starts as a Markov head, and its transition moves more slowly than the rest.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

JOINT = ("sequential", "joint")  # `Recurrent.joint`, [2 R + M, 3 R]
RATE = 1 / 20  # of the learning rate


def as_markov(weights: nnx.State) -> nnx.State:
    """Weights whose RNN head, if there is one, passes the previous token's vector on."""

    def only_previous(joint):
        rank = joint.shape[1] // 3
        rows = jnp.eye(joint.shape[0], rank, -rank, joint.dtype)
        return joint.at[:, 2 * rank :].set(rows)

    return _changed(weights, only_previous)


def slowed(updates: nnx.State) -> nnx.State:
    """An optimizer's updates, those of an RNN head's transition times `RATE`."""
    return _changed(updates, lambda update: RATE * update)


def _changed(state: nnx.State, change) -> nnx.State:
    flat = dict(nnx.to_flat_state(state))
    if JOINT in flat:
        flat[JOINT] = flat[JOINT].replace(change(flat[JOINT][...]))
    return nnx.from_flat_state(list(flat.items()))
