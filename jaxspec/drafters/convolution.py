"""Causal convolutions over the slots of a block, before and after a sublayer (DFlash2)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxspec.config import DrafterConfig
from jaxspec.drafters.sequential import zeros
from jaxspec.models.layers import project

Side = Callable[[jax.Array], jax.Array]  # [..., b, M] -> [..., b, M], b slots of one block


class Convolution(nnx.Module):
    """y_j -> sum over t of (base_t + delta_{j,t}) y_{j-t}, once before and once after.

    Both sides' delta come from the sublayer's normed input n before any convolution:
    delta_j = projection n_j, one number per tap and group of contiguous channels. A coefficient
    belongs to the slot that reads. What lies before the block reads as zero.

    It starts as the identity.

    Attributes:
      base: [2, K, M], before and after, tap 0 the slot itself.
      projection: [M, 2, K, G].
    """

    def __init__(self, config: DrafterConfig, *, rngs: nnx.Rngs, dtype):
        taps, width = config.conv_taps, config.hidden_size
        self.base = nnx.Param(jnp.zeros((2, taps, width), dtype).at[:, 0].set(1))
        self.projection = zeros(dtype, width, 2, taps, width // config.conv_group)

    def __call__(self, normed: jax.Array) -> tuple[Side, Side]:
        """The convolutions before and after a sublayer of normed input [..., b, M]."""
        delta = project("...m,mctg->...ctg", normed, self.projection[...])  # [..., b, 2, K, G]
        groups = delta.shape[-1]
        base = self.base[...].astype(jnp.float32)
        base = base.reshape(*base.shape[:2], groups, -1)  # [2, K, G, g]
        kernel = (base + delta[..., None]).reshape(*delta.shape[:-1], -1)  # [..., b, 2, K, M]

        def convolve(side: int, y: jax.Array) -> jax.Array:
            return sum(
                kernel[..., side, tap, :] * _earlier(y, tap) for tap in range(base.shape[1])
            )

        return lambda y: convolve(0, y), lambda y: convolve(1, y)


def sides(convolution: Convolution | None, normed: jax.Array) -> tuple[Side, Side]:
    """The convolutions of a sublayer; the identity where it has none."""
    if convolution is None:
        return (lambda y: y), (lambda y: y)
    return convolution(normed)


def _earlier(y: jax.Array, tap: int) -> jax.Array:
    """Row j holds slot j - tap: [..., b, M]."""
    if tap == 0:
        return y
    zeros = jnp.zeros_like(y[..., :tap, :])
    return jnp.concatenate([zeros, y[..., :-tap, :]], axis=-2)
