"""Weights that stay in 8 bits, as a checkpoint stores them."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jaxspec.checkpoints.fuse import Part
from jaxspec.checkpoints.quantised import Stored
from jaxspec.checkpoints.tensors import Box, cut
from jaxspec.models.params import TargetParams, scaled_spec
from jaxspec.models.scaled import ScaledWeight

LEAST_BLOCK = 16  # fewest values per scale: below that, scales take a quarter of the memory


class KeptTensors:
    """Tensors of a checkpoint, some of them 8-bit values, with their scales.

    Attributes:
      origin, shapes: as in `fuse.Tensors`.
    """

    def __init__(self, tensors: Any):
        """Args: tensors: `QuantisedFolder`, or a view of one."""
        self.origin, self.shapes = tensors.origin, tensors.shapes
        self._tensors = tensors
        self._values: dict[str, Stored] = {}
        self._scales: dict[str, np.ndarray] = {}

    def keep(self, part: Part, stored: Stored, block: tuple[int, int]) -> Part:
        """Makes a part's values the stored 8-bit ones.

        Args:
          block: outputs and inputs per scale in the model, at most those of the file.

        Returns:
          The part of the scales that belongs to this part of the values.
        """
        rows, columns = (
            np.arange(0, n, own) // of_file
            for n, own, of_file in zip(part.shape, block, stored.block, strict=True)
        )
        scale = stored.scale[rows][:, columns]
        self._values[part.name] = stored
        self._scales[stored.scale_name] = scale
        return dataclasses.replace(part, name=stored.scale_name, shape=scale.shape)

    def pieces(
        self, name: str, shape: tuple[int, ...], box: Box, skip: int = 0
    ) -> Iterator[tuple[Box, np.ndarray]]:
        if name in self._scales:
            yield box, cut(self._scales[name], shape, box, skip)
        elif name in self._values:
            stored = self._values[name]
            yield from stored.folder.pieces(stored.name, shape, box, skip)
        else:
            yield from self._tensors.pieces(name, shape, box, skip)


def keep(
    specs: TargetParams, table: TargetParams, tensors: Any, devices: int
) -> tuple[TargetParams, TargetParams, KeptTensors]:
    """Shapes, parts and tensors that load 8-bit values where they are stored.

    A matrix stays in 8 bits if all its tensors are float8_e4m3fn and it is one of
    `models.params.SCALABLE`. A warning names matrices that are dequantised all the same.

    Args:
      specs, table: of the unquantised weights (`abstract_params`,
        `target_weights.target_parts`).
      tensors: `QuantisedFolder`, or a view of one.
      devices: see `scaled_spec`.
    """
    kept, dequantised = KeptTensors(tensors), []
    leaves, tree = jax.tree.flatten_with_path(specs)
    chosen = []
    for (path, spec), parts in zip(leaves, tree.flatten_up_to(table), strict=True):
        stored = [tensors.stored(part.name) for part in parts]
        scaled = None
        if all(stored):
            block = (math.gcd(*sizes) for sizes in zip(*(x.block for x in stored), strict=True))
            scaled = scaled_spec(path, spec, tuple(block), devices)
        if scaled is None or scaled.values.size < LEAST_BLOCK * scaled.scale.size:
            dequantised += [p.name for p, x in zip(parts, stored, strict=True) if x]
            chosen.append((spec, parts))
        else:
            chosen.append((scaled, _parts(scaled, parts, stored, kept)))
    if dequantised:
        warnings.warn(
            f"{tensors.origin}: {len(dequantised)} tensors of 8 bits are dequantised and take "
            f"the memory of the unquantised ones ('{dequantised[0]}'); stacked experts, the "
            "first products of gated delta nets, embeddings, and matrices with a scale for "
            f"fewer than {LEAST_BLOCK} values do not stay in 8 bits yet",
            stacklevel=2,
        )
    specs, table = (tree.unflatten(x) for x in zip(*chosen, strict=True))
    return specs, table, kept


def _parts(
    scaled: ScaledWeight, parts: tuple[Part, ...], stored: list[Stored], kept: KeptTensors
) -> ScaledWeight:
    """The parts of a weight's values, and those of its scales."""
    ends = (-scaled.inputs - 1, -1)  # the last axis of outputs, and that of inputs
    block = tuple(scaled.values.shape[i] // scaled.scale.shape[i] for i in ends)
    values = tuple(_outputs_first(part, scaled) for part in parts)
    scales = tuple(kept.keep(p, x, block) for p, x in zip(values, stored, strict=True))
    return dataclasses.replace(scaled, values=values, scale=scales)


def _outputs_first(part: Part, scaled: ScaledWeight) -> Part:
    """A part of an unquantised array as a part of the 8-bit values, stored outputs first."""
    index = part.whole_index(scaled.values.ndim)
    first, after = scaled.leading, scaled.leading + scaled.inputs
    index = (*index[:first], *index[after:], *index[first:after])
    return dataclasses.replace(part, index=index, axes=tuple(range(len(part.axes))))
