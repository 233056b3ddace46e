"""Compiles our kernels over their shapes; and the static sweep that tiles were chosen by."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.delta_heads import delta_heads
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.grouped_matmul.triton import tile_rows
from pallas_kernels.grouped_scaled_matmul import grouped_scaled_matmul
from pallas_kernels.h100.compile import Kernel, compile_for_h100
from pallas_kernels.h100.target import mesh
from pallas_kernels.scaled_matmul import config as scaled_config
from pallas_kernels.scaled_matmul import scaled_matmul, scaled_swiglu
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
class Case:
    """One call of a kernel.

    Attributes:
      name: of the call, in the report.
      function: jitted.
      arguments, options: of the call; arrays as shapes.
      kernel: its name, with which those of further kernels of the call begin.
      rows: of its tiles. Those of a warpgroup must use Hopper's matrix products.
    """

    name: str
    function: Callable
    arguments: tuple
    kernel: str
    rows: int = 0
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def compile(self, cache: pathlib.Path | None = None) -> tuple[Kernel, ...]:
        sharding = NamedSharding(mesh(), PartitionSpec())

        def placed(x):
            return x.update(sharding=sharding) if isinstance(x, jax.ShapeDtypeStruct) else x

        arguments, options = jax.tree.map(placed, (self.arguments, dict(self.options)))
        options |= dict(implementation="triton", cache=cache)
        return compile_for_h100(self.function, *arguments, **options).kernels

    def faults(self, kernels: Sequence[Kernel]) -> list[str]:
        """What breaks the gate: spills, warnings, too much memory, a tile without wgmma."""
        ours = [kernel for kernel in kernels if kernel.name.startswith(self.kernel)]
        found = [fault for kernel in ours for fault in kernel.faults()]
        if self.rows >= WARPGROUP_ROWS and not any(kernel.wgmma for kernel in ours):
            found.append(f"{self.kernel}: tiles of {self.rows} rows and no wgmma")
        return found


def _array(*shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def attention(shape: Shape, window: int | None = None, tile: TileConfig | None = None) -> Case:
    """Tree attention; queries and new rows are float32, as the model has them.

    Args: tile: the chosen one by default.
    """
    s, t = shape, tile or choose(shape)
    t = t if isinstance(t, TileConfig) else from_table(shape)
    prefix = _array(s.batch, s.kv_heads, s.capacity, s.head_dim, dtype=s.dtype)
    new = _array(s.batch, s.nodes, s.kv_heads, s.head_dim)
    arguments = (
        _array(s.batch, s.nodes, s.heads, s.head_dim),
        prefix,
        prefix,
        _array(s.batch, dtype=jnp.int32),
        new,
        new,
        _array(s.batch, s.nodes, -(-s.nodes // 32), dtype=jnp.uint32),
    )
    options = dict(scale=1.0, window=window, ordered=True, tile=tile)  # as the target calls it
    if window is not None:
        options["depths"] = _array(s.batch, s.nodes, dtype=jnp.int32)
    name = (
        f"tree_attention {s.dtype.name} D={s.head_dim} B={s.batch} N={s.nodes} G={s.group} "
        f"S={s.capacity} window={window} tile={t.rows}/{t.keys}/{t.nodes}x{t.splits} "
        f"{t.warps}w {t.stages}s"
    )
    return Case(name, _attention, arguments, "tree_attention", t.rows, options)


def grouped(rows: int, groups: int, depth: int, columns: int, fp8: bool = False) -> Case:
    """A grouped matrix product: `rows` of them over `groups` matrices.

    Args: fp8: of 8-bit values, scaled in blocks of 128 x 128.
    """
    function, kernel = _grouped, "grouped_matmul"
    matrices = (_array(groups, depth, columns, dtype=jnp.bfloat16),)
    if fp8:
        function, kernel = _grouped_scaled, "grouped_scaled_matmul"
        values = _array(groups, columns, depth, dtype=jnp.float8_e4m3fn)
        matrices = values, _array(groups, columns // 128, depth // 128)
    arguments = (
        _array(rows, depth, dtype=jnp.bfloat16),
        *matrices,
        _array(groups, dtype=jnp.int32),
    )
    name = f"{kernel} R={rows} E={groups} {depth}x{columns}"
    return Case(name, function, arguments, kernel, tile_rows(rows, groups))


def scaled(
    rows: int, depth: int, columns: int, block: int | None = 128, halves: int = 1
) -> Case:
    """A product with 8-bit values, scaled in blocks, or by output where `block` is None.

    Args: halves: 2 if the columns are gates and ups, for a kernel that computes SwiGLU.
    """
    scales = (columns, 1) if block is None else (columns // block, depth // block)
    arguments = (
        _array(rows, depth, dtype=jnp.bfloat16),
        _array(columns, depth, dtype=jnp.float8_e4m3fn),
        _array(*scales),
    )
    tile = scaled_config.choose(rows, columns, depth, scales[1], halves=halves)
    name = f"scaled_matmul R={rows} {depth}x{columns} block={block} halves={halves}"
    function = _scaled if halves == 1 else _scaled_swiglu
    return Case(name, function, arguments, "scaled_matmul", tile.rows)


def level(children: int, batch: int = 1) -> Case:
    """A level of a tree: children of 16 parents, at Qwen3's vocabulary and rank 256."""
    depth, vocab, rank, parents = 15, 151_936, 256, 16
    row = (batch, depth + 1, children)
    whole = [_array(*row, dtype=dtype) for dtype in (jnp.float32, jnp.int32, jnp.int32)]
    arguments = (
        Levels(*whole, _array(batch)),
        _array(dtype=jnp.int32),
        _array(batch, depth, vocab),
        _array(batch, parents, rank, dtype=jnp.bfloat16),
        _array(vocab, rank, dtype=jnp.bfloat16),
    )
    return Case(f"tree_level F={children} B={batch}", _level, arguments, "tree_level")


def delta_rule(nodes: int, group: int = 2, batch: int = 1) -> Case:
    """The delta rule over a tree: 16 key heads, keys and values of 128, as Qwen3.5's.

    Args: group: value heads of each key head.
    """
    keys, gates = _array(batch, nodes, 16, 128), _array(batch, nodes, 16, group)
    arguments = (
        keys,
        keys,
        _array(batch, nodes, 16, group, 128),
        gates,
        gates,
        _array(batch, 16, 128, group * 128),
        _array(batch, nodes, -(-nodes // 32), dtype=jnp.uint32),
        _array(batch, dtype=jnp.bool_),
    )
    name = f"tree_delta_rule N={nodes} R={group} B={batch}"
    return Case(name, _delta_rule, arguments, "tree_delta_rule")


def heads(nodes: int, group: int = 2, batch: int = 1, dtype: str = "bfloat16") -> Case:
    """Heads of a gated delta net from its projection: as for `delta_rule`."""
    values = group * 128
    channels = 256 + values
    arguments = (
        _array(batch * nodes, 16, channels + values + 2 * group, dtype=jnp.dtype(dtype)),
        _array(16, channels, 4, dtype=jnp.bfloat16),
        _array(16, group),
        _array(16, group),
        _array(batch, 3, 16, channels),
        _array(batch, nodes, dtype=jnp.int32),
        _array(batch, dtype=jnp.bool_),
    )
    name = f"delta_heads {dtype} N={nodes} R={group} B={batch}"
    return Case(name, _delta_heads, arguments, "delta_heads", options=dict(key_dim=128))


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
            found.append(attention(dataclasses.replace(shape, **change), window))
    # Qwen3-30B-A3B's experts, for one token, a tree of 64 nodes, and prompt chunks.
    for fp8, rows, (depth, columns) in itertools.product(
        (False, True), (8, 512, 4096, 16_384), ((2048, 1536), (768, 2048))
    ):
        found.append(grouped(rows, 128, depth, columns, fp8))
    # Qwen3-8B's products, for one token, trees and a prompt chunk; scales by block and output.
    for rows, (depth, columns, halves) in itertools.product(
        (1, 32, 64, 256, 512), ((4096, 6144, 1), (4096, 24_576, 2), (12_288, 4096, 1))
    ):
        found.append(scaled(rows, depth, columns, halves=halves))
    found += [scaled(rows, 4096, 151_936) for rows in (1, 64)]  # the LM head
    found += [scaled(rows, 4096, 4096, block) for rows in (1, 64) for block in (64, None)]
    found += [level(15), level(63), level(255), level(63, batch=8)]
    # Qwen3.5-9B's and 27B's heads, for one token, trees and a prompt chunk.
    of_delta_nets = (1, 2, 1), (64, 2, 1), (256, 2, 1), (256, 3, 1), (512, 2, 2)
    found += [delta_rule(*shape) for shape in of_delta_nets]
    found += [heads(*shape) for shape in of_delta_nets]
    found.append(heads(64, dtype="float32"))
    if quick:
        return list({str(case): case for case in found}.values())
    for dtype, dim in itertools.product(("bfloat16", "float32"), HEAD_DIMS):
        shape = Shape(1, 1, 32, 8, dim, 4096, jnp.dtype(dtype))
        change = functools.partial(dataclasses.replace, shape)
        for n in (1, 2, 4, 8, 16, 32, 60, 64, 128, 256, 512):
            found.append(attention(change(nodes=n)))
        for n in (1, 8, 64):
            # Groups of one, SmolLM2's three, Qwen3-14B's five, Qwen3.5-27B's six, Qwen3-32B's
            # eight and Qwen3.5-122B-A10B's sixteen.
            groups = (1, 3, 5, 6, 8, 16)
            found += [attention(change(nodes=n, heads=8 * group)) for group in groups]
            found.append(attention(change(nodes=n), window=1024))
            found.append(attention(change(nodes=n, capacity=32_768)))
    return list({str(case): case for case in found}.values())


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
                case = attention(shape, tile=tile)
                row = dict(dtype=dtype, head_dim=dim, **dataclasses.asdict(tile))
                try:
                    kernels = case.compile(cache)
                except jax.errors.JaxRuntimeError as error:
                    yield row | dict(faults=[str(error).splitlines()[0][:120]])
                    continue
                (main,) = [kernel for kernel in kernels if kernel.name == "tree_attention"]
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
