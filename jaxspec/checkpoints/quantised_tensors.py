"""Finds and checks the tensors of each quantised weight in a folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxspec.checkpoints.dequantise import Awq, Gptq, Packed, Scaled
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
        if not (np.isfinite(values) & (values > 0)).all():
            raise ValueError(
                f"{self.folder.origin}: tensor '{name}' holds {_worst(values)}; a scale is "
                "positive: the checkpoint is damaged, download it again"
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


def _worst(values: np.ndarray) -> float:
    return float(values[~(np.isfinite(values) & (values > 0))].flat[0])


def _find_scaled(form: Scaled, folder: SafetensorsFolder) -> dict[str, QuantisedWeight]:
    find, found = Finder(folder), {}
    for name, dtype in folder.dtypes.items():
        if dtype not in (FP8, INT8) or name.endswith(("_scale", "_scale_inv")):
            continue
        shape = folder.shapes[name]
        if len(shape) < 2:
            find.matrix(name)  # refuses it
        inverse = f"{name}_scale_inv"
        scale = inverse if inverse in folder.shapes else f"{name}_scale"
        find.part(scale, *form.scale_shapes(shape))

        def values(arrays, scale=scale):
            return form.weight(arrays[0], find.scale(scale, arrays[1]))

        found[name] = QuantisedWeight(shape, (name, scale), values)
    return found


def _find_packed(form: Packed, folder: SafetensorsFolder) -> dict[str, QuantisedWeight]:
    find, found, per_word = Finder(folder), {}, 32 // form.bits
    for name in folder.shapes:
        base, _, kind = name.rpartition(".")
        if kind != "weight_packed":
            continue
        stored = folder.read(find.part(f"{base}.weight_shape", (2,)))
        rows, columns = shape = tuple(int(n) for n in stored)
        find.part(name, (rows, -(-columns // per_word)))
        scale = f"{base}.weight_scale"
        count = find.matrix(scale)[1]
        find.part(scale, (rows, count))
        find.even_groups(scale, count, columns)
        zero, groups = f"{base}.weight_zero_point", f"{base}.weight_g_idx"
        optional = [part for part in (zero, groups) if part in folder.shapes]
        for part in optional:
            find.part(part, (-(-rows // per_word), count) if part == zero else (columns,))

        def values(arrays, parts=(scale, *optional), zero=zero, groups=groups, shape=shape):
            own = dict(zip(parts, arrays[1:], strict=False))
            scales = find.scale(parts[0], own[parts[0]])
            chosen = own.get(groups)
            if chosen is not None:
                chosen = find.groups(groups, chosen, scales.shape[1])
            return form.weight(arrays[0], scales, own.get(zero), chosen, shape)

        parts = (name, scale, *optional, f"{base}.weight_shape")
        found[f"{base}.weight"] = QuantisedWeight(shape, parts, values)
    return found


def _qweights(
    form: Gptq | Awq, find: Finder
) -> Iterator[tuple[list[str], tuple[int, int], tuple[int, int]]]:
    """For every weight: the names of `qweight`, `qzeros` and `scales`, its shape [O, I], and
    the shape of its zero points, (groups of inputs, words)."""
    for name in find.folder.shapes:
        base, _, kind = name.rpartition(".")
        if kind != "qweight":
            continue
        rows, columns = form.shape(find.matrix(name))
        scales = f"{base}.scales"
        count = find.matrix(scales)[0]
        find.part(scales, (count, rows))
        words = count, -(-rows // form.per_word)
        yield [name, f"{base}.qzeros", scales], (rows, columns), words


def _find_gptq(form: Gptq, folder: SafetensorsFolder) -> dict[str, QuantisedWeight]:
    find, found = Finder(folder), {}
    for names, shape, words in _qweights(form, find):
        scales, base = names[2], names[0].removesuffix("qweight")
        find.part(names[1], words)
        groups = find.part(f"{base}g_idx", shape[1:])

        def values(arrays, scales=scales, groups=groups, count=words[0]):
            qweight, qzeros, scale, chosen = arrays
            chosen = find.groups(groups, chosen, count)
            return form.weight(qweight, qzeros, find.scale(scales, scale), chosen)

        found[f"{base}weight"] = QuantisedWeight(shape, (*names, groups), values)
    return found


def _find_awq(form: Awq, folder: SafetensorsFolder) -> dict[str, QuantisedWeight]:
    find, found = Finder(folder), {}
    for names, shape, words in _qweights(form, find):
        scales, base = names[2], names[0].removesuffix("qweight")
        find.even_groups(scales, words[0], shape[1])
        find.part(names[1], words)

        def values(arrays, scales=scales):
            return form.weight(arrays[0], arrays[1], find.scale(scales, arrays[2]))

        found[f"{base}weight"] = QuantisedWeight(shape, tuple(names), values)
    return found


FINDERS: Mapping[type, Callable[[Any, SafetensorsFolder], dict[str, QuantisedWeight]]] = {
    Scaled: _find_scaled,
    Packed: _find_packed,
    Gptq: _find_gptq,
    Awq: _find_awq,
}
