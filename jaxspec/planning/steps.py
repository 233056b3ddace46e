"""The gate over whole decoding steps at published sizes: memory, copies, launches, traffic.

`python -m jaxspec.planning` runs it.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib

import jax
import jax.numpy as jnp

from jaxspec.config import TreeConfig
from jaxspec.drafters.base import Drafter
from jaxspec.drafters.block import BlockDrafter
from jaxspec.drafters.plain import Plain
from jaxspec.models.presets import PRESETS
from jaxspec.models.scaled import is_scaled
from jaxspec.planning.floors import program_floor, state_bytes
from jaxspec.planning.plan import most_rows, plan
from jaxspec.planning.programs import compile_program
from jaxspec.planning.setup import Setup, published_drafter
from jaxspec.trees.tree import DraftTree, root_only
from pallas_kernels.h100.compile import Program
from pallas_kernels.h100.target import MEMORY_BYTES

OURS = (
    "tree_attention",
    "rotary_heads",
    "take_rows",
    "write_rows",
    "grouped_matmul",
    "grouped_scaled_matmul",
    "scaled_matmul",
    "tree_level",
    "delta_heads",
    "tree_delta_rule",
)
PREFILL_CHUNK = 512
# Of a round that drafts nothing, by gated model, on one device.
MOST_LAUNCHES = {
    "qwen3-8b": 450,  # 36 layers: 11 a layer and 54
    "qwen3.5-9b": 510,  # 32 layers: 15 a layer and 30
    "qwen3.8-27b": 910,  # 64 layers: 14 a layer
}
MOST_TEMPORARIES = {  # GiB, of a verification by its nodes
    "qwen3-8b": {64: 0.15, 256: 0.4},
    "qwen3.5-9b": {64: 0.25, 256: 0.65},
    "qwen3.8-27b": {64: 0.45, 256: 1.2},
}
MOST_MOVED = {  # over the floor, of a verification by its nodes
    "qwen3-8b": {64: 1.12, 128: 1.14, 256: 1.25},
    "qwen3.5-9b": {64: 1.13, 256: 1.32},
    "qwen3.8-27b": {64: 1.09, 256: 1.25},
}
# Over the floor, by kind: with the LM head in fp8, 0.52 and 0.56 of what bfloat16 moves.
MOST_MOVED_IN_FP8 = {"decode": 1.01, "verify": 1.17}
DRAFT_BLOCK = 16


@dataclasses.dataclass(frozen=True)
class Step:
    """A step to compile.

    Attributes:
      model: one of `PRESETS`.
      kind: "decode" (one token per round), "verify" (a given tree), "prefill" (one chunk of a
        prompt), "draft" (the drafter's pass and its tree) or "round" (draft and verify); all
        but "draft" inside their loops, as they run.
      nodes: N of the tree.
      context, batch, devices, fp8, fp8_lm_head: as in `Setup`.
    """

    model: str
    kind: str
    nodes: int = 1
    context: int = 4096
    batch: int = 1
    devices: int = 1
    fp8: bool = False
    fp8_lm_head: bool = False

    def __str__(self) -> str:
        return (
            f"{self.model} {self.kind} N={self.nodes} S={self.context} B={self.batch} "
            f"on {self.devices}{' fp8' * self.fp8}{' and LM head' * self.fp8_lm_head}"
        )

    @property
    def setup(self) -> Setup:
        return Setup(
            PRESETS[self.model],
            self.drafter,
            self.context,
            self.batch,
            self.devices,
            chunk=PREFILL_CHUNK,
            fp8=self.fp8,
            fp8_lm_head=self.fp8_lm_head,
        )

    @property
    def drafter(self) -> Drafter:
        if self.kind in ("draft", "round"):
            config = published_drafter(PRESETS[self.model])
            return BlockDrafter(config, TreeConfig("best_first", size=self.nodes))
        return Given(self.nodes) if self.kind == "verify" else Plain()

    @property
    def program(self) -> str:
        """The program of the step: plain decoding and verification are rounds."""
        return self.kind if self.kind in ("prefill", "draft") else "round"


HYBRIDS = ("qwen3.5-9b", "qwen3.8-27b")
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


def steps(quick: bool = False) -> list[Step]:
    """The steps to compile.

    Args: quick: only the gated steps of Qwen3-8B and of one hybrid; else also verification by
      two hybrids, and every size, context and device count of Qwen3.
    """
    gated = [Step("qwen3-8b", "verify", nodes) for nodes in (64, 128, 256)]
    gated += [
        Step("qwen3-8b", "decode"),
        Step("qwen3-8b", "round", 64),
        Step("qwen3-8b", "round", 64, context=32_768, batch=4),
        Step("qwen3.5-9b", "verify", 64),
        Step("qwen3-8b", "decode", fp8=True),
        Step("qwen3-8b", "verify", 64, fp8=True),
        Step("qwen3-8b", "decode", fp8=True, fp8_lm_head=True),
        Step("qwen3-8b", "verify", 64, fp8=True, fp8_lm_head=True),
    ]
    if quick:
        return gated
    rest = [Step(model, "decode") for model in HYBRIDS]
    rest += [
        Step(model, "verify", nodes, context)
        for model in HYBRIDS
        for nodes in (64, 256)
        for context in (4096, 32_768)
    ]
    rest += [
        Step(model, kind, nodes, context, devices=devices)
        for devices in (1, 8, 4, 2)
        for context in (4096, 32_768)
        for model in MODELS
        for kind, nodes in KINDS
    ]
    return gated + [step for step in rest if step not in gated]


@dataclasses.dataclass(frozen=True)
class Given(Drafter):
    """A drafter whose tree comes from its state, so that a round is only verification."""

    size: int
    depth: int = DRAFT_BLOCK - 1

    def init(self, params, batch: int, capacity: int) -> DraftTree:
        return root_only(jnp.zeros(batch, jnp.int32), size=self.size)

    def observe(self, params, state: DraftTree, committed) -> DraftTree:
        return state

    def draft(self, params, state: DraftTree, anchor, position, budget, noise=None):
        return dataclasses.replace(state, tokens=state.tokens.at[:, 0].set(anchor)), state


def compile_step(step: Step, cache: pathlib.Path | None = None) -> Program:
    """Compiles a step for `step.devices` H100s; memory and traffic are per device."""
    return compile_program(step.setup, step.program, cache)


def report(step: Step, program: Program) -> dict:
    """Memory and traffic of the compiled step, beside its floor; bytes are per device.

    `floor_ms_estimate` is an estimate from datasheet numbers, never a timing.
    """
    setup = step.setup
    floor = program_floor(setup, step.program)
    # A draft alone does not take the target, so nothing is passed twice.
    repeated = 0 if step.kind == "draft" else plan(setup, ()).repeated
    peak, moved = program.peak - repeated, program.module.moved_bytes()
    growing = program.aliased + program.temporaries
    decodes = step.program == "round"
    return dict(
        **dataclasses.asdict(step),
        arguments=program.arguments,
        aliased=program.aliased,
        temporaries=program.temporaries,
        peak=peak,
        fits=peak <= MEMORY_BYTES,
        most_rows=most_rows(setup, peak, growing=growing) if decodes else None,
        launches=program.module.launches(),
        kernels=len(program.kernels),
        copies=program.module.large_copies(_smallest_state(setup)),
        host_transfers=program.module.host_transfers(),
        floor_bytes=int(floor.bytes),
        moved_bytes=moved,
        moved_over_floor=round(moved / floor.bytes, 3),
        exchanged_bytes=program.module.exchanged_bytes(),
        floor_flops=int(floor.flops),
        floor_ms_estimate=round(floor.milliseconds, 3),
    )


def faults(step: Step, program: Program) -> list[str]:
    """Violations of the gate; launches are bounded for the models of `MOST_LAUNCHES`."""
    found = [
        fault
        for kernel in program.kernels
        if kernel.name.startswith(OURS)
        for fault in kernel.faults()
    ]
    measured = report(step, program)
    found += [f"copies state: {copy}" for copy in measured["copies"]]
    found += [f"waits for the host: {name}" for name in measured["host_transfers"]]
    if step.model not in MOST_LAUNCHES or step.devices > 1:
        return found
    if not measured["fits"]:
        found.append(f"needs {measured['peak'] / 2**30:.1f} GiB")
    if step.program == "round":
        cache = sum(state_bytes(step.setup))
        if program.aliased < cache:
            found.append(f"updates {program.aliased} bytes in place, caches are {cache}")
    most = MOST_LAUNCHES[step.model]
    if step.kind in ("decode", "verify") and measured["launches"] > most:
        found.append(f"starts {measured['launches']} kernels, above {most}")
    if step.fp8:
        return found + _faults_of_fp8(step, program, measured["moved_over_floor"])
    if step.kind != "verify":
        return found
    limit = MOST_TEMPORARIES[step.model].get(step.nodes)
    if limit and program.temporaries > limit * 2**30:
        found.append(f"temporaries are {program.temporaries / 2**30:.3f} GiB, above {limit}")
    moved = measured["moved_over_floor"]
    most = MOST_MOVED.get(step.model, {}).get(step.nodes, moved)
    if moved > most:
        found.append(f"moves {moved} times its floor, above {most}")
    return found


def _faults_of_fp8(step: Step, program: Program, moved: float) -> list[str]:
    """Faults of an fp8 step: a weight widened in memory, or too many bytes moved."""
    leaves = jax.tree.leaves(step.setup.target_params, is_leaf=is_scaled)
    smallest = min(math.prod(x.shape) for x in leaves if is_scaled(x)) // step.devices
    found = [f"widens a weight: {op}" for op in program.module.large_floats(smallest)]
    most = MOST_MOVED_IN_FP8.get(step.kind, moved)
    if moved > most:
        found.append(f"moves {moved} times its floor, above {most}")
    return found


def _smallest_state(setup: Setup) -> int:
    """Bytes of the smallest matrix or cache on a device; smaller copies are activations.

    For gated delta nets this is the memory matrix; their windows and convolutions are small.
    """
    leaves = jax.tree.leaves(setup.target_params, is_leaf=is_scaled)
    arrays = [x.values if is_scaled(x) else x for x in leaves]
    matrices = [x for x in arrays if x.ndim > 1 and min(x.shape) > 4]
    smallest = min(math.prod(x.shape) * x.dtype.itemsize for x in matrices)
    states = [size for size in state_bytes(setup) if size > 2**20 or not setup.target.delta_net]
    return min(smallest, *states) // setup.devices
