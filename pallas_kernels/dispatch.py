"""Chooses between a kernel and its reference, by platform and shape."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax

ASSUMED_CARD = "NVIDIA H100 80GB HBM3"  # when a program is compiled without its GPU


def with_kernel(
    reference: Callable,
    load: Callable[[], tuple[Callable, Callable[..., str | None]]],
    *,
    xla: Callable | None = None,
) -> Callable:
    """A function as the reference, with an option `implementation`; see `dispatch`.

    Args:
      reference: takes arrays by position, and static options by name.
      load: imports the kernel, called likewise, and a function of the same arguments: why the
        kernel does not support them, or None.
      xla: see `dispatch`.
    """

    @functools.wraps(reference)
    def call(*arrays, implementation: str | None = None, **options):
        def kernel():
            run, unsupported = load()
            return functools.partial(run, **options), unsupported(*arrays, **options)

        own = functools.partial(reference, **options)
        return dispatch(own, kernel, arrays, implementation, xla=xla)

    known = inspect.signature(reference)
    option = inspect.Parameter("implementation", inspect.Parameter.KEYWORD_ONLY, default=None)
    call.__signature__ = known.replace(parameters=[*known.parameters.values(), option])
    call.__name__ = reference.__name__.removesuffix("_reference")
    return call


def dispatch(
    reference: Callable,
    load: Callable[[], tuple[Callable, str | None]],
    arrays: tuple[jax.Array, ...],
    implementation: str | None,
    *,
    xla: Callable | None = None,
) -> Any:
    """Calls a kernel or XLA's implementation; the derivative is the reference's.

    Args:
      reference: for any platform.
      load: returns the kernel, of Triton or Mosaic, and why it does not support these arrays,
        or None. Called only if it may be used: Pallas takes a fifth of a second to import.
      implementation: "xla" (any platform), "triton" (NVIDIA GPUs), or None: triton if the
        program is compiled for an NVIDIA GPU and the kernel supports the arrays, else xla.
      xla: a faster implementation for any platform; the reference by default.

    Raises:
      ValueError: "triton" is given and does not support these arrays.
    """
    if implementation not in (None, "xla", "triton"):
        raise ValueError(
            f"implementation is {implementation!r}; expected 'xla', 'triton' or None"
        )
    plain = reference if xla is None else with_slope_of(reference, xla)
    if implementation == "xla":
        return plain(*arrays)
    kernel, reason = load()
    if reason and implementation == "triton":
        raise ValueError(f"implementation 'triton' does not take this: {reason}; use 'xla'")
    if reason:
        return plain(*arrays)
    if implementation is None:
        other = xla or reference
        kernel = functools.partial(jax.lax.platform_dependent, cuda=kernel, default=other)
    return with_slope_of(reference, kernel)(*arrays)


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


def this_card() -> str:
    """The `device_kind` of the GPU that programs are compiled for; tiles depend on it."""
    on_gpu = jax.default_backend() == "gpu"
    return jax.devices()[0].device_kind if on_gpu else ASSUMED_CARD
