"""Tensors of drafters' files by current names, and conversion from and to weights."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxspec.checkpoints.fuse import Part, build, check_weights
from jaxspec.checkpoints.quantised import open_weights
from jaxspec.checkpoints.tensors import SINGLE, Box, cut, write_tensors
from jaxspec.models.scaled import ScaledWeight, is_scaled

# For every weight, by path in the head, the tensors it is made of.
Table = Mapping[tuple, tuple[Part, ...]]


# Tensors that hold the rows of several others, concatenated.
FUSED = {
    "qkv_proj.weight": ("q_proj.weight", "k_proj.weight", "v_proj.weight"),
    "gate_up_proj.weight": ("gate_proj.weight", "up_proj.weight"),
}


class DrafterTensors:
    """A folder's tensors under their current names.

    Attributes:
      shapes: shape of every tensor, by name.

    Args:
      integers: see `SafetensorsFolder`.
      renamed: maps a tensor's name to its current name.

    Raises:
      ValueError: the folder cannot be read, or holds one tensor under two names.
    """

    def __init__(self, folder: Path, integers: Collection[str], renamed: Callable[[str], str]):
        self.tensors = open_weights(folder, integers=integers)
        self.origin = self.tensors.origin
        self.names: dict[str, str] = {}
        for old in self.tensors.shapes:
            name = renamed(old)
            if name in self.names:
                raise ValueError(
                    f"{self.origin}: tensors '{self.names[name]}' and '{old}' are both "
                    f"'{name}'; the file is of two conversions, keep one"
                )
            self.names[name] = old
        self.shapes = {name: self.tensors.shapes[old] for name, old in self.names.items()}
        self.first: dict[str, int] = {}  # row of the fused tensor where a part of it begins
        self.places: dict[str, np.ndarray] = {}

    def split_fused(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Replaces fused tensors by those they hold (`FUSED`).

        Args:
          expected: shapes of the expected tensors.

        Raises:
          ValueError: a tensor exists besides the fused one, or their rows do not add up.
        """
        for fused in [name for name in self.shapes if name.endswith(tuple(FUSED))]:
            suffix = next(x for x in FUSED if fused.endswith(x))
            parts = [fused.removesuffix(suffix) + part for part in FUSED[suffix]]
            if not set(parts) <= set(expected):
                continue
            twice = [part for part in parts if part in self.shapes]
            if twice:
                raise ValueError(
                    f"{self.origin}: tensors '{fused}' and '{twice[0]}' hold the same weights; "
                    "the file is of two conversions, keep one"
                )
            rows = [expected[part][0] for part in parts]
            shape = (sum(rows), *expected[parts[0]][1:])
            if self.shapes[fused] != shape:
                raise ValueError(
                    f"{self.origin}: tensor '{fused}' has shape {self.shapes[fused]}; its "
                    f"configuration asks for {shape}"
                )
            old, first = self.names.pop(fused), 0
            del self.shapes[fused]
            for part, count in zip(parts, rows, strict=True):
                self.names[part], self.shapes[part] = old, expected[part]
                self.first[part] = first
                first += count

    def spread(self, name: str, places: np.ndarray, rows: int) -> None:
        """Treats a tensor's rows as those at `places` of one with `rows` rows; others are 0.

        Raises:
          ValueError: the tensor does not have a row for every place.
        """
        shape = self.shapes[name]
        if shape[:1] != (len(places),):
            raise ValueError(
                f"{self.origin}: tensor '{name}' has shape {shape}; expected {len(places)} "
                "rows, one for each token of the draft vocabulary"
            )
        self.shapes[name], self.places[name] = (rows, *shape[1:]), places

    def read(self, name: str) -> np.ndarray:
        """The values of a tensor, which is not part of a fused one."""
        stored = self.tensors.read(self.names[name])
        if name not in self.places:
            return stored
        whole = np.zeros(self.shapes[name], stored.dtype)
        whole[self.places[name]] = stored
        return whole

    def pieces(
        self, name: str, shape: tuple[int, ...], box: Box, skip: int = 0
    ) -> Iterator[tuple[Box, np.ndarray]]:
        """See `fuse.Tensors`; of a fused tensor only the rows of that name."""
        if name in self.places:
            yield box, cut(self.read(name), shape, box, skip)
            return
        skip += self.first.get(name, 0) * math.prod(self.shapes[name][1:])
        yield from self.tensors.pieces(self.names[name], shape, box, skip)


def read_weights(tensors: DrafterTensors, table: Table, abstract: nnx.State) -> nnx.State:
    """The weights of a head, of the given shapes and dtypes.

    Raises:
      ValueError: a tensor has a value that no weight can have.
    """
    paths, specs = zip(*nnx.to_flat_state(abstract), strict=True)
    parts = [table[path] for path in paths]
    arrays = build(tensors, parts, [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in specs])
    filled = [spec.replace(array) for spec, array in zip(specs, arrays, strict=True)]
    return nnx.from_flat_state(list(zip(paths, filled, strict=True)))


def written_tensors(weights: nnx.State, table: Table) -> dict[str, np.ndarray]:
    """The inverse of `read_weights`."""
    flat = {path: np.asarray(x[...]) for path, x in nnx.to_flat_state(weights)}
    return {
        part.name: part.taken_from(flat[path])
        for path, parts in table.items()
        for part in parts
    }


def equal_as_stored(stored: np.ndarray, array: jax.Array | ScaledWeight) -> bool:
    """Whether two arrays are equal in the narrower dtype, as either may have been rounded."""
    if stored.shape != array.shape:
        return False
    if is_scaled(array):
        return array.rounds(stored)
    narrow = min(stored.dtype, array.dtype, key=lambda dtype: dtype.itemsize)
    return bool(jnp.array_equal(jnp.asarray(stored).astype(narrow), array.astype(narrow)))


def check_repeated(tensors: DrafterTensors, tables: Mapping[str, jax.Array]) -> None:
    """Raises ValueError unless the target's arrays that a file repeats equal the target's."""
    for name, array in tables.items():
        if not equal_as_stored(tensors.read(name), array):
            raise ValueError(
                f"{tensors.origin}: tensor '{name}' differs from the target's; the drafter was "
                "trained for other weights than those loaded"
            )


def check_unused(folder: Path) -> None:
    """Raises ValueError if a folder holds a checkpoint."""
    if any((folder / name).exists() for name in ("config.json", SINGLE)):
        raise ValueError(f"{folder} already holds a checkpoint; save to a new folder")


def write_folder(
    folder: Path,
    raw: dict[str, Any],
    tensors: Mapping[str, np.ndarray],
    integers: Collection[str],
) -> None:
    """Checks everything, then writes `config.json` and `model.safetensors`.

    Raises:
      ValueError: a weight is not finite or absurdly large.
    """
    # safetensors writes a strided view's memory as it lies; PyTorch readers want the metadata.
    tensors = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    for name in set(tensors) - set(integers):
        check_weights(tensors[name], name, f"{folder} is not written")
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / SINGLE, tensors, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")
