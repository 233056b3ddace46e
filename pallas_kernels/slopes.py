"""Derivatives of kernels, which have none of their own: those of the reference."""

from __future__ import annotations

from collections.abc import Callable

import jax


def with_slope_of(reference: Callable, kernel: Callable) -> Callable:
    """kernel(*arrays), differentiated as reference(*arrays) is.

    Args:
      reference: computes the same in XLA, without loops of unknown length.
      kernel: any implementation; also one that chooses between some by platform.
    """

    @jax.custom_jvp
    def call(*arrays):
        return kernel(*arrays)

    @call.defjvp
    def slope(arrays, tangents):
        return call(*arrays), jax.jvp(reference, arrays, tangents)[1]

    return call
