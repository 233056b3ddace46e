"""The programs of a setup, compiled for H100s from shapes."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxspec.decoding.loop import decode
from jaxspec.decoding.prefill import prefill
from jaxspec.planning.setup import Setup, abstract_arguments, placed
from pallas_kernels.h100 import target
from pallas_kernels.h100.compile import Memory, Program, compile_for_h100, memory_on_h100

PROGRAMS = ("round", "prefill", "draft")


def compile_program(setup: Setup, name: str, cache: pathlib.Path | None = None) -> Program:
    """Compiles one of `PROGRAMS` for `setup.devices` H100s; figures are per device.

    Args:
      name: "round" (drafting, verification and commit, in their loop), "prefill" (a prompt's
        chunks, in their loop) or "draft" (the drafter's pass and its tree alone).
      cache: a folder of results; a program compiled before is not compiled again.

    Raises:
      RuntimeError: there is no compiler for H100s here.
    """
    mesh = device_mesh(setup)
    function, arguments = _call(setup, name, mesh)
    return compile_for_h100(function, *arguments, mesh=mesh, cache=cache)


def program_memory(setup: Setup, name: str) -> Memory:
    """Memory of one of `PROGRAMS`, on one device; quicker than all of `compile_program`.

    Raises:
      RuntimeError: there is no compiler for H100s here.
    """
    mesh = device_mesh(setup)
    function, arguments = _call(setup, name, mesh)
    return memory_on_h100(function, *arguments, mesh=mesh)


def device_mesh(setup: Setup) -> Mesh:
    """A mesh of the setup's H100s, which need not exist.

    Raises:
      RuntimeError: there is no compiler for H100s here.
    """
    return target.mesh(setup.devices, heads=setup.heads)


def _call(setup: Setup, name: str, mesh: Mesh) -> tuple[Callable, tuple[Any, ...]]:
    """The jitted function of a program, and its arguments."""
    decoder = setup.decoder
    params, requests, state = abstract_arguments(setup, mesh)
    if name == "prefill":
        return prefill, (decoder, params, requests)
    if name == "draft":
        row = placed(mesh, jax.ShapeDtypeStruct((setup.batch,), jnp.int32))
        own = decoder.drafter, params.drafter, state.drafter
        return _draft, (*own, row, row, row, requests.sampling)
    rounds = placed(mesh, jax.ShapeDtypeStruct((), jnp.int32))
    return decode, (decoder, params, state, requests.sampling, rounds)


@functools.partial(jax.jit, static_argnames="drafter")
def _draft(drafter, params, state, anchor, position, budget, sampling):
    return drafter.draft(params, state, anchor, position, budget, sampling.noise)[0]
