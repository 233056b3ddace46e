"""Builds arrays from several tensors of a checkpoint.

A table lists, for every array, its tensors or rows of them, with their places and orders of
axes (`Part`). Arrays are built one at a time, tensor by tensor, piece by piece; of a sharded
array, a process reads and builds only its own shards.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from tqdm import tqdm

from jaxspec.checkpoints.tensors import WRAPPERS, Box, whole
from jaxspec.sharding import shardings

DTYPES = ("float32", "bfloat16", "float16")  # of weights in memory
ALIGNMENT = 64  # bytes; JAX on the CPU adopts an aligned buffer instead of copying it
LARGEST = 1e6  # of any weight; those of trained models stay below a few thousand
LARGE = 1_000_000_000  # bytes; loading more shows progress
READERS = 2  # arrays read at a time; one for large checkpoints, to save memory


class Tensors(Protocol):
    """A checkpoint's tensors by Hugging Face name: shapes up front, values on demand.

    Attributes:
      origin: the file or folder, for messages.
      shapes: shape of every tensor as stored; a linear layer is [out, in].
    """

    origin: str
    shapes: Mapping[str, tuple[int, ...]]

    def pieces(
        self, name: str, shape: tuple[int, ...], box: Box, skip: int = 0
    ) -> Iterator[tuple[Box, np.ndarray]]:
        """Boxes that together cover `box`, with their values. The tensor is viewed as `shape`
        after its first `skip` values."""


@dataclasses.dataclass(frozen=True)
class Part:
    """The place of a tensor, or of some of its rows, in an array.

    Attributes:
      name: name of the tensor.
      shape: the shape that the tensor must have.
      index: its place in the array.
      axes: the axes of `array[index]` in the tensor's order; adjacent ones may be merged in
        the tensor, as [K * D] for [K, D].
      rows: half-open range of the tensor's first axis; None for all.
      offset: added to the tensor's values.
    """

    name: str
    shape: tuple[int, ...]
    index: Any
    axes: tuple[int, ...]
    rows: tuple[int, int] | None = None
    offset: float = 0.0

    @property
    def own_shape(self) -> tuple[int, ...]:
        """Shape of the tensor's rows that are placed."""
        if self.rows is None:
            return self.shape
        return (self.rows[1] - self.rows[0], *self.shape[1:])

    @property
    def size(self) -> int:
        """Number of values that are placed."""
        return math.prod(self.own_shape)

    @property
    def skip(self) -> int:
        """Number of the tensor's values before those placed."""
        return self.rows[0] * math.prod(self.shape[1:]) if self.rows else 0

    def whole_index(self, ndim: int) -> tuple[int | slice, ...]:
        """The index of an array of `ndim` axes, all of them given."""
        index = self.index if isinstance(self.index, tuple) else (self.index,)
        index = () if self.index is ... else index
        return index + (slice(None),) * (ndim - len(index))

    def within(self, shape: tuple[int, ...]) -> Box:
        """Its place in an array of that shape."""
        return tuple(
            at.indices(n)[:2] if isinstance(at, slice) else (at, at + 1)
            for at, n in zip(self.whole_index(len(shape)), shape, strict=True)
        )

    def order(self, ndim: int) -> tuple[int, ...]:
        """The axes of the array, of `ndim` axes, in the tensor's order."""
        index = self.whole_index(ndim)
        kept = [axis for axis, at in enumerate(index) if isinstance(at, slice)]
        return tuple(kept[axis] for axis in self.axes)

    def taken_from(self, array: np.ndarray) -> np.ndarray:
        """The tensor's rows in an array: the inverse of placing them."""
        values = array[self.index].transpose(self.axes).reshape(self.own_shape)
        return values - self.offset if self.offset else values


def same(name: str, *shape: int) -> tuple[Part, ...]:
    """A tensor that is the array."""
    return (Part(name, shape, np.s_[...], tuple(range(len(shape)))),)


def linear(name: str, outputs: int, inputs: int) -> tuple[Part, ...]:
    """A linear layer, [out, in] in files and [in, out] here."""
    return (Part(name, (outputs, inputs), np.s_[...], (1, 0)),)


def swiglu(mlp: str, width: int, inner: int) -> dict[str, tuple[Part, ...]]:
    """The matrices of a dense MLP, whose tensors' names begin with `mlp`."""
    return {
        "gate_up": (  # [M, 2, F]
            Part(f"{mlp}gate_proj.weight", (inner, width), np.s_[:, 0], (1, 0)),
            Part(f"{mlp}up_proj.weight", (inner, width), np.s_[:, 1], (1, 0)),
        ),
        "down": linear(f"{mlp}down_proj.weight", width, inner),  # [F, M]
    }


def build(tensors: Tensors, table: Any, specs: Any, mesh: Mesh | None = None) -> Any:
    """Builds the arrays of a pytree.

    Args:
      table: the `Part`s of every array, checked by `check_tensors`.
      specs: shapes and dtypes of the arrays.
      mesh: devices of all processes to shard the arrays over (`jaxspec.sharding`); each process
        reads the shards of its own devices. None: the default device.

    Raises:
      ValueError: a tensor holds a value that no weight can have.
    """
    leaves, tree = jax.tree.flatten(specs)
    on = [None] * len(leaves) if mesh is None else jax.tree.leaves(shardings(mesh, specs))
    places, parts = list(map(_boxes, leaves, on)), tree.flatten_up_to(table)
    total = sum(
        math.prod(stop - start for start, stop in box) * spec.dtype.itemsize
        for spec, local in zip(leaves, places, strict=True)
        for box in local.devices
    )
    hidden = total < LARGE or jax.process_index() > 0
    with tqdm(
        total=total, desc="weights", unit="B", unit_scale=True, disable=hidden
    ) as progress:

        def read(spec, local, parts):
            shards = {
                box: _aligned_empty([stop - start for start, stop in box], spec.dtype)
                for box in local.devices
            }
            for part in parts:
                for count in _place(tensors, part, spec.shape, shards):
                    progress.update(count * spec.dtype.itemsize)
            return shards

        with ThreadPoolExecutor(READERS) as readers:
            each = (map if total >= LARGE else readers.map)(read, leaves, places, parts)
            made = zip(leaves, places, each, strict=True)
            return tree.unflatten([at.join(spec.shape, shards) for spec, at, shards in made])


def check_dtype(dtype) -> np.dtype:
    """The dtype; raises ValueError if weights cannot have it."""
    try:
        name = "None" if dtype is None else jnp.dtype(dtype).name  # jnp.dtype(None) is float64
    except TypeError:  # no such name
        name = str(dtype)
    if name not in DTYPES:
        raise ValueError(f"dtype is {name}; weights need one of {', '.join(DTYPES)}")
    return jnp.dtype(name)


def check_weights(values: np.ndarray, name: str, origin: str) -> None:
    """Raises ValueError if a tensor, in the requested dtype, has a value no weight can have."""
    # Magnitudes are in the order of their bits, NaN last: ten times as fast as max and min.
    bits = values.view(f"u{values.itemsize}") & ((1 << 8 * values.itemsize - 1) - 1)
    most = float(bits.max(initial=0).reshape(1).view(values.dtype)[0])
    if not math.isfinite(most):
        raise ValueError(
            f"{origin}: tensor '{name}' holds NaN or infinity as {values.dtype}; the "
            "checkpoint is damaged, or its values need a wider dtype"
        )
    if most > LARGEST:
        raise ValueError(
            f"{origin}: tensor '{name}' holds {most:.3g}; no weight is beyond "
            f"{LARGEST:.0e}: the checkpoint is damaged, download or save it again"
        )


@dataclasses.dataclass(frozen=True)
class _Boxes:
    """The shards of one array that this process holds.

    Attributes:
      devices: devices of every box; several if a mesh axis does not shard the array.
      sharding: None for the default device.
    """

    devices: Mapping[Box, Sequence[jax.Device | None]]
    sharding: NamedSharding | None

    def join(self, shape: tuple[int, ...], shards: Mapping[Box, np.ndarray]) -> jax.Array:
        arrays = [
            jax.device_put(shards[box], device, may_alias=True)
            for box, devices in self.devices.items()
            for device in devices
        ]
        jax.block_until_ready(arrays)
        if self.sharding is None:
            return arrays[0]
        return jax.make_array_from_single_device_arrays(shape, self.sharding, arrays)


def _boxes(spec: jax.ShapeDtypeStruct, sharding: NamedSharding | None) -> _Boxes:
    if sharding is None:
        return _Boxes({whole(spec.shape): [None]}, None)
    devices: dict[Box, list] = {}
    for device, index in sharding.addressable_devices_indices_map(spec.shape).items():
        box = tuple(at.indices(n)[:2] for at, n in zip(index, spec.shape, strict=True))
        devices.setdefault(box, []).append(device)
    return _Boxes(devices, sharding)


def expected_shapes(table: Any) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a pytree of `Part`s, by name."""
    parts = jax.tree.leaves(table, is_leaf=lambda x: isinstance(x, Part))
    return {part.name: part.shape for part in parts}


def check_tensors(
    tensors: Tensors, expected: Mapping[str, tuple[int, ...]], optional: Collection[str] = ()
) -> None:
    """Raises ValueError unless a checkpoint has tensors of the expected shapes, and no others.

    Args:
      optional: names of further tensors that it may have, besides precomputed rotary
        frequencies and biases of zeros.
    """
    missing = [name for name in expected if name not in tensors.shapes]
    if missing:
        raise ValueError(
            f"{tensors.origin} has no tensor '{missing[0]}'{_more(missing)}; its configuration "
            f"asks for {len(expected)} tensors: {_why(tensors)}"
        )
    for name, shape in expected.items():
        if tensors.shapes[name] != shape:
            raise ValueError(
                f"{tensors.origin}: tensor '{name}' has shape {tensors.shapes[name]}; its "
                f"configuration asks for {shape}"
            )
    known = {*expected, *optional}
    unknown = [name for name in tensors.shapes if name not in known]
    unknown = [name for name in unknown if not _without_effect(tensors, name, expected)]
    if unknown:
        raise ValueError(
            f"{tensors.origin}: tensor '{unknown[0]}'{_more(unknown)} has no place in the "
            "model its configuration describes; leaving it out would change the result"
        )


def _without_effect(tensors: Tensors, name: str, expected: Mapping[str, Any]) -> bool:
    """Whether a tensor repeats rotary frequencies, or is a weight's bias of zeros, as AutoGPTQ
    writes for every quantised layer."""
    base, _, kind = name.rpartition(".")
    if kind != "bias" or f"{base}.weight" not in expected:
        return name.endswith("rotary_emb.inv_freq")
    shape = tensors.shapes[name]
    pieces = tensors.pieces(name, shape, whole(shape))
    return not any(values.any() for _, values in pieces)


def _why(tensors: Tensors) -> str:
    """Why a checkpoint may lack tensors."""
    for prefix, owner in WRAPPERS.items():
        some = next((name for name in tensors.shapes if name.startswith(prefix)), None)
        if some:
            return (
                f"some have the prefix {prefix!r} of {owner} ('{some}'), others do not; save "
                "the language model alone"
            )
    return "the checkpoint is incomplete, or its configuration is another model's"


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _place(
    tensors: Tensors, part: Part, shape: tuple[int, ...], shards: Mapping[Box, np.ndarray]
) -> Iterator[int]:
    """Copies a tensor into the shards of an array; yields the number of values placed."""
    place, order = part.within(shape), part.order(len(shape))
    origin = [place[axis][0] for axis in order]
    seen_as = tuple(place[axis][1] - place[axis][0] for axis in order)
    wanted = {}  # box of the tensor, by shard
    for box in shards:
        overlap = _overlap(place, box)
        if overlap is not None:
            moved = [overlap[axis] for axis in order]
            wanted[box] = tuple(
                (start - low, stop - low)
                for (start, stop), low in zip(moved, origin, strict=True)
            )
    if not wanted:
        return
    needed = tuple(
        (min(start for start, _ in ends), max(stop for _, stop in ends))
        for ends in zip(*wanted.values(), strict=True)
    )
    for piece, values in tensors.pieces(part.name, seen_as, needed, part.skip):
        for box, inside in wanted.items():
            overlap = _overlap(piece, inside)
            if overlap is None:
                continue
            # From the tensor's axes to those of the shard; axes the part fixes have one row.
            rows = list(place)
            for axis, (start, stop), low in zip(order, overlap, origin, strict=True):
                rows[axis] = (start + low, stop + low)
            target = shards[box][slices(rows, box)]
            with np.errstate(over="ignore"):  # overflow is reported with the tensor's name
                source = values[slices(overlap, piece)].astype(target.dtype, copy=False)
            target[...] = source.transpose(np.argsort(order)).reshape(target.shape)
            check_weights(target, part.name, tensors.origin)
            if part.offset:
                target += part.offset
            yield target.size


def _overlap(a: Box, b: Box) -> Box | None:
    both = tuple((max(x[0], y[0]), min(x[1], y[1])) for x, y in zip(a, b, strict=True))
    return both if all(start < stop for start, stop in both) else None


def slices(box: Sequence[tuple[int, int]], origin: Box) -> tuple[slice, ...]:
    """Slices of `box` in an array whose first corner is that of `origin`."""
    return tuple(
        slice(start - low, stop - low)
        for (start, stop), (low, _) in zip(box, origin, strict=True)
    )


def _aligned_empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)
