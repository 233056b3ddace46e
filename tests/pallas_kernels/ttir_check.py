"""Runs a Pallas kernel's lowered Triton IR in NumPy, and finds errors a GPU would not notice.

Interpret mode clamps indices and runs programs in order, so it hides both an access outside an
array and two programs that write the same element. Here the IR that a GPU would compile is
executed program by program; every lane's address is checked and every written element recorded.
A program may only read back output elements that it wrote before its last barrier: other
programs, or without a barrier its own threads, may not have written theirs yet.
Not modelled: warps, shared memory, asynchronous copies, the GPU's rounding of exp2 and of TF32.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Set

import jax
import ml_dtypes
import numpy as np
from jax.extend import core
from jaxlib.mlir import ir
from jaxlib.triton import dialect as triton_dialect

from pallas_kernels.h100.target import lowering_for_h100

CUSTOM_CALL = "__gpu$xla.gpu.triton"
NOBODY = -1


class KernelFault(ValueError):
    """A lane left its array, or an element was written twice, never, or after it was read."""


def execute(f: Callable, *args) -> list[np.ndarray]:
    """f(*args) with every `pallas_call` run as Triton IR; returns the flat outputs.

    Raises:
      KernelFault: see the class.
      NotImplementedError: the IR has an operation this interpreter lacks.
    """
    closed = jax.make_jaxpr(f)(*args)
    return _evaluate(closed, jax.tree.leaves(args))


def _evaluate(closed, args) -> list:
    jaxpr = closed.jaxpr
    values = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))
    read = lambda v: v.val if isinstance(v, core.Literal) else values[v]  # noqa: E731
    for eqn in jaxpr.eqns:
        inputs = [read(v) for v in eqn.invars]
        if eqn.primitive.name == "pallas_call":
            outputs = _run_pallas_call(eqn, inputs)
        elif "jaxpr" in eqn.params and eqn.primitive.name in ("jit", "pjit"):
            outputs = _evaluate(eqn.params["jaxpr"], inputs)
        else:
            outputs = eqn.primitive.bind(*inputs, **eqn.params)
            outputs = outputs if eqn.primitive.multiple_results else [outputs]
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [np.asarray(read(v)) for v in jaxpr.outvars]


def _run_pallas_call(eqn, inputs) -> list[np.ndarray]:
    def call(*xs):
        return eqn.primitive.bind(*xs, **eqn.params)

    with lowering_for_h100():
        lowered = jax.jit(call).trace(*inputs).lower(lowering_platforms=("cuda",))
    (config,) = _triton_calls(lowered.compiler_ir("stablehlo").operation)
    outputs = [np.zeros(v.aval.shape, v.aval.dtype) for v in eqn.outvars]
    aliased = dict((output, source) for source, output in eqn.params["input_output_aliases"])
    for output, source in aliased.items():
        outputs[output][...] = inputs[source]
    run_kernel(
        ir.StringAttr(config["ir"]).value_bytes,
        [ir.IntegerAttr(config[f"grid_{axis}"]).value for axis in "xyz"],
        [np.asarray(x) for x in inputs],
        outputs,
        updated=set(aliased),
    )
    return outputs


def _triton_calls(op) -> list[ir.DictAttr]:
    found = []
    if op.name == "stablehlo.custom_call":
        if ir.StringAttr(op.attributes["call_target_name"]).value == CUSTOM_CALL:
            found.append(ir.DictAttr(op.attributes["mhlo.backend_config"]))
    for region in op.regions:
        for block in region.blocks:
            for inner in block.operations:
                found += _triton_calls(inner.operation)
    return found


def run_kernel(
    bytecode: bytes,
    grid: list[int],
    inputs: list[np.ndarray],
    outputs: list[np.ndarray],
    updated: Set[int] = frozenset(),
) -> None:
    """Runs every program of the grid, filling `outputs` in place.

    In outputs `updated`, which are inputs too, programs may leave elements unwritten.
    """
    context = ir.Context()
    triton_dialect.register_dialect(context)
    context.load_all_available_dialects()
    context.allow_unregistered_dialects = True  # barriers are of another
    with context:
        module = ir.Module.parse(bytecode)
        (function,) = module.body.operations
        body = _Block(function.operation.regions[0].blocks[0])
    buffers = [_Buffer(f"input {i}", x.reshape(-1), None) for i, x in enumerate(inputs)]
    buffers += [
        _Buffer(f"output {i}", x.reshape(-1), np.full(x.size, NOBODY), i in updated)
        for i, x in enumerate(outputs)
    ]
    start = np.zeros((), np.int64)
    pointers = [_Pointer(buffer, start) for buffer in buffers]
    with np.errstate(all="ignore"):
        for program, index in enumerate(itertools.product(*map(range, grid))):
            _Program(program, index).run(body, pointers)
    for buffer in buffers[len(inputs) :]:
        if not buffer.updated and (buffer.writer == NOBODY).any():
            element = int(np.argmax(buffer.writer == NOBODY))
            raise KernelFault(f"no program writes element {element} of {buffer.name}")


@dataclasses.dataclass
class _Buffer:
    name: str
    data: np.ndarray  # flat, a view of the array
    writer: np.ndarray | None  # program that wrote each element; None: read-only
    updated: bool = False  # an output that is an input too

    def check(self, offsets: np.ndarray, program: int, verb: str) -> None:
        bad = (offsets < 0) | (offsets >= self.data.size)
        if bad.any():
            raise KernelFault(
                f"program {program} {verb} element {int(offsets[bad][0])} of {self.name}, "
                f"which has {self.data.size}"
            )


@dataclasses.dataclass
class _Pointer:
    buffer: _Buffer
    offset: np.ndarray  # in elements


class _Block:
    """A block of IR read once into Python, since every program runs it again."""

    def __init__(self, block):
        self.arguments = list(block.arguments)
        self.operations = [_Operation(op.operation) for op in block.operations]


class _Operation:
    def __init__(self, op):
        self.name = op.name
        self.operands = list(op.operands)
        self.results = list(op.results)
        self.attributes = {name: op.attributes[name] for name in op.attributes}
        self.used = any(True for result in self.results for _ in result.uses)
        self.blocks = [_Block(region.blocks[0]) for region in op.regions if len(region.blocks)]
        if self.name == "arith.constant":
            self.constant = _constant(self.attributes["value"], self.results[0].type)
        elif self.results:
            self.shape, self.dtype = _shape_and_dtype(self.results[0].type)


_DTYPES = {
    "i1": np.bool_,
    "i32": np.int32,
    "i64": np.int64,
    "f32": np.float32,
    "bf16": ml_dtypes.bfloat16,
    "f8E4M3FN": ml_dtypes.float8_e4m3fn,
}


def _shape_and_dtype(kind):
    shape = ()
    if isinstance(kind, ir.RankedTensorType):
        shape, kind = tuple(kind.shape), kind.element_type
    return shape, _DTYPES.get(str(kind))  # None: a pointer


def _constant(value, kind) -> np.ndarray:
    shape, dtype = _shape_and_dtype(kind)
    if isinstance(value, ir.DenseElementsAttr):
        value = value.get_splat_value()
    return np.full(shape, value.value, dtype)


def _divide_towards_zero(a, b):
    return np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))


_ELEMENTWISE = {
    "arith.addi": np.add,
    "arith.addf": np.add,
    "arith.subi": np.subtract,
    "arith.subf": np.subtract,
    "arith.muli": np.multiply,
    "arith.mulf": np.multiply,
    "arith.divf": np.divide,
    "arith.divsi": _divide_towards_zero,
    "arith.divui": np.floor_divide,  # of program ids, which are not negative
    "arith.remsi": np.fmod,
    "arith.remui": np.remainder,
    "arith.andi": np.bitwise_and,
    "arith.shrsi": np.right_shift,
    "arith.maxsi": np.maximum,
    "arith.minsi": np.minimum,
    "arith.maxnumf": np.fmax,
    "arith.select": np.where,
}
_COMPARE = [np.equal, np.not_equal, np.less, np.less_equal, np.greater, np.greater_equal]
_CASTS = (
    "arith.extui",
    "arith.extsi",
    "arith.extf",
    "arith.truncf",
    "arith.sitofp",
    "tt.fp_to_fp",
)
_EXTERN = {
    "__nv_exp2f": np.exp2,
    "__nv_expf": np.exp,
    "__nv_floorf": np.floor,
    "__nv_logf": np.log,
    "__nv_log1pf": np.log1p,
    "__nv_log2f": np.log2,
    "__nv_rsqrtf": lambda x: 1 / np.sqrt(x),
}


class _Program:
    """One program of the grid: its id and the values it has computed."""

    def __init__(self, number: int, index: tuple[int, ...]):
        self.number, self.index = number, index
        self.values = {}
        self.written = []  # since the last barrier: (buffer, offsets)

    def run(self, block: _Block, arguments: list) -> list:
        """Runs a block; returns what its last operation yields."""
        self.values.update(zip(block.arguments, arguments, strict=True))
        for op in block.operations:
            operands = [self.values[v] for v in op.operands]
            results = self.results(op, operands)
            self.values.update(zip(op.results, results, strict=True))
        return operands

    def results(self, op: _Operation, operands: list) -> list:
        name, attributes = op.name, op.attributes
        if name in _ELEMENTWISE:
            return [_ELEMENTWISE[name](*operands)]
        if name in _CASTS:
            return [operands[0].astype(op.dtype)]
        match name:
            case "arith.constant":
                return [op.constant]
            case "arith.cmpi":
                return [_COMPARE[attributes["predicate"].value](*operands)]
            case "tt.get_program_id":
                return [np.int32(self.index[attributes["axis"].value])]
            case "tt.make_range":
                return [
                    np.arange(attributes["start"].value, attributes["end"].value, dtype="i")
                ]
            case "tt.splat" | "tt.broadcast":
                return [_reshape(operands[0], lambda x: np.broadcast_to(x, op.shape))]
            case "tt.expand_dims" | "tt.reshape":
                return [_reshape(operands[0], lambda x: x.reshape(op.shape))]
            case "tt.trans":
                return [operands[0].transpose(list(attributes["order"]))]
            case "tt.addptr":
                pointer, offset = operands
                return [_Pointer(pointer.buffer, pointer.offset + offset.astype(np.int64))]
            case "tt.load":
                return [self.load(op.used, *operands)]
            case "gpu.barrier":
                self.written = []
                return []
            case "tt.store":
                self.store(*operands)
                return []
            case "tt.dot":
                a, b, accumulator = operands
                return [a.astype(np.float32) @ b.astype(np.float32) + accumulator]
            case "tt.extern_elementwise":
                return [_EXTERN[attributes["symbol"].value](*operands)]
            case "tt.reduce":
                slices = np.moveaxis(operands[0], attributes["axis"].value, 0)
                combine = lambda a, b: self.run(op.blocks[0], [a, b])[0]  # noqa: E731
                return [functools.reduce(combine, slices)]
            case "scf.for":
                start, stop, step, *carry = operands
                for i in range(int(start), int(stop), int(step)):
                    carry = self.run(op.blocks[0], [start.dtype.type(i), *carry])
                return carry
            case "scf.if":
                branch = 0 if operands[0] else 1
                return self.run(op.blocks[branch], []) if branch < len(op.blocks) else []
            case "scf.yield" | "tt.return" | "tt.reduce.return":
                return []
        raise NotImplementedError(f"the Triton IR has {name}, which ttir_check does not run")

    def load(self, used: bool, pointer: _Pointer, mask=True, other=0) -> np.ndarray:
        offset = pointer.offset
        live = np.broadcast_to(mask, offset.shape)
        pointer.buffer.check(offset[live], self.number, "reads")
        if used and pointer.buffer.writer is not None:  # Pallas loads before every store
            self.check_written(pointer.buffer, offset[live])
        data = pointer.buffer.data
        return np.where(live, data[np.where(live, offset, 0)], other).astype(data.dtype)

    def check_written(self, buffer: _Buffer, offset: np.ndarray) -> None:
        """Checks that elements read from an output were written before the last barrier."""
        writer = buffer.writer[offset]
        free = (writer == NOBODY) & buffer.updated
        bad = (writer != self.number) & ~free
        for recent, places in self.written:
            bad |= (recent is buffer) & np.isin(offset, places)
        if bad.any():
            raise KernelFault(
                f"program {self.number} reads element {int(offset[bad][0])} of {buffer.name}, "
                "which it has not written before a barrier"
            )

    def store(self, pointer: _Pointer, value: np.ndarray, mask=True) -> None:
        buffer, live = pointer.buffer, np.broadcast_to(mask, pointer.offset.shape)
        offset = pointer.offset[live]
        buffer.check(offset, self.number, "writes")
        if buffer.writer is None:
            raise KernelFault(f"program {self.number} writes to {buffer.name}")
        taken = offset[buffer.writer[offset] != NOBODY]
        if taken.size:
            raise KernelFault(
                f"program {self.number} writes element {int(taken[0])} of {buffer.name}, "
                f"which program {int(buffer.writer[taken[0]])} wrote"
            )
        buffer.writer[offset] = self.number
        if np.unique(offset).size < offset.size:
            raise KernelFault(
                f"two lanes of program {self.number} write one element of {buffer.name}"
            )
        buffer.data[offset] = value[live]
        self.written.append((buffer, offset))


def _reshape(value, change):
    if isinstance(value, _Pointer):
        return _Pointer(value.buffer, change(value.offset))
    return change(value)
