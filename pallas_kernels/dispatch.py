"""Chooses between a kernel and its reference, by platform and shape."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax

from pallas_kernels.slopes import with_slope_of


def dispatch(
    reference: Callable,
    load: Callable[[], tuple[Callable, str | None]],
    arrays: tuple[jax.Array, ...],
    implementation: str | None,
) -> jax.Array:
    """Calls a kernel or its reference, with the reference's derivative.

    Args:
      reference: implementation in XLA, for any platform.
      load: returns the kernel, and the reason why it does not support these arrays, or None.
        Called only if the kernel may be used: Pallas takes a fifth of a second to import.
      implementation: "xla", "triton", or None: triton if the program is compiled for an NVIDIA
        GPU and the kernel supports the arrays, else xla.

    Raises:
      ValueError: "triton" is given and does not support these arrays.
    """
    if implementation not in (None, "xla", "triton"):
        raise ValueError(
            f"implementation is {implementation!r}; expected 'xla', 'triton' or None"
        )
    if implementation == "xla":
        return reference(*arrays)
    kernel, reason = load()
    if implementation == "triton" and reason:
        raise ValueError(f"implementation 'triton' does not take this: {reason}; use 'xla'")
    if reason:
        return reference(*arrays)
    if implementation is None:
        kernel = functools.partial(jax.lax.platform_dependent, cuda=kernel, default=reference)
    return with_slope_of(reference, kernel)(*arrays)
