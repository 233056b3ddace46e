"""Compiles a jitted function for an H100 from shapes alone, and reports on the program."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import tempfile

from pallas_kernels.h100.hlo import Module
from pallas_kernels.h100.target import DESCRIPTION, SHARED_MEMORY_BYTES, lowering_for_h100

OPTIONS = {
    # On a GPU, XLA times its own matrix products against cuBLAS's and takes the faster. With no
    # GPU it takes untuned tiles: all of them are left to cuBLAS.
    "xla_gpu_enable_triton_gemm": False,
    # Small sums over devices would each be a generated kernel of the same code, more than half
    # the time of compiling; without them the library's are called. Nothing else changes.
    "xla_gpu_unsupported_use_all_reduce_one_shot_kernel": False,
}
_DUMP = {"xla_dump_emitter_re": "ptx"}
_COMPILERS = (
    "jaxlib",
    "jax-cuda13-pjrt",
    "jax-cuda13-plugin",
    "nvidia-cuda-nvcc",
    "nvidia-nvvm",
)
_ENTRY = re.compile(r"\.entry (\w+)\(")
_USAGE = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?",
    re.DOTALL,
)
_LAUNCH = re.compile(
    r"(\S+) grid: \[(\d+), (\d+), (\d+)\] threads: \[(\d+).*?shared_memory: (\d+) bytes"
)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One compiled GPU kernel, as ptxas and the launch sequence describe it.

    Attributes:
      spills: bytes spilled to local memory.
      shared: bytes of shared memory of one program.
      wgmma, mma: number of matrix instructions of a warpgroup (Hopper) and of a warp.
      async_copies: number of asynchronous copies from global to shared memory.
      warnings: ptxas's performance warnings.
    """

    name: str
    registers: int
    spills: int
    shared: int
    grid: tuple[int, int, int]
    threads: int
    wgmma: int
    mma: int
    async_copies: int
    warnings: tuple[str, ...]

    def faults(self) -> list[str]:
        """Faults that a kernel of ours must not have: spills and warnings."""
        found = [f"{self.name}: {warning}" for warning in self.warnings]
        if self.spills:
            found.append(f"{self.name}: spills {self.spills} bytes")
        if self.shared > SHARED_MEMORY_BYTES:
            found.append(f"{self.name}: {self.shared} bytes of shared memory")
        return found


@dataclasses.dataclass(frozen=True)
class Memory:
    """Memory of a compiled program, in bytes per device.

    Attributes:
      aliased: bytes that are both argument and output, updated in place.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int

    @property
    def peak(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporaries


@dataclasses.dataclass(frozen=True)
class Program(Memory):
    """A compiled program, per device.

    Attributes:
      kernels: the generated kernels, without the vendor's matrix products.
      text: the optimised program, as HLO.
    """

    kernels: tuple[Kernel, ...]
    text: str

    @functools.cached_property
    def module(self) -> Module:
        return Module(self.text)

    def kernel(self, name: str) -> Kernel:
        (found,) = [kernel for kernel in self.kernels if kernel.name == name]
        return found


def compile_for_h100(
    function,
    *args,
    mesh=None,
    cache: pathlib.Path | None = None,
    **kwargs,
) -> Program:
    """Compiles `function(*args, **kwargs)` without running it and without a GPU.

    Args:
      function: made by `jax.jit`.
      args, kwargs: static values, and `ShapeDtypeStruct`s whose shardings are on a mesh of
        `target.mesh`.
      mesh: their mesh, if the function shards its work over it.
      cache: a folder of results, keyed by the program and the compilers' versions.

    Raises:
      jax.errors.JaxRuntimeError: the compiler refuses, say for want of shared memory.
    """
    lowered = _lower(function, args, kwargs, mesh)
    if cache is None:
        return _compile(lowered)
    path = cache / f"{_digest(lowered.as_text())}.json.gz"
    if path.exists():
        return _read(path)
    program = _compile(lowered)
    _write(path, program)
    return program


def memory_on_h100(function, *args, mesh=None, **kwargs) -> Memory:
    """The memory that `compile_for_h100` would report, without inspecting kernels."""
    return _memory(_lower(function, args, kwargs, mesh).compile(compiler_options=OPTIONS))


def _lower(function, args, kwargs, mesh):
    with lowering_for_h100(mesh):
        return function.trace(*args, **kwargs).lower(lowering_platforms=("cuda",))


def _compile(lowered) -> Program:
    with tempfile.TemporaryDirectory() as dump:
        compiled = lowered.compile(compiler_options=OPTIONS | _DUMP | {"xla_dump_to": dump})
        kernels = tuple(_kernels(pathlib.Path(dump)))
    memory = dataclasses.asdict(_memory(compiled))
    return Program(**memory, kernels=kernels, text=compiled.as_text())


def _memory(compiled) -> Memory:
    found = compiled.memory_analysis()
    return Memory(
        arguments=found.argument_size_in_bytes,
        outputs=found.output_size_in_bytes,
        aliased=found.alias_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
    )


def _digest(lowered: str) -> str:
    """A hash of all that decides the result: program, target, compilers, and stored fields."""
    versions = [importlib.metadata.version(name) for name in _COMPILERS]
    kept = [field.name for kind in (Program, Kernel) for field in dataclasses.fields(kind)]
    parts = [lowered, DESCRIPTION, OPTIONS, versions, os.environ.get("XLA_FLAGS"), kept]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _write(path: pathlib.Path, program: Program) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(f".{os.getpid()}")  # renamed when complete
    whole.write_bytes(gzip.compress(json.dumps(dataclasses.asdict(program)).encode()))
    whole.replace(path)


def _read(path: pathlib.Path) -> Program:
    fields = json.loads(gzip.decompress(path.read_bytes()))
    kernels = tuple(
        Kernel(**k | dict(grid=tuple(k["grid"]), warnings=tuple(k["warnings"])))
        for k in fields.pop("kernels")
    )
    return Program(**fields, kernels=kernels)


def _kernels(dump: pathlib.Path):
    sequence = next(dump.glob("*.thunk_sequence.txt")).read_text()
    launches = {found[1]: [int(n) for n in found.groups()[1:]] for found in
                _LAUNCH.finditer(sequence)}  # fmt: skip
    for path in sorted(dump.glob("*.ptx")):
        text = path.read_text()
        bodies = _ENTRY.split(text)
        if len(bodies) == 1:
            continue
        command = [_ptxas(), "-v", "-arch=sm_90a", path, "-o", "/dev/null"]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        usage = {found[1]: found.groups()[1:] for found in _USAGE.finditer(log)}
        losses = re.findall(r"\((C\d+)\) Potential Performance Loss: ([^\n]*)", log)
        for name, body in zip(bodies[1::2], bodies[2::2], strict=True):
            stores, loads, registers, static = usage[name]
            x, y, z, threads, dynamic = launches.get(name, (0, 0, 0, 0, 0))
            yield Kernel(
                name=name,
                registers=int(registers),
                spills=int(stores) + int(loads),
                shared=int(static or 0) + dynamic,
                grid=(x, y, z),
                threads=threads,
                wgmma=body.count("wgmma.mma_async"),
                mma=body.count("mma.sync"),
                async_copies=body.count("cp.async.c"),
                warnings=tuple(f"{code} {message}" for code, message in losses),
            )


def _ptxas() -> str:
    spec = importlib.util.find_spec("nvidia.cu13")
    for folder in spec.submodule_search_locations if spec else ():
        path = pathlib.Path(folder) / "bin" / "ptxas"
        if path.exists():
            return str(path)
    raise RuntimeError("ptxas is not installed; `make h100` builds .venv-h100, which has it")
