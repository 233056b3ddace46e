"""Quantised checkpoints, dequantised tensor by tensor on loading.

Only weights are quantised here. An engine that also rounds activations or cached keys and
values computes something else; here they keep the dtype of the weights.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import numpy as np

from jaxspec.checkpoints.quantisation import Form, quantisation_of
from jaxspec.checkpoints.quantised_tensors import FP8, Finder
from jaxspec.checkpoints.tensors import DTYPES, Box, SafetensorsFolder, cut

# Scales of activations and cached keys and values, which are not rounded here.
ACTIVATIONS = ("input_scale", "output_scale", "k_scale", "v_scale", "q_scale", "kv_scale")


def open_weights(
    folder: Path, *, integers: Collection[str] = (), dequantise: bool = True
) -> SafetensorsFolder | QuantisedFolder:
    """The tensors of a folder: as stored, or dequantised as its config.json says.

    Args:
      integers: see `SafetensorsFolder`.
      dequantise: warn that all weights are dequantised; else the caller keeps some in 8 bits.
    """
    quantisation = quantisation_of(folder)
    if quantisation is None:
        return SafetensorsFolder(folder, integers=integers)
    if dequantise:
        warnings.warn(
            f"{folder} is stored as {quantisation.name}; its weights are dequantised on "
            "loading, and take as much memory as those of the unquantised model",
            stacklevel=2,
        )
    return QuantisedFolder(folder, quantisation.form, integers)


class QuantisedFolder:
    """A `SafetensorsFolder` that dequantises its quantised tensors.

    Attributes:
      origin, shapes: as there, without tensors of scales.

    Raises:
      ValueError: as there; or a tensor that a quantised weight needs is missing, or has a wrong
        shape or dtype.
    """

    def __init__(self, folder: Path, form: Form, integers: Collection[str]):
        self._folder = SafetensorsFolder(folder, integers=integers, quantised=True)
        self._form = form
        self.origin = self._folder.origin
        self._weights = form.find(self._folder)
        used = {part for weight in self._weights.values() for part in weight.parts}
        shapes = {name: weight.shape for name, weight in self._weights.items()}
        for name, dtype in self._folder.dtypes.items():
            kind = name.rpartition(".")[2]
            if name in used or kind in ACTIVATIONS:
                continue
            if kind not in integers and dtype not in DTYPES.values():
                raise ValueError(
                    f"{self.origin}: tensor '{name}' is stored as {dtype} without its scales; "
                    "the checkpoint is incomplete, or of another method"
                )
            shapes[name] = self._folder.shapes[name]
        self.shapes: Mapping[str, tuple[int, ...]] = shapes

    def read(self, name: str) -> np.ndarray:
        """A whole tensor, float32 if it was quantised."""
        if name not in self._weights:
            return self._folder.read(name)
        weight = self._weights[name]
        return weight.values([self._folder.read(part) for part in weight.parts])

    def pieces(
        self, name: str, shape: tuple[int, ...], box: Box, skip: int = 0
    ) -> Iterator[tuple[Box, np.ndarray]]:
        """As `SafetensorsFolder.pieces`; a quantised tensor gives the whole box at once."""
        if name not in self._weights:
            yield from self._folder.pieces(name, shape, box, skip)
            return
        yield box, cut(self.read(name), shape, box, skip)

    def stored(self, name: str) -> Stored | None:
        """A weight as stored, if that is float8_e4m3fn [O, I] with scales; else None."""
        weight = self._weights.get(name)
        form, shape = self._form, self.shapes[name]
        if weight is None or len(shape) != 2 or self._folder.dtypes.get(name) != FP8:
            return None
        scale = weight.parts[1]
        values = Finder(self._folder).scale(scale, self._folder.read(scale))
        values = values.reshape((-1, 1) if form.block is None else values.shape)
        block = form.block or (shape[0] // len(values), shape[1])
        return Stored(name, scale, block, values, self._folder)


@dataclasses.dataclass(frozen=True)
class Stored:
    """A weight [O, I] in 8 bits, and its scales.

    Attributes:
      name, scale_name: names of the tensors of values and of scales.
      block: outputs and inputs per scale, perhaps fewer at the end.
      scale: float32 [ceil(O / block[0]), ceil(I / block[1])].
      folder: folder to read the values from.
    """

    name: str
    scale_name: str
    block: tuple[int, int]
    scale: np.ndarray
    folder: SafetensorsFolder
