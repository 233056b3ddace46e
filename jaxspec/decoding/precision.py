"""Exact float32 products: by default GPUs use TF32, which keeps 10 bits."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager

import jax
import jax.numpy as jnp

from jaxspec.decoding.state import Params


def precision_of(dtype) -> AbstractContextManager:
    """Precision of products for a target of this dtype: exact float32 where it is float32."""
    exact = dtype == jnp.float32
    return jax.default_matmul_precision("highest") if exact else contextlib.nullcontext()


def exact_in_float32(step: Callable) -> Callable:
    """Decorates a step of decoding: products are exact float32 if the target is float32.

    Tokens then equal plain decoding's, as forwards over trees of different sizes differ only by
    the rounding of float32 sums. Other dtypes keep the platform's precision; on a CPU nothing
    changes.

    Args:
      step: has a `Params` among its positional arguments.
    """

    @functools.wraps(step)
    def exact(*args, **kwargs):
        params = next(argument for argument in args if isinstance(argument, Params))
        with precision_of(params.target.embed.dtype):
            return step(*args, **kwargs)

    return exact
