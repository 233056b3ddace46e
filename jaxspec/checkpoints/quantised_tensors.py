"""A quantised weight, and the checks of the tensors that it is stored as."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import ml_dtypes
import numpy as np

from jaxspec.checkpoints.tensors import INTEGERS, SafetensorsFolder

FP8, INT8 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(np.int8)


@dataclasses.dataclass(frozen=True)
class QuantisedWeight:
    """A weight of the model, and how to compute it from stored tensors."""

    shape: tuple[int, ...]
    parts: tuple[str, ...]
    values: Callable[[list[np.ndarray]], np.ndarray]


class Finder:
    """Looks up the stored tensors of a folder's quantised weights."""

    def __init__(self, folder: SafetensorsFolder):
        self.folder = folder

    def part(self, name: str, *shapes: tuple[int, ...]) -> str:
        """Checks that a tensor exists with one of the shapes; returns its name."""
        found = self.folder.shapes.get(name)
        if found is None:
            raise ValueError(
                f"{self.folder.origin} has no tensor '{name}', which a quantised weight needs; "
                "the checkpoint is incomplete"
            )
        if shapes and found not in shapes:
            raise ValueError(
                f"{self.folder.origin}: tensor '{name}' has shape {found}; expected "
                + " or ".join(map(str, dict.fromkeys(shapes)))
            )
        return name

    def matrix(self, name: str) -> tuple[int, int]:
        """The shape of a tensor, which must exist and have two axes."""
        shape = self.folder.shapes[self.part(name)]
        if len(shape) != 2:
            raise ValueError(
                f"{self.folder.origin}: tensor '{name}' has shape {shape}; expected two axes"
            )
        return shape

    def even_groups(self, name: str, count: int, columns: int) -> None:
        """Raises ValueError unless `count` scales divide the inputs evenly."""
        if not 1 <= count <= columns or columns % count:
            raise ValueError(
                f"{self.folder.origin}: tensor '{name}' has {count} scales a row; expected a "
                f"divisor of {columns}, its inputs"
            )

    def scale(self, name: str, values: np.ndarray) -> np.ndarray:
        """Scales as float32; they must be positive floats."""
        if values.dtype in (*map(np.dtype, INTEGERS.values()), FP8, INT8):
            raise ValueError(
                f"{self.folder.origin}: tensor '{name}' is stored as {values.dtype}; scales "
                "are float32, float16, bfloat16 or float8_e8m0fnu: the checkpoint is damaged"
            )
        values = values.astype(np.float32)
        wrong = values[~(np.isfinite(values) & (values > 0))]
        if wrong.size:
            raise ValueError(
                f"{self.folder.origin}: tensor '{name}' holds {wrong[0]}; a scale is positive: "
                "the checkpoint is damaged, download it again"
            )
        return values

    def groups(self, name: str, values: np.ndarray, count: int) -> np.ndarray:
        """The group of every input, which must be below `count`."""
        if values.min(initial=0) < 0 or values.max(initial=0) >= count:
            raise ValueError(
                f"{self.folder.origin}: tensor '{name}' names groups {values.min()} … "
                f"{values.max()}; there are {count}: the checkpoint is damaged"
            )
        return values
