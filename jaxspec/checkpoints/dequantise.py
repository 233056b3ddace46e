"""How quantised linear layers are stored, and their dequantised weights.

Every format finds and checks its tensors in a folder, and is a function from the stored arrays
to float32 values, in NumPy, exact up to the last rounding to float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from jaxspec.checkpoints.quantised_tensors import FP8, INT8, Finder, QuantisedWeight
from jaxspec.checkpoints.tensors import SafetensorsFolder

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # column of each nibble of an int32, lowest first

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Scaled:
    """Values of 8 bits times a scale: per tensor, per row, or per block of rows and columns.

    FP8 of DeepSeek and Qwen3 (`weight_scale_inv`, which is multiplied, despite its name), of
    ModelOpt, and `float-quantized` and `int-quantized` of compressed-tensors.

    Attributes:
      block: rows and columns per scale, perhaps fewer at the end; None for one scale per tensor
        or row.
    """

    block: tuple[int, int] | None = None

    def scale_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """Possible shapes of the scales of a weight [..., O, I]."""
        *leading, rows, columns = shape
        if self.block is not None:
            blocks = (-(-rows // self.block[0]), -(-columns // self.block[1]))
            return ((*leading, *blocks),)
        return (), (1,), (1, 1), (rows, 1), (rows,), (*leading, 1, 1), (*leading, rows, 1)

    def weight(self, values: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """values [..., O, I] times their scales, float32."""
        return values.astype(np.float32) * self.spread(scale.astype(np.float32), values.shape)

    def spread(self, scale: np.ndarray, shape: Shape) -> np.ndarray:
        """The scales of values [..., O, I], as an array that broadcasts to them."""
        if self.block is None:
            return scale[:, None] if scale.shape == shape[:1] else scale  # [O], of its rows
        scale = np.repeat(scale, self.block[0], axis=-2)[..., : shape[-2], :]
        return np.repeat(scale, self.block[1], axis=-1)[..., : shape[-1]]

    def find(self, folder: SafetensorsFolder) -> dict[str, QuantisedWeight]:
        """The weights of a folder that are stored so, by name."""
        find, found = Finder(folder), {}
        for name, dtype in folder.dtypes.items():
            if dtype not in (FP8, INT8) or name.endswith(("_scale", "_scale_inv")):
                continue
            shape = folder.shapes[name]
            if len(shape) < 2:
                find.matrix(name)  # refuses it
            inverse = f"{name}_scale_inv"
            scale = inverse if inverse in folder.shapes else f"{name}_scale"
            find.part(scale, *self.scale_shapes(shape))

            def values(arrays, scale=scale):
                return self.weight(arrays[0], find.scale(scale, arrays[1]))

            found[name] = QuantisedWeight(shape, (name, scale), values)
        return found


@dataclasses.dataclass(frozen=True)
class Packed:
    """Integers of a few bits packed along the inputs, scaled per group of inputs.

    `pack-quantized` of compressed-tensors: `weight_packed` int32 [O, I * bits / 32],
    `weight_scale` [O, I / g] and, if asymmetric, `weight_zero_point`, packed along the outputs.
    Stored integers are offset by 2^(bits - 1).
    """

    bits: int

    def weight(
        self,
        packed: np.ndarray,
        scale: np.ndarray,
        zero: np.ndarray | None,
        groups: np.ndarray | None,
        shape: Shape,
    ) -> np.ndarray:
        """The weight [O, I], float32.

        Args:
          groups: [I], the group of every input; None for consecutive groups.
        """
        rows, columns = shape
        integers = unpack(packed, self.bits, axis=1)[:, :columns]
        if groups is None:
            groups = np.arange(columns) // -(-columns // scale.shape[1])
        if zero is None:
            offset = np.float32(2 ** (self.bits - 1))
        else:
            offset = unpack(zero, self.bits, axis=0)[:rows, groups].astype(np.float32)
        return (integers.astype(np.float32) - offset) * scale.astype(np.float32)[:, groups]

    def find(self, folder: SafetensorsFolder) -> dict[str, QuantisedWeight]:
        """The weights of a folder that are stored so, by name."""
        find, found, per_word = Finder(folder), {}, 32 // self.bits
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
                return self.weight(arrays[0], scales, own.get(zero), chosen, shape)

            parts = (name, scale, *optional, f"{base}.weight_shape")
            found[f"{base}.weight"] = QuantisedWeight(shape, parts, values)
        return found


@dataclasses.dataclass(frozen=True)
class Gptq:
    """GPTQ: `qweight` int32 packed along the inputs, `qzeros` along the outputs, `g_idx`.

    Attributes:
      bits: 4 or 8.
      add_one: zero points are stored minus one (`checkpoint_format` "gptq").
    """

    bits: int
    add_one: bool

    @property
    def per_word(self) -> int:
        """Integers in an int32."""
        return 32 // self.bits

    def shape(self, qweight: tuple[int, int]) -> Shape:
        """[O, I], of the shape of `qweight`."""
        return qweight[1], qweight[0] * self.per_word

    def weight(self, qweight, qzeros, scales, groups: np.ndarray) -> np.ndarray:
        """The weight [O, I], float32, of qweight [I * bits / 32, O], qzeros
        [I / g, O * bits / 32], scales [I / g, O] and the group [I] of every input."""
        integers = unpack(qweight, self.bits, axis=0).astype(np.float32)
        zeros = unpack(qzeros, self.bits, axis=1).astype(np.float32) + self.add_one
        return ((integers - zeros[groups]) * scales.astype(np.float32)[groups]).T

    def find(self, folder: SafetensorsFolder) -> dict[str, QuantisedWeight]:
        """The weights of a folder that are stored so, by name."""
        find, found = Finder(folder), {}
        for names, shape, words in _qweights(self, find):
            scales, base = names[2], names[0].removesuffix("qweight")
            find.part(names[1], words)
            groups = find.part(f"{base}g_idx", shape[1:])

            def values(arrays, scales=scales, groups=groups, count=words[0]):
                qweight, qzeros, scale, chosen = arrays
                chosen = find.groups(groups, chosen, count)
                return self.weight(qweight, qzeros, find.scale(scales, scale), chosen)

            found[f"{base}weight"] = QuantisedWeight(shape, (*names, groups), values)
        return found


@dataclasses.dataclass(frozen=True)
class Awq:
    """AWQ's "gemm" layout: 4 bits packed along the outputs, in the order `AWQ_ORDER`."""

    per_word = 8

    def shape(self, qweight: tuple[int, int]) -> Shape:
        """[O, I], of the shape of `qweight`."""
        return qweight[1] * self.per_word, qweight[0]

    def weight(self, qweight, qzeros, scales) -> np.ndarray:
        """The weight [O, I], float32, of qweight [I, O / 8], qzeros [I / g, O / 8], scales
        [I / g, O]."""
        integers, zeros = _awq_columns(qweight), _awq_columns(qzeros)
        group = np.arange(integers.shape[0]) // (integers.shape[0] // scales.shape[0])
        return ((integers - zeros[group]) * scales.astype(np.float32)[group]).T

    def find(self, folder: SafetensorsFolder) -> dict[str, QuantisedWeight]:
        """The weights of a folder that are stored so, by name."""
        find, found = Finder(folder), {}
        for names, shape, words in _qweights(self, find):
            scales, base = names[2], names[0].removesuffix("qweight")
            find.even_groups(scales, words[0], shape[1])
            find.part(names[1], words)

            def values(arrays, scales=scales):
                return self.weight(arrays[0], arrays[1], find.scale(scales, arrays[2]))

            found[f"{base}weight"] = QuantisedWeight(shape, tuple(names), values)
        return found


def unpack(words: np.ndarray, bits: int, *, axis: int) -> np.ndarray:
    """Unsigned integers of 4 or 8 bits from int32 words along an axis, lowest bits first."""
    words = np.moveaxis(words, axis, -1).view(np.uint32)
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    integers = (words[..., None] >> shifts) & np.uint32(2**bits - 1)
    integers = integers.reshape(*words.shape[:-1], -1).astype(np.uint8)
    return np.moveaxis(integers, -1, axis)


def _awq_columns(words: np.ndarray) -> np.ndarray:
    nibbles = unpack(words, 4, axis=1).reshape(words.shape[0], -1, 8)
    columns = np.empty_like(nibbles)
    columns[..., list(AWQ_ORDER)] = nibbles
    return columns.reshape(words.shape[0], -1).astype(np.float32)


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
