"""Memory by part and at its peak, and lower bounds on the time of a round."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import AbstractMesh

from jaxspec.drafters.head import Vocabulary
from jaxspec.planning.floors import draft_floor, target_floor
from jaxspec.planning.programs import device_mesh, program_memory
from jaxspec.planning.setup import Setup, abstract_arguments
from jaxspec.sharding import MODEL, REST
from pallas_kernels.h100.compile import Memory
from pallas_kernels.h100.target import MEMORY_BYTES

PLANNED = ("round", "prefill")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Memory and floors of a setup; bytes are per device.

    Attributes:
      parts: bytes of a round's arguments, by kind.
      repeated: bytes passed twice but held once: embedding and LM head, passed to both target
        and drafter.
      programs: memory of the compiled programs, by name.
      floors: lower bounds in milliseconds of a "plain" step (one token per row), of "draft" and
        "verify", and of a "round", which is both.
    """

    setup: Setup
    parts: dict[str, int]
    repeated: int
    programs: dict[str, Memory]
    floors: dict[str, float]

    @property
    def state(self) -> int:
        """Bytes of weights and caches, without the compiled programs' temporaries."""
        return sum(self.parts.values()) - self.repeated

    @property
    def peak(self) -> int:
        """Maximum bytes that a compiled program needs; `state` if none was compiled."""
        needs = [program.peak - self.repeated for program in self.programs.values()]
        return max([self.state, *needs])

    @property
    def fits(self) -> bool:
        return self.peak <= MEMORY_BYTES

    @property
    def most_rows(self) -> int:
        """An estimate of the largest batch that fits: everything but weights grows with it."""
        weights = sum(size for name, size in self.parts.items() if name.endswith("weights"))
        return most_rows(self.setup, self.peak, growing=self.peak + self.repeated - weights)

    def speedup(self, tau: float) -> float:
        """Upper bound of the speedup over plain decoding when rounds commit `tau` tokens on
        average."""
        return tau * self.floors["plain"] / self.floors["round"]


def most_rows(setup: Setup, peak: int, *, growing: int) -> int:
    """Estimates the largest batch that fits from the peak bytes of this one.

    Args:
      growing: the part of the peak that grows in proportion to the batch.
    """
    row = growing / setup.batch
    return max(0, setup.batch + math.floor((MEMORY_BYTES - peak) / row))


def plan(setup: Setup, programs: tuple[str, ...] = PLANNED) -> Plan:
    """Plans a setup.

    Args:
      programs: programs of `PLANNED` to compile; () needs no compiler. A setup whose weights
        and caches alone do not fit is not compiled.

    Raises:
      ValueError: no compiler for H100s is installed.
    """
    mesh = AbstractMesh((setup.heads, setup.devices // setup.heads), (MODEL, REST))
    params, requests, state = abstract_arguments(setup, mesh)
    rest = dataclasses.replace(state, cache=None, drafter=None)
    parts = {
        "target weights": _size(params.target),
        "drafter weights": _size(params.drafter),
        "target cache": _size(state.cache),
        "drafter state": _size(state.drafter),
        "other state": _size((rest, requests.sampling)) + 4,  # and the number of rounds
    }
    shared = lambda x: isinstance(x, Vocabulary)  # noqa: E731
    found = filter(shared, jax.tree.leaves(params.drafter, is_leaf=shared))
    repeated = sum(_size(vocabulary) for vocabulary in found)
    known = Plan(setup, parts, repeated, {}, floors(setup))
    if not known.fits:
        return known
    if programs:
        try:
            device_mesh(setup)
        except RuntimeError as error:
            raise ValueError(f"{error}; or plan without compiling (--no-compile)") from None
    compiled = {name: program_memory(setup, name) for name in programs}
    return dataclasses.replace(known, programs=compiled)


def floors(setup: Setup) -> dict[str, float]:
    """Lower bounds in milliseconds, by step, at full context."""
    found = {
        "plain": target_floor(setup, setup.batch).milliseconds,
        "draft": draft_floor(setup).milliseconds,
        "verify": target_floor(setup, setup.batch * setup.drafter.size).milliseconds,
    }
    return found | {"round": found["draft"] + found["verify"]}


def _size(tree: Any) -> int:
    """Bytes that one device holds of placed shapes."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )
