"""JAX settings of this library's programs, independent of the process's own."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Iterator

import jax

from jaxspec.sharding import mesh_of


@contextlib.contextmanager
def own_settings() -> Iterator[None]:
    """Sets 32-bit types, NumPy's promotions, jit, the threefry generator, and transfers to and
    from devices for the thread.

    With another generator a row's noise would depend on its batch, under vmap. Also works as a
    decorator. The `jaxspec` program removes such settings from its environment
    (`jaxspec.__main__`).
    """
    with (
        jax.enable_x64(False),
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
        jax.default_prng_impl("threefry2x32"),
        jax.disable_jit(False),
        jax.transfer_guard("allow"),
    ):
        yield


def on_devices_of_target(function: Callable) -> Callable:
    """Decorates a function whose first argument is a target: it computes on the target's
    devices, under own settings, whatever mesh the caller has set."""

    @functools.wraps(function)
    def call(target, *arguments, **options):
        with own_settings(), mesh_of(target):
            return function(target, *arguments, **options)

    return call


def own_settings_between_yields(function: Callable[..., Generator]) -> Callable[..., Generator]:
    """Decorates a generator: own settings, and the mesh of its arguments, hold inside it, the
    caller's between its yields."""

    @functools.wraps(function)
    def steps(*arguments, **options):
        generator = function(*arguments, **options)
        while True:
            with own_settings(), mesh_of(arguments):
                try:
                    item = next(generator)
                except StopIteration as end:
                    return end.value
            yield item

    return steps
