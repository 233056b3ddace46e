"""Chooses between a kernel and its reference, by platform and shape."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels.slopes import with_slope_of


def dispatch(
    reference: Callable,
    load: Callable[[], tuple[Callable, str | None]],
    arrays: tuple[jax.Array, ...],
    implementation: str | None,
    *,
    xla: Callable | None = None,
) -> Any:
    """Calls a kernel or XLA's implementation, with the reference's derivative.

    Args:
      reference: for any platform.
      load: returns the kernel, of Triton or Mosaic, and the reason why it does not support
        these arrays, or None.
        Called only if the kernel may be used: Pallas takes a fifth of a second to import.
      implementation: "xla", "triton", or None: triton if the program is compiled for an NVIDIA
        GPU and the kernel supports the arrays, else xla.
      xla: a faster implementation for any platform; the reference by default.

    Raises:
      ValueError: "triton" is given and does not support these arrays.
    """
    check_implementation(implementation)
    plain = reference if xla is None else with_slope_of(reference, xla)
    if implementation == "xla":
        return plain(*arrays)
    kernel, reason = load()
    if implementation == "triton":
        check_support(reason)
    if reason:
        return plain(*arrays)
    if implementation is None:
        other = xla or reference
        kernel = functools.partial(jax.lax.platform_dependent, cuda=kernel, default=other)
    return with_slope_of(reference, kernel)(*arrays)


def check_implementation(implementation: str | None) -> None:
    """Raises ValueError for an unknown implementation."""
    if implementation not in (None, "xla", "triton"):
        raise ValueError(
            f"implementation is {implementation!r}; expected 'xla', 'triton' or None"
        )


def check_support(reason: str | None) -> None:
    """Raises ValueError if there is a reason why the kernel does not support its arrays."""
    if reason:
        raise ValueError(f"implementation 'triton' does not take this: {reason}; use 'xla'")
