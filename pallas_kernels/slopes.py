"""Derivatives of kernels, taken from their references."""

from __future__ import annotations

from collections.abc import Callable

import jax


def with_slope_of(reference: Callable, kernel: Callable) -> Callable:
    """kernel(*arrays) with the derivative of reference(*arrays).

    Args:
      reference: computes the same in XLA, without loops of dynamic length.
      kernel: any implementation, possibly one that chooses by platform.
    """

    @jax.custom_jvp
    def call(*arrays):
        return kernel(*arrays)

    @call.defjvp
    def slope(arrays, tangents):
        return call(*arrays), jax.jvp(reference, arrays, tangents)[1]

    return call
