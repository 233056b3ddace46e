"""JAX's settings for the programs of this library, whatever the process has set for its own."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Iterator

import jax


@contextlib.contextmanager
def own_settings() -> Iterator[None]:
    """32-bit numbers, NumPy's promotions, compiled programs, and keys that vmap leaves alone.

    With other generators of random numbers a row's noise would depend on its batch. Holds for
    the calling thread, and as a decorator for a function. A process of commands leaves such
    settings out of its environment (`jaxspec.__main__`).
    """
    with (
        jax.enable_x64(False),
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
        jax.default_prng_impl("threefry2x32"),
        jax.disable_jit(False),
    ):
        yield


def own_settings_between_yields(function: Callable[..., Generator]) -> Callable[..., Generator]:
    """Decorator of a generator: whoever holds what it yields has settings of their own."""

    @functools.wraps(function)
    def steps(*arguments, **options):
        generator = function(*arguments, **options)
        while True:
            with own_settings():
                try:
                    item = next(generator)
                except StopIteration as end:
                    return end.value
            yield item

    return steps
