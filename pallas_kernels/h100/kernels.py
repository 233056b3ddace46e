"""Compiles our kernels over their shapes; and the static sweep that tiles were chosen by."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.delta_heads import delta_heads
from pallas_kernels.grouped_matmul.api import grouped_matmul
from pallas_kernels.grouped_matmul.triton import tile_rows
from pallas_kernels.grouped_scaled_matmul.api import grouped_scaled_matmul
from pallas_kernels.h100.compile import Kernel, compile_for_h100
from pallas_kernels.h100.target import mesh
from pallas_kernels.scaled_matmul import config as scaled_config
from pallas_kernels.scaled_matmul.api import scaled_matmul, scaled_swiglu
from pallas_kernels.tree_attention.api import tree_attention
from pallas_kernels.tree_attention.config import TILES, Shape, TileConfig, choose, from_table
from pallas_kernels.tree_delta_rule import tree_delta_rule
from pallas_kernels.tree_level import Levels, grow_level

REGISTERS = 65_536  # of a multiprocessor
SHARED_MEMORY = 233_472
THREADS = 2_048
MAX_NODES = 512  # of a tree
HEAD_DIMS = (64, 128, 256)
WARPGROUP_ROWS = 64  # the smallest tile of a Hopper matrix product

_attention = jax.jit(
    tree_attention, static_argnames=("scale", "window", "ordered", "implementation", "tile")
)
_delta_heads = jax.jit(delta_heads, static_argnames=("key_dim", "implementation"))
_delta_rule = jax.jit(tree_delta_rule, static_argnames="implementation")
_level = jax.jit(grow_level, static_argnames="implementation")
_grouped = jax.jit(grouped_matmul, static_argnames="implementation")
_grouped_scaled = jax.jit(grouped_scaled_matmul, static_argnames="implementation")
_scaled = jax.jit(scaled_matmul, static_argnames="implementation")
_scaled_swiglu = jax.jit(scaled_swiglu, static_argnames="implementation")


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """One call of tree attention; queries and new rows are float32, as the model has them."""

    shape: Shape
    window: int | None = None
    tile: TileConfig | None = None  # None: the chosen one

    @property
    def chosen(self) -> TileConfig:
        tile = self.tile or choose(self.shape)
        return tile if isinstance(tile, TileConfig) else from_table(self.shape)

    def __str__(self) -> str:
        s, t = self.shape, self.chosen
        return (
            f"tree_attention {s.dtype.name} D={s.head_dim} B={s.batch} N={s.nodes} "
            f"G={s.group} S={s.capacity} window={self.window} "
            f"tile={t.rows}/{t.keys}/{t.nodes}x{t.splits} {t.warps}w {t.stages}s"
        )

    def compile(self, cache: pathlib.Path | None = None) -> tuple[Kernel, ...]:
        s = self.shape
        prefix = _array(s.batch, s.kv_heads, s.capacity, s.head_dim, dtype=s.dtype)
        new = _array(s.batch, s.nodes, s.kv_heads, s.head_dim)
        options = dict(
            scale=1.0,
            window=self.window,
            ordered=True,  # as the target calls it
            implementation="triton",
            tile=self.tile,
        )
        if self.window is not None:
            options["depths"] = _array(s.batch, s.nodes, dtype=jnp.int32)
        return compile_for_h100(
            _attention,
            _array(s.batch, s.nodes, s.heads, s.head_dim),
            prefix,
            prefix,
            _array(s.batch, dtype=jnp.int32),
            new,
            new,
            _array(s.batch, s.nodes, -(-s.nodes // 32), dtype=jnp.uint32),
            **options,
            cache=cache,
        ).kernels

    def faults(self, kernels: tuple[Kernel, ...]) -> list[str]:
        """What breaks the gate: spills, warnings, too much memory, a tile without wgmma."""
        return _faults(kernels, "tree_attention", self.chosen.rows)


@dataclasses.dataclass(frozen=True)
class GroupedCase:
    """One grouped matrix product: `rows` of them over `groups` matrices.

    Attributes:
      fp8: of 8-bit values, scaled in blocks of 128 x 128.
    """

    rows: int
    groups: int
    depth: int
    columns: int
    fp8: bool = False

    @property
    def kernel(self) -> str:
        return "grouped_scaled_matmul" if self.fp8 else "grouped_matmul"

    def __str__(self) -> str:
        return f"{self.kernel} R={self.rows} E={self.groups} {self.depth}x{self.columns}"

    def compile(self, cache: pathlib.Path | None = None) -> tuple[Kernel, ...]:
        e, depth, columns = self.groups, self.depth, self.columns
        if self.fp8:
            function, weights = (
                _grouped_scaled,
                (
                    _array(e, columns, depth, dtype=jnp.float8_e4m3fn),
                    _array(e, columns // 128, depth // 128),
                ),
            )
        else:
            function, weights = _grouped, (_array(e, depth, columns, dtype=jnp.bfloat16),)
        return compile_for_h100(
            function,
            _array(self.rows, depth, dtype=jnp.bfloat16),
            *weights,
            _array(e, dtype=jnp.int32),
            implementation="triton",
            cache=cache,
        ).kernels

    def faults(self, kernels: tuple[Kernel, ...]) -> list[str]:
        return _faults(kernels, self.kernel, tile_rows(self.rows, self.groups))


@dataclasses.dataclass(frozen=True)
class ScaledCase:
    """One product with 8-bit values, scaled in blocks, or by output where `block` is None.

    Attributes:
      halves: 2 if the columns are gates and ups, for a kernel that computes SwiGLU.
    """

    rows: int
    depth: int
    columns: int
    block: int | None = 128
    halves: int = 1

    def __str__(self) -> str:
        return (
            f"scaled_matmul R={self.rows} {self.depth}x{self.columns} block={self.block} "
            f"halves={self.halves}"
        )

    @property
    def scales(self) -> tuple[int, int]:
        if self.block is None:
            return self.columns, 1
        return self.columns // self.block, self.depth // self.block

    def compile(self, cache: pathlib.Path | None = None) -> tuple[Kernel, ...]:
        return compile_for_h100(
            _scaled if self.halves == 1 else _scaled_swiglu,
            _array(self.rows, self.depth, dtype=jnp.bfloat16),
            _array(self.columns, self.depth, dtype=jnp.float8_e4m3fn),
            _array(*self.scales),
            implementation="triton",
            cache=cache,
        ).kernels

    def faults(self, kernels: tuple[Kernel, ...]) -> list[str]:
        shape = self.rows, self.columns, self.depth, self.scales[1]
        tile = scaled_config.choose(*shape, halves=self.halves)
        return _faults(kernels, "scaled_matmul", tile.rows)


@dataclasses.dataclass(frozen=True)
class LevelCase:
    """One level of a tree: children of 16 parents, at Qwen3's vocabulary and rank 256."""

    children: int
    batch: int = 1

    def __str__(self) -> str:
        return f"tree_level F={self.children} B={self.batch}"

    def compile(self, cache: pathlib.Path | None = None) -> tuple[Kernel, ...]:
        depth, vocab, rank, parents = 15, 151_936, 256, 16
        row = (self.batch, depth + 1, self.children)
        whole = [_array(*row, dtype=dtype) for dtype in (jnp.float32, jnp.int32, jnp.int32)]
        return compile_for_h100(
            _level,
            Levels(*whole, _array(self.batch)),
            _array(dtype=jnp.int32),
            _array(self.batch, depth, vocab),
            _array(self.batch, parents, rank),
            _array(vocab, rank, dtype=jnp.bfloat16),
            implementation="triton",
            cache=cache,
        ).kernels

    def faults(self, kernels: tuple[Kernel, ...]) -> list[str]:
        ours = [kernel for kernel in kernels if kernel.name.startswith("tree_level")]
        return [fault for kernel in ours for fault in kernel.faults()]


@dataclasses.dataclass(frozen=True)
class DeltaRuleCase:
    """The delta rule over a tree: 16 key heads, keys and values of 128, as Qwen3.5's.

    Attributes:
      group: value heads of each key head.
    """

    nodes: int
    group: int = 2
    batch: int = 1

    def __str__(self) -> str:
        return f"tree_delta_rule N={self.nodes} R={self.group} B={self.batch}"

    def compile(self, cache: pathlib.Path | None = None) -> tuple[Kernel, ...]:
        keys = _array(self.batch, self.nodes, 16, 128)
        gates = _array(self.batch, self.nodes, 16, self.group)
        return compile_for_h100(
            _delta_rule,
            keys,
            keys,
            _array(self.batch, self.nodes, 16, self.group, 128),
            gates,
            gates,
            _array(self.batch, 16, 128, self.group * 128),
            _array(self.batch, self.nodes, -(-self.nodes // 32), dtype=jnp.uint32),
            _array(self.batch, dtype=jnp.bool_),
            implementation="triton",
            cache=cache,
        ).kernels

    def faults(self, kernels: tuple[Kernel, ...]) -> list[str]:
        return [fault for kernel in kernels for fault in kernel.faults()]


@dataclasses.dataclass(frozen=True)
class DeltaHeadsCase:
    """Heads of a gated delta net from its projection: 16 key heads, keys and values of 128.

    Attributes:
      group: value heads of each key head.
    """

    nodes: int
    group: int = 2
    batch: int = 1
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        return f"delta_heads {self.dtype} N={self.nodes} R={self.group} B={self.batch}"

    def compile(self, cache: pathlib.Path | None = None) -> tuple[Kernel, ...]:
        dtype, values = jnp.dtype(self.dtype), self.group * 128
        channels = 256 + values
        return compile_for_h100(
            _delta_heads,
            _array(
                self.batch * self.nodes, 16, channels + values + 2 * self.group, dtype=dtype
            ),
            _array(16, channels, 4, dtype=jnp.bfloat16),
            _array(16, self.group),
            _array(16, self.group),
            _array(self.batch, 3, 16, channels),
            _array(self.batch, self.nodes, dtype=jnp.int32),
            _array(self.batch, dtype=jnp.bool_),
            key_dim=128,
            implementation="triton",
            cache=cache,
        ).kernels

    def faults(self, kernels: tuple[Kernel, ...]) -> list[str]:
        return [fault for kernel in kernels for fault in kernel.faults()]


Case = AttentionCase | GroupedCase | ScaledCase | LevelCase | DeltaRuleCase | DeltaHeadsCase


def _array(*shape, dtype=jnp.float32):
    sharding = NamedSharding(mesh(), PartitionSpec())
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _faults(kernels: tuple[Kernel, ...], name: str, rows: int) -> list[str]:
    found = [fault for kernel in kernels for fault in kernel.faults()]
    if rows >= WARPGROUP_ROWS and not _named(kernels, name).wgmma:
        found.append(f"{name}: tiles of {rows} rows and no wgmma")
    return found


def _named(kernels: tuple[Kernel, ...], name: str) -> Kernel:
    return next(kernel for kernel in kernels if kernel.name == name)


def cases(quick: bool = False) -> list[Case]:
    """Cases of every kernel of the library.

    The gate has every tile of the table with and without a window, with and without splits,
    and the most nodes; the rest adds numbers of nodes between them, groups and capacities.
    """
    found = []
    for dtype, dim, rows in TILES:
        shape = Shape(1, rows // 4, 32, 8, dim, 4096, jnp.dtype(dtype))
        changes = {}, dict(batch=64), dict(nodes=MAX_NODES)
        for change, window in itertools.product(changes, (None, 1024)):
            found.append(AttentionCase(dataclasses.replace(shape, **change), window))
    # Qwen3-30B-A3B's experts, for one token, a tree of 64 nodes, and prompt chunks.
    for fp8, rows, (depth, columns) in itertools.product(
        (False, True), (8, 512, 4096, 16_384), ((2048, 1536), (768, 2048))
    ):
        found.append(GroupedCase(rows, 128, depth, columns, fp8))
    # Qwen3-8B's products, for one token, trees and a prompt chunk; scales by block and output.
    for rows, (depth, columns, halves) in itertools.product(
        (1, 32, 64, 256, 512), ((4096, 6144, 1), (4096, 24_576, 2), (12_288, 4096, 1))
    ):
        found.append(ScaledCase(rows, depth, columns, halves=halves))
    found += [ScaledCase(rows, 4096, 151_936) for rows in (1, 64)]  # the LM head
    found += [ScaledCase(rows, 4096, 4096, block) for rows in (1, 64) for block in (64, None)]
    found += [LevelCase(15), LevelCase(63), LevelCase(255), LevelCase(63, batch=8)]
    # Qwen3.5-9B's and 27B's heads, for one token, trees and a prompt chunk.
    of_delta_nets = (1, 2, 1), (64, 2, 1), (256, 2, 1), (256, 3, 1), (512, 2, 2)
    found += [DeltaRuleCase(*shape) for shape in of_delta_nets]
    found += [DeltaHeadsCase(*shape) for shape in of_delta_nets]
    found.append(DeltaHeadsCase(64, dtype="float32"))
    if quick:
        return list(dict.fromkeys(found))
    for dtype, dim in itertools.product(("bfloat16", "float32"), HEAD_DIMS):
        shape = Shape(1, 1, 32, 8, dim, 4096, jnp.dtype(dtype))
        change = functools.partial(dataclasses.replace, shape)
        for n in (1, 2, 4, 8, 16, 32, 60, 64, 128, 256, 512):
            found.append(AttentionCase(change(nodes=n)))
        for n in (1, 8, 64):
            # Groups of one, SmolLM2's three, Qwen3-14B's five, Qwen3.5-27B's six, Qwen3-32B's
            # eight and Qwen3.5-122B-A10B's sixteen.
            heads = [8 * group for group in (1, 3, 5, 6, 8, 16)]
            found += [AttentionCase(change(nodes=n, heads=h)) for h in heads]
            found.append(AttentionCase(change(nodes=n), window=1024))
            found.append(AttentionCase(change(nodes=n, capacity=32_768)))
    return list(dict.fromkeys(found))


def resident(kernel: Kernel) -> int:
    """Number of programs of this kernel that fit one multiprocessor."""
    registers = -(-kernel.registers // 8) * 8 * kernel.threads
    return min(
        REGISTERS // registers,
        SHARED_MEMORY // (kernel.shared + 1024),
        THREADS // kernel.threads,
    )


def sweep(cache: pathlib.Path | None = None) -> Iterator[dict]:
    """Rows of a table of tiles for every class of shapes, including those that fail."""
    rows_of = {"bfloat16": (16, 32, 64, 128), "float32": (16, 32, 64)}
    for dtype, dim in itertools.product(rows_of, HEAD_DIMS):
        for rows, keys in itertools.product(rows_of[dtype], (32, 64, 128)):
            nodes = max(1, rows // 4)  # a group of four
            shape = Shape(1, nodes, 32, 8, dim, 4096, jnp.dtype(dtype))
            step = min(64, max(16, nodes))
            for warps, stages in itertools.product((4, 8), (2, 3, 4)):
                tile = TileConfig(rows, keys, step, 8, warps, stages)
                case = AttentionCase(shape, tile=tile)
                row = dict(dtype=dtype, head_dim=dim, **dataclasses.asdict(tile))
                try:
                    kernels = case.compile(cache)
                except jax.errors.JaxRuntimeError as error:
                    yield row | dict(faults=[str(error).splitlines()[0][:120]])
                    continue
                main = _named(kernels, "tree_attention")
                held = resident(main)
                yield row | dict(
                    registers=main.registers,
                    shared=main.shared,
                    wgmma=main.wgmma,
                    resident=held,
                    # Bytes of keys and values on their way to one multiprocessor.
                    in_flight=held * (stages - 1) * 2 * keys * dim * shape.dtype.itemsize,
                    faults=case.faults(kernels),
                )
