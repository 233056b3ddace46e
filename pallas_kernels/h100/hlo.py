"""Reads optimised HLO text: what a compiled program launches, moves and copies.

XLA's own cost analysis does not run for a described GPU, and counts Pallas calls as nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "token": 0} | {
    f"{kind}{bits}": bits for kind in "suf" for bits in (4, 8, 16, 32, 64)
}
_BITS["bf16"] = 16
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_FLOATS = re.compile(r"\b(?:bf16|f16|f32|f64)\[([\d,]+)\]")
_HEADER = re.compile(r"^(ENTRY )?%([\w.-]+) \(.*\{$")
_NAME = re.compile(r"%([\w.-]+)")
_CALLED = re.compile(r"(?:calls|body|condition|to_apply)=%([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{(.*?)\}")
_TRUE_FALSE = re.compile(r"true_computation=%([\w.-]+), false_computation=%([\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_PARTITIONS = re.compile(r"num_partitions=(\d+)")
_ALIAS = re.compile(r"\{(\d*)\}: \((\d+), \{(\d*)\}")

# Bookkeeping: no kernel runs for these.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota",
    "partition-id", "replica-id", "copy-done", "all-reduce-done", "all-gather-done",
    "async-done", "async-update", "opt-barrier",
}  # fmt: skip
_PARTIAL_READS = {"slice", "dynamic-slice", "gather"}
TREE_CHUNK = 256  # logits of a chunk of `tree_level`, at most
_HOST = {"send", "recv", "infeed", "outfeed", "send-done", "recv-done"}


@dataclasses.dataclass(frozen=True)
class Op:
    """One instruction of a computation.

    Attributes:
      arrays: bytes of every array of its result; more than one for a tuple.
      operands: names of instructions of the same computation.
      rest: the text after the operands.
    """

    name: str
    code: str
    type: str
    operands: tuple[str, ...]
    rest: str
    root: bool

    @functools.cached_property
    def arrays(self) -> tuple[int, ...]:
        return tuple(
            _BITS.get(kind, 8) * math.prod(int(n) for n in dims.split(",") if n) // 8
            for kind, dims in _ARRAY.findall(self.type)
        )

    @property
    def dimensions(self) -> tuple[int, ...]:
        """Dimensions of its result, or of the first array of a tuple."""
        return tuple(int(n) for n in _ARRAY.search(self.type)[2].split(",") if n)

    @property
    def bytes(self) -> int:
        return sum(self.arrays)

    @property
    def called(self) -> list[str]:
        return _CALLED.findall(self.rest)

    @property
    def branches(self) -> list[str]:
        if pair := _TRUE_FALSE.search(self.rest):
            return [pair[2], pair[1]]
        return _NAME.findall(_BRANCHES.search(self.rest)[1])


class Module:
    """A compiled module; `computations` maps names to instructions in order."""

    def __init__(self, text: str):
        self.header = text.partition("\n")[0]
        partitions = _PARTITIONS.search(self.header)
        self.devices = int(partitions[1]) if partitions else 1
        self.computations: dict[str, dict[str, Op]] = {}
        current = {}
        for line in text.splitlines():
            if header := _HEADER.match(line):
                current = self.computations[header[2]] = {}
                if header[1]:
                    self.entry = header[2]
            elif line.startswith("  ") and " = " in line:
                op = _parse(line)
                current[op.name] = op

    def aliases(self) -> int:
        """Number of outputs that reuse an input's memory."""
        return len(_ALIAS.findall(self.header))

    def walk(self, computation: str | None = None, times: int = 1) -> Iterator[tuple]:
        """Every instruction that may run, as (instruction, its computation, times).

        Bodies of loops count as often as XLA knows them to run, else once: a round of the
        generation loop. Of a conditional the first branch counts, `lax.cond`'s false one, which
        is greedy decoding; the others run 0 times.
        """
        name = computation or self.entry
        for op in self.computations[name].values():
            if op.code == "while":
                trips = _TRIPS.search(op.rest)
                for called in op.called:
                    yield from self.walk(called, times * (int(trips[1]) if trips else 1))
            elif op.code == "conditional":
                for i, branch in enumerate(op.branches):
                    yield from self.walk(branch, times if i == 0 else 0)
            elif op.code == "call":
                for called in op.called:
                    yield from self.walk(called, times)
            elif op.code not in _FREE:
                yield op, name, times

    def launches(self) -> int:
        """Number of kernels that one run starts, including the vendor's matrix products."""
        return sum(times for _, _, times in self.walk())

    def host_transfers(self) -> list[str]:
        """Instructions that transfer to or from the host."""
        return [
            op.name
            for op, _, _ in self.walk()
            if op.code in _HOST or "callback" in op.rest[:200]
        ]

    def moved_bytes(self) -> int:
        """Bytes that the kernels of one run read and write, at full cache lengths."""
        return sum(times * self._op_bytes(op, name) for op, name, times in self.walk())

    def exchanged_bytes(self) -> int:
        """Bytes that collectives of one run leave on this device."""
        return sum(times * op.bytes for op, _, times in self.walk() if _exchanges(op))

    def large_copies(self, least: int) -> list[str]:
        """Instructions that write `least` bytes or more of what is only a rearranged input.

        That is: copies, slices, concatenations, transposes, conversions (alone or in a fusion)
        of a weight or a cache, which are the parameters of the program and the carried values
        of its loops. Updates in place are not among them.
        """
        found = []
        for op, name, _ in self.walk():
            writes = max(op.arrays, default=0) >= least
            if writes and self._rearranges(op) and self._reads_state(op, name, least):
                found.append(f"{op.name}: {op.type.split('{')[0]} {op.code}")
        return found

    def large_floats(self, least: int) -> list[str]:
        """Instructions that write a floating array of `least` elements or more, wider than 8
        bits: of that size a weight that was widened. Updates in place are not among them."""
        return [
            f"{op.name}: {op.type.split('{')[0]} {op.code}"
            for op, _, times in self.walk()
            if times
            and any(
                math.prod(map(int, dims.split(","))) >= least
                for dims in _FLOATS.findall(op.type)
            )
            and op.code not in _UPDATES
            and not (op.code == "fusion" and self._updates_in_place(op.called[0]))
        ]

    def _rearranges(self, op: Op) -> bool:
        codes = {op.code}
        if op.code == "fusion":
            (fused,) = op.called
            codes = {inner.code for inner in self.computations[fused].values()}
            if self._updates_in_place(fused):
                return False
        moves = {
            "copy", "copy-start", "slice", "dynamic-slice", "concatenate", "transpose", "pad",
            "reverse", "convert", "reshape", "all-gather", "all-gather-start", "all-to-all",
            "collective-permute",
        }  # fmt: skip
        return bool(codes & moves) and codes <= moves | _FREE | {"broadcast", "fusion"}

    def _reads_state(self, op: Op, name: str, least: int) -> bool:
        """Whether it reads an argument of the program, told by its size, from outside."""
        arguments = {
            size
            for argument in self.computations[self.entry].values()
            if argument.code == "parameter"
            for size in argument.arrays
            if size >= least
        }
        ops = self.computations[name]
        for operand in op.operands:
            source = ops[operand]
            size = source.bytes
            while source.code in ("bitcast", "copy", "copy-done", "opt-barrier"):
                source = ops[source.operands[0]]
            if source.code == "get-tuple-element":
                source = ops[source.operands[0]]
            if source.code == "parameter" and size in arguments:
                return True
        return False

    def _updates_in_place(self, fused: str) -> bool:
        ops = self.computations[fused]
        (root,) = [op for op in ops.values() if op.root]
        roots = [ops[name] for name in root.operands] if root.code == "tuple" else [root]
        return all(self._through_bitcasts(ops, r).code in _UPDATES for r in roots)

    def _through_bitcasts(self, ops, op: Op) -> Op:
        while op.code == "bitcast":
            op = ops[op.operands[0]]
        return op

    def _op_bytes(self, op: Op, name: str) -> int:
        ops = self.computations[name]
        if op.code == "fusion":
            (fused,) = op.called
            return self._fusion_bytes(op, fused)
        inputs = [ops[operand].bytes for operand in op.operands]
        if op.code in _PARTIAL_READS:
            return 2 * op.bytes
        if op.code in _UPDATES:
            return 2 * ops[op.operands[_UPDATES[op.code]]].bytes
        if op.code == "custom-call" and "grouped_" in op.rest:  # with and without scales
            # Matrices of groups without rows are not read. Groups are cut over the devices:
            # with an even load each has its share of the rows.
            rows, weights = (ops[operand] for operand in op.operands[3:5])  # after the tiles
            matrices, count = weights.dimensions[0], -(-rows.dimensions[0] // self.devices)
            inputs[4] = weights.bytes * min(matrices, count) // matrices
        if op.code == "custom-call" and "tree_level_select" in op.rest:
            # Of each kept child, one chunk of its parent's logits is read.
            logits, kept = (ops[operand] for operand in (op.operands[1], op.operands[4]))
            inputs[1] = min(logits.bytes, TREE_CHUNK * kept.bytes // kept.dimensions[1])
        if op.code == "custom-call" and "write_rows" in op.rest:
            return 2 * sum(inputs[: len(inputs) // 2 + 1])  # starts and news; caches in place
        outputs = op.bytes
        if op.code == "custom-call" and "take_rows" in op.rest:
            return 2 * outputs
        if "cublas" in op.rest:  # its second result is scratch memory, not traffic
            outputs = op.arrays[0]
        return sum(inputs) + outputs

    def _fusion_bytes(self, op: Op, fused: str) -> int:
        ops = self.computations[fused]
        total = 0
        users: dict[str, list[Op]] = {}
        for inner in ops.values():
            for operand in inner.operands:
                users.setdefault(operand, []).append(inner)
        for inner in ops.values():
            if inner.code == "parameter":
                total += self._bytes_read(inner, users, ops)
        (root,) = [inner for inner in ops.values() if inner.root]
        roots = [ops[name] for name in root.operands] if root.code == "tuple" else [root]
        for result in roots:
            result = self._through_bitcasts(ops, result)
            if result.code in _UPDATES:
                total += ops[result.operands[_UPDATES[result.code]]].bytes
            else:
                total += result.bytes
        return total

    def _bytes_read(self, value: Op, users: dict[str, list[Op]], ops) -> int:
        """Bytes of a fusion's input that its users read, at most all of it."""
        total = 0
        for user in users.get(value.name, []):
            if user.code == "slice" and user.name in users:
                total += self._bytes_read(user, users, ops)
            elif user.code in _PARTIAL_READS and user.operands[0] == value.name:
                total += user.bytes
            elif user.code in _UPDATES and user.operands[0] == value.name:
                continue
            elif user.code in ("bitcast", "convert"):
                total += self._bytes_read(user, users, ops) * value.bytes // user.bytes
            else:
                return value.bytes
        return min(total, value.bytes)


_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "all-to-all",
    "reduce-scatter",
    "collective-permute",
)


def _exchanges(op: Op) -> bool:
    return op.code.startswith(_COLLECTIVES)


# Where the new rows stand among the operands of an update in place.
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}


def _parse(line: str) -> Op:
    left, _, right = line.strip().partition(" = ")
    kind, right = _until(right, " ")
    code, right = right.split("(", 1)
    operands, rest = _until("(" + right, None)
    return Op(
        name=left.removeprefix("ROOT ").lstrip("%"),
        code=code,
        type=re.sub(r"/\*.*?\*/", "", kind),
        operands=tuple(_NAME.findall(operands)),
        rest=rest,
        root=left.startswith("ROOT "),
    )


def _until(text: str, stop: str | None) -> tuple[str, str]:
    """Splits at the first `stop` outside brackets, or after the first closed bracket."""
    depth = 0
    for i, letter in enumerate(text):
        depth += letter in "([{"
        depth -= letter in ")]}"
        if depth == 0 and (letter == stop if stop else letter == ")"):
            return text[: i + (stop is None)], text[i + 1 :]
    raise ValueError(f"unbalanced HLO text: {text[:80]!r}")
