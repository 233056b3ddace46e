"""What a decoding setup needs on H100s and how fast it can be at best, from shapes alone.

The programs are the ones that run, compiled for an H100 without one (`pallas_kernels.h100`).
Floors are estimates from datasheet numbers, never timings.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from jaxspec.config import DrafterConfig, TargetConfig
from jaxspec.decoding.loop import decode
from jaxspec.decoding.prefill import prefill
from jaxspec.decoding.requests import MAX_STOP_IDS
from jaxspec.decoding.sampling import SamplingRows
from jaxspec.decoding.state import Decoder, DecodeState, Params, Requests
from jaxspec.drafters.base import Drafter
from jaxspec.drafters.block import BlockDrafter, BlockParams, block_params
from jaxspec.drafters.head import abstract_weights
from jaxspec.drafters.joined import Joined
from jaxspec.models.params import MoeParams, TargetParams, abstract_params
from jaxspec.sharding import MODEL, REST, shardings
from pallas_kernels.h100.target import BYTES_PER_SECOND, FLOPS_PER_SECOND, MEMORY_BYTES

DTYPE = jnp.bfloat16
PROGRAMS = ("round", "prefill")


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is planned.

    Attributes:
      drafter: its trees have `drafter.size` nodes.
      context: S, rows of the caches; a multiple of the decoder's chunk.
    """

    target: TargetConfig
    drafter: Drafter
    context: int = 4096
    batch: int = 1
    devices: int = 1

    def __post_init__(self):
        for name in ("context", "batch", "devices"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.context % self.decoder.chunk:
            raise ValueError(
                f"context is {self.context}; expected a multiple of {self.decoder.chunk}, the "
                "tokens a prompt is run in at a time"
            )
        if self.context > self.target.max_positions:
            raise ValueError(
                f"context is {self.context}; the target has {self.target.max_positions} "
                "positions"
            )
        wide = {
            "channels": self.target.intermediate_size,
            "experts": self.target.num_experts,
        }
        for name, count in wide.items():
            if count % self.devices:
                raise ValueError(
                    f"{count} {name} cannot be cut evenly over {self.devices} devices; "
                    "expected a number that divides them"
                )

    @property
    def decoder(self) -> Decoder:
        return Decoder(self.target, self.drafter)

    @property
    def heads(self) -> int:
        """Devices over which key/value heads are cut; the others hold the same ones."""
        return math.gcd(self.devices, self.target.num_kv_heads)

    @property
    def block(self) -> DrafterConfig | None:
        """Of a drafter with weights, alone or joined with prompt lookup."""
        joined = isinstance(self.drafter, Joined)
        drafter = self.drafter.drafters[0] if joined else self.drafter
        return drafter.config if isinstance(drafter, BlockDrafter) else None


@dataclasses.dataclass(frozen=True)
class Compiled:
    """`memory_analysis` of a compiled program, bytes of one device."""

    arguments: int
    outputs: int
    aliased: int
    temporaries: int

    @property
    def peak(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporaries


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a setup needs; bytes are of one device.

    Attributes:
      parts: arguments of a round by what they are.
      repeated: bytes of them that are passed twice and take memory once: the vocabulary, which
        is the target's and given to the drafter too.
      programs: those compiled, by name, of `PROGRAMS`.
      floors: milliseconds at least, of a "plain" step (one token per row), of "draft" and
        "verify", and of a "round", which is both.
    """

    setup: Setup
    parts: dict[str, int]
    repeated: int
    programs: dict[str, Compiled]
    floors: dict[str, float]

    @property
    def state(self) -> int:
        """Weights and caches, without the compiled programs' own needs."""
        return sum(self.parts.values()) - self.repeated

    @property
    def peak(self) -> int:
        """The most that a compiled program needs; the state alone where none was compiled."""
        needs = [program.peak - self.repeated for program in self.programs.values()]
        return max([self.state, *needs])

    @property
    def fits(self) -> bool:
        return self.peak <= MEMORY_BYTES

    @property
    def most_rows(self) -> int:
        """An estimate of the largest batch: a row more takes its share of all but weights."""
        weights = sum(size for name, size in self.parts.items() if name.endswith("weights"))
        row = (self.peak + self.repeated - weights) / self.setup.batch
        return max(0, int((MEMORY_BYTES - weights + self.repeated) / row))

    def speedup(self, tau: float) -> float:
        """Over plain decoding, at best, when rounds commit `tau` tokens on average."""
        return tau * self.floors["plain"] / self.floors["round"]


def plan(setup: Setup, programs: tuple[str, ...] = PROGRAMS) -> Plan:
    """Plans a setup.

    Args:
      programs: which to compile, of `PROGRAMS`; with none, no compiler is needed. A setup whose
        weights and caches alone do not fit is not compiled.

    Raises:
      ValueError: there is no compiler for H100s here.
    """
    mesh = AbstractMesh((setup.heads, setup.devices // setup.heads), (MODEL, REST))
    params, requests, state = abstract_arguments(
        setup.decoder, context=setup.context, batch=setup.batch, mesh=mesh
    )
    rest = dataclasses.replace(state, cache=None, drafter=None)
    parts = {
        "target weights": _size(params.target),
        "drafter weights": _size(params.drafter),
        "target cache": _size(state.cache),
        "drafter state": _size(state.drafter),
        "other state": _size((rest, requests.sampling)) + 4,  # and the number of rounds
    }
    is_block = lambda x: isinstance(x, BlockParams)  # noqa: E731
    blocks = filter(is_block, jax.tree.leaves(params.drafter, is_leaf=is_block))
    repeated = sum(_size(block.vocabulary) for block in blocks)
    known = Plan(setup, parts, repeated, {}, floors(setup))
    if not known.fits:
        return known
    return dataclasses.replace(known, programs={n: _compile(setup, n) for n in programs})


def floors(setup: Setup) -> dict[str, float]:
    """Milliseconds at least, by step, at full context: the larger of reading every byte that
    is needed once and of doing every product at full rate, on one device."""
    rows, nodes = setup.batch, setup.batch * setup.drafter.size
    found = {
        "plain": _milliseconds(setup, *_target_floor(setup, rows)),
        "draft": _milliseconds(setup, *_draft_floor(setup)),
        "verify": _milliseconds(setup, *_target_floor(setup, nodes)),
    }
    return found | {"round": found["draft"] + found["verify"]}


def _milliseconds(setup: Setup, size: float, flops: float) -> float:
    """Of work that is cut evenly over the devices."""
    seconds = max(size / BYTES_PER_SECOND, flops / FLOPS_PER_SECOND) / setup.devices
    return 1e3 * seconds


def _target_floor(setup: Setup, tokens: int) -> tuple[float, float]:
    """Bytes and floating point operations of one forward over so many tokens of all rows."""
    c, params = setup.target, abstract_params(setup.target, DTYPE)
    size, values = _bytes(params.unembed), math.prod(params.unembed.shape)
    for layer in params.layers:
        size += _bytes(layer.attention)
        values += _values((layer.attention.qkv, layer.attention.out))
        if isinstance(layer.mlp, MoeParams):
            experts = (layer.mlp.gate_up, layer.mlp.down)
            reached = min(1.0, tokens * c.experts_per_token / c.num_experts)
            size += _bytes(layer.mlp.router) + reached * _bytes(experts)
            values += _values(layer.mlp.router)
            values += _values(experts) * c.experts_per_token / c.num_experts
        else:
            size += _bytes(layer.mlp)
            values += _values((layer.mlp.gate_up, layer.mlp.down))
    size += setup.batch * _row_bytes(c) * setup.context
    attention = 4 * tokens * c.num_heads * c.head_dim * setup.context * c.num_layers
    return size, 2 * tokens * values + attention


def _draft_floor(setup: Setup) -> tuple[float, float]:
    block = setup.block
    if block is None:
        return 0.0, 0.0
    weights = abstract_weights(block, DTYPE)
    vocabulary = block.vocab_size * block.hidden_size
    slots = setup.batch * block.block_size
    size = _bytes(weights) + vocabulary * jnp.dtype(DTYPE).itemsize
    size += setup.batch * _row_bytes(block) * setup.context
    return size, 2 * slots * (_values(weights) + vocabulary)


def _row_bytes(c: TargetConfig | DrafterConfig) -> int:
    """Of keys and values of one token."""
    return 2 * c.num_layers * c.num_kv_heads * c.head_dim * jnp.dtype(DTYPE).itemsize


def abstract_arguments(
    decoder: Decoder, *, context: int, batch: int, mesh: Mesh | AbstractMesh
) -> tuple[Params, Requests, DecodeState]:
    """What `prefill` and `decode` take, as shapes placed on a mesh, in bfloat16."""
    target = abstract_params(decoder.config, DTYPE)

    def drafter_params(drafter: Drafter) -> Any:
        if isinstance(drafter, Joined):
            return tuple(map(drafter_params, drafter.drafters))
        if not isinstance(drafter, BlockDrafter):
            return ()
        return jax.eval_shape(block_params, abstract_weights(drafter.config, DTYPE), target)

    params = Params(target, drafter_params(decoder.drafter))
    requests = _abstract_requests(context, batch)
    state = jax.eval_shape(functools.partial(prefill, decoder), params, requests)
    return tuple(placed(mesh, tree) for tree in (params, requests, state))


def placed(mesh: Mesh | AbstractMesh, tree: Any) -> Any:
    """Shapes with their places on a mesh (`jaxspec.sharding`)."""
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        tree,
        shardings(mesh, tree),
    )


def _abstract_requests(context: int, batch: int) -> Requests:
    def row(dtype=jnp.int32, *shape):
        return jax.ShapeDtypeStruct((batch, *shape), dtype)

    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    sampling = SamplingRows(
        temperature=row(jnp.float32),
        top_k=row(),
        top_p=row(jnp.float32),
        min_p=row(jnp.float32),
        stop_ids=row(jnp.int32, MAX_STOP_IDS),
        key=keys,
    )
    return Requests(row(jnp.int32, context), row(), row(), row(), sampling)


def _compile(setup: Setup, name: str) -> Compiled:
    from pallas_kernels.h100 import target
    from pallas_kernels.h100.compile import OPTIONS

    try:
        mesh = target.mesh(setup.devices, heads=setup.heads)
    except RuntimeError as error:
        raise ValueError(f"{error}; or plan without compiling (--no-compile)") from None
    params, requests, state = abstract_arguments(
        setup.decoder, context=setup.context, batch=setup.batch, mesh=mesh
    )
    with target.lowering_for_h100(mesh):
        if name == "prefill":
            traced = prefill.trace(setup.decoder, params, requests)
        else:
            rounds = placed(mesh, jax.ShapeDtypeStruct((), jnp.int32))
            traced = decode.trace(setup.decoder, params, state, requests.sampling, rounds)
        lowered = traced.lower(lowering_platforms=("cuda",))
    memory = lowered.compile(compiler_options=OPTIONS).memory_analysis()
    return Compiled(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
    )


def _size(tree: Any) -> int:
    """Bytes that one device holds of placed shapes."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def _values(tree: TargetParams | Any) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def _bytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def published_drafter(target: TargetConfig) -> DrafterConfig:
    """A drafter of DFlash's and JetSpec's proportions: five layers, five taps, blocks of 16."""
    return DrafterConfig(
        vocab_size=target.vocab_size,
        hidden_size=target.hidden_size,
        intermediate_size=target.intermediate_size,
        num_layers=5,
        num_heads=target.num_heads,
        num_kv_heads=target.num_kv_heads,
        head_dim=target.head_dim,
        target_layers=target.num_layers,
        taps=tuple(1 + i * (target.num_layers - 4) // 4 for i in range(5)),
        block_size=16,
        mask_token_id=target.vocab_size - 1,
        causal=True,
        predict_next=True,
    )
