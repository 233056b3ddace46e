"""Whole decoding steps at published sizes, compiled for H100s from shapes alone.

This module sits above the library it inspects: nothing imports it but the command line here.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib

import jax
import jax.numpy as jnp

from jaxspec.config import TargetConfig, TreeConfig
from jaxspec.decoding.loop import decode
from jaxspec.decoding.prefill import prefill
from jaxspec.decoding.sampling import SamplingRows
from jaxspec.decoding.state import Decoder, Params, Requests
from jaxspec.drafters.block import BlockDrafter, block_params
from jaxspec.drafters.head import abstract_weights
from jaxspec.drafters.plain import Plain
from jaxspec.models.params import abstract_params
from jaxspec.models.presets import PRESETS
from jaxspec.planning import published_drafter
from jaxspec.sharding import shardings
from jaxspec.trees.tree import DraftTree, root_only
from pallas_kernels.h100.compile import Program, compile_for_h100
from pallas_kernels.h100.target import BYTES_PER_SECOND, FLOPS_PER_SECOND, MEMORY_BYTES, mesh

DTYPE = jnp.bfloat16
OURS = ("tree_attention", "grouped_matmul")
PREFILL_CHUNK = 512
DRAFT_BLOCK = 16


@dataclasses.dataclass(frozen=True)
class Step:
    """What is compiled.

    Attributes:
      kind: "decode" (one token per round), "verify" (a tree that costs nothing to draft),
        "prefill" (one chunk of a prompt), "draft" (the drafter's pass and its tree) or "round"
        (the two together); all but "draft" inside their loops, as they run.
      nodes: N of the tree.
      context: S, rows of the caches.
      devices: the model is sharded over them.
    """

    model: str
    kind: str
    nodes: int = 1
    context: int = 4096
    batch: int = 1
    devices: int = 1

    def __str__(self) -> str:
        return (
            f"{self.model} {self.kind} N={self.nodes} S={self.context} B={self.batch} "
            f"on {self.devices}"
        )

    @property
    def config(self) -> TargetConfig:
        return PRESETS[self.model]

    @property
    def drafter(self):
        if self.kind in ("draft", "round"):
            return BlockDrafter(
                published_drafter(self.config), TreeConfig("best_first", size=self.nodes)
            )
        return Given(self.nodes) if self.kind == "verify" else Plain()


MODELS = ("qwen3-0.6b", "qwen3-4b", "qwen3-8b", "qwen3-14b", "qwen3-32b", "qwen3-30b-a3b")
KINDS = (
    ("decode", 1),
    ("verify", 64),
    ("verify", 128),
    ("verify", 256),
    ("prefill", 1),
    ("draft", 64),
    ("round", 64),
)
DECODING = ("decode", "verify", "round")


def steps(quick: bool = False) -> list[Step]:
    """The gated steps of Qwen3-8B; with the rest, every size, context and device count."""
    gated = [Step("qwen3-8b", "verify", nodes) for nodes in (64, 128, 256)]
    gated += [
        Step("qwen3-8b", "decode"),
        Step("qwen3-8b", "round", 64),
        Step("qwen3-8b", "round", 64, context=32_768, batch=4),
    ]
    if quick:
        return gated
    rest = [
        Step(model, kind, nodes, context, devices=devices)
        for devices in (1, 8, 4, 2)
        for context in (4096, 32_768)
        for model in MODELS
        for kind, nodes in KINDS
    ]
    return gated + [step for step in rest if step not in gated]


@dataclasses.dataclass(frozen=True)
class Given:
    """A drafter whose tree comes from its state: what is left of a round is verification."""

    size: int
    depth: int = DRAFT_BLOCK - 1
    taps: tuple[int, ...] = ()
    verify_sizes: tuple[int, ...] = ()

    def init(self, params, batch: int, capacity: int) -> DraftTree:
        return root_only(jnp.zeros(batch, jnp.int32), size=self.size)

    def observe(self, params, state: DraftTree, committed) -> DraftTree:
        return state

    def draft(self, params, state: DraftTree, anchor, position, budget):
        return dataclasses.replace(state, tokens=state.tokens.at[:, 0].set(anchor)), state


def compile_step(step: Step, cache: pathlib.Path | None = None) -> Program:
    """Compiles it for `step.devices` H100s; memory and traffic are those of one of them."""
    decoder = Decoder(step.config, step.drafter, chunk=PREFILL_CHUNK)
    params = _abstract_params(step)
    requests = _abstract_requests(step)
    state = jax.eval_shape(functools.partial(prefill, decoder), params, requests)
    devices = mesh(step.devices, heads=math.gcd(step.devices, step.config.num_kv_heads))
    put = functools.partial(_on_mesh, mesh=devices)
    params, requests, state = put(params), put(requests), put(state)
    rows, rounds = put(
        [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((step.batch,), ())]
    )
    function, args = {
        "prefill": (prefill, (decoder, params, requests)),
        "draft": (_draft, (decoder.drafter, params.drafter, state.drafter, rows, rows, rows)),
    }.get(step.kind, (decode, (decoder, params, state, requests.sampling, rounds)))
    return compile_for_h100(function, *args, mesh=devices, cache=cache)


@functools.partial(jax.jit, static_argnames="drafter")
def _draft(drafter, params, state, anchor, position, budget):
    return drafter.draft(params, state, anchor, position, budget)[0]


def _abstract_params(step: Step) -> Params:
    target = abstract_params(step.config, DTYPE)
    if not isinstance(step.drafter, BlockDrafter):
        return Params(target, None)
    head = abstract_weights(step.drafter.config, DTYPE)
    return Params(target, jax.eval_shape(block_params, head, target))


def _abstract_requests(step: Step) -> Requests:
    def row(dtype=jnp.int32, *shape):
        return jax.ShapeDtypeStruct((step.batch, *shape), dtype)

    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), step.batch))
    sampling = SamplingRows(
        row(jnp.float32), row(), row(jnp.float32), row(jnp.float32), row(jnp.int32, 2), keys
    )
    return Requests(row(jnp.int32, step.context), row(), row(), row(), sampling)


def _on_mesh(tree, mesh):
    def put(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(put, tree, shardings(mesh, tree))


def floor_bytes(step: Step) -> int:
    """Bytes one device must read in a step: each weight that is used and each cache, once."""
    c = step.config
    target = abstract_params(c, DTYPE)
    tokens = step.batch * (PREFILL_CHUNK if step.kind == "prefill" else step.nodes)
    vocabulary = _bytes(target.unembed)
    rows = (
        2 * step.batch * c.num_kv_heads * step.context * c.head_dim * jnp.dtype(DTYPE).itemsize
    )
    drafter = 0
    if step.kind in ("draft", "round"):
        head = _bytes(abstract_weights(published_drafter(c), DTYPE))
        drafter = head + vocabulary + rows * published_drafter(c).num_layers
    if step.kind == "draft":
        return drafter // step.devices
    verified = vocabulary + rows * c.num_layers
    for layer in target.layers:
        used = 1.0
        if hasattr(layer.mlp, "router"):  # the experts that the tokens can reach
            used = min(1.0, tokens * c.experts_per_token / c.num_experts)
        verified += _bytes(layer.attention) + int(used * _bytes(layer.mlp))
    return (verified + drafter) // step.devices


def floor_flops(step: Step) -> int:
    """Multiplications and additions of the target's matrix products, of one device."""
    c = step.config
    tokens = step.batch * (PREFILL_CHUNK if step.kind == "prefill" else step.nodes)
    width = c.hidden_size
    heads = 2 * c.num_heads * c.head_dim + 2 * c.num_kv_heads * c.head_dim
    dense = 3 * c.intermediate_size
    sparse = 3 * c.experts_per_token * c.moe_intermediate_size
    layers = c.num_layers * heads + len(c.sparse_layers) * sparse
    layers += (c.num_layers - len(c.sparse_layers)) * dense
    rows = 1 if step.kind == "prefill" else tokens
    products = 2 * width * (tokens * layers + rows * c.vocab_size)
    attention = 4 * tokens * c.num_heads * c.head_dim * step.context * c.num_layers
    return (products + attention) // step.devices


def report(step: Step, program: Program) -> dict:
    """What the compiled step needs and moves, beside its floor; bytes are of one device.

    `floor_ms` is an estimate from datasheet numbers, the larger of reading every byte once and
    of doing every product at full rate. It is never a timing.
    """
    least = _smallest_state(step)
    flops = 0 if step.kind == "draft" else floor_flops(step)
    floor = floor_bytes(step)
    moved = program.module.moved_bytes()
    return dict(
        **dataclasses.asdict(step),
        arguments=program.arguments,
        aliased=program.aliased,
        temporaries=program.temporaries,
        peak=program.peak,
        fits=program.peak <= MEMORY_BYTES,
        most_rows=most_rows(step, program) if step.kind in DECODING else None,
        launches=program.module.launches(),
        kernels=len(program.kernels),
        copies=program.module.large_copies(least),
        host_transfers=program.module.host_transfers(),
        floor_bytes=floor,
        moved_bytes=moved,
        moved_over_floor=round(moved / floor, 3),
        exchanged_bytes=program.module.exchanged_bytes(),
        floor_flops=flops,
        floor_ms_estimate=round(
            1e3 * max(floor / BYTES_PER_SECOND, flops / FLOPS_PER_SECOND), 3
        ),
    )


def most_rows(step: Step, program: Program) -> int:
    """An estimate, on the safe side, of the largest batch that fits.

    A row more takes its share of the caches, which are what is updated in place, and at most
    its share of the temporaries.
    """
    row = (program.aliased + program.temporaries) / step.batch
    return max(0, step.batch + math.floor((MEMORY_BYTES - program.peak) / row))


def faults(step: Step, program: Program) -> list[str]:
    """What breaks the gate; the bounds are Qwen3-8B's on one device."""
    found = [
        fault
        for kernel in program.kernels
        if kernel.name.startswith(OURS)
        for fault in kernel.faults()
    ]
    measured = report(step, program)
    found += [f"copies state: {copy}" for copy in measured["copies"]]
    found += [f"waits for the host: {name}" for name in measured["host_transfers"]]
    if step.model != "qwen3-8b" or step.devices > 1:
        return found
    if not measured["fits"]:
        found.append(f"needs {measured['peak'] / 2**30:.1f} GiB")
    if step.kind in DECODING:
        cache = 2 * step.config.num_layers * _cache_bytes(step)
        if program.aliased < cache:
            found.append(f"updates {program.aliased} bytes in place, caches are {cache}")
    limit = {64: 0.15, 256: 0.4}.get(step.nodes) if step.kind == "verify" else None
    if limit and program.temporaries > limit * 2**30:
        found.append(f"temporaries are {program.temporaries / 2**30:.3f} GiB, above {limit}")
    return found


def _cache_bytes(step: Step) -> int:
    c = step.config
    return step.batch * c.num_kv_heads * step.context * c.head_dim * jnp.dtype(DTYPE).itemsize


def _smallest_state(step: Step) -> int:
    """Bytes of the smallest matrix or cache on a device; smaller copies are activations."""
    matrices = [x for x in jax.tree.leaves(abstract_params(step.config, DTYPE)) if x.ndim > 1]
    smallest = min(math.prod(x.shape) * x.dtype.itemsize for x in matrices)
    return min(smallest, _cache_bytes(step)) // step.devices


def _bytes(tree) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
