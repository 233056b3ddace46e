"""Quantises linear layers to fp8, in blocks of 128 x 128 as in Qwen3-*-FP8."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from tqdm import tqdm

from jaxspec.checkpoints.dequantise import Scaled
from jaxspec.checkpoints.fuse import check_weights
from jaxspec.checkpoints.quantised_tensors import FP8
from jaxspec.checkpoints.target_weights import LM_HEAD
from jaxspec.checkpoints.tensors import SafetensorsFolder

BLOCK = (128, 128)  # outputs and inputs that share a scale
LARGEST = float(ml_dtypes.finfo(FP8).max)  # 448
SMALLEST = float(np.finfo(np.float32).tiny)  # of a scale
LINEAR = re.compile(r"(?:.*\.)?(layers\.\d+)\..*\b(?:q|k|v|o|gate|up|down|out)_proj\.weight")
STACKED = re.compile(r"(.*\.experts)\.(gate_up|down)_proj")
EMBEDDING = re.compile(r"model\.(?:language_model\.)?embed_tokens\.weight")


class Fp8Tensors:
    """The tensors of an unquantised folder, with linear layers quantised to fp8.

    These are the linear layers of attention and feed-forward layers, experts included, and the
    last one of each gated delta net. All others, embedding, norms and router stay as stored,
    and so does the LM head unless asked for. Experts stacked in one tensor become one tensor
    each, as in Qwen's own fp8 checkpoints.

    Attributes:
      errors: relative RMS rounding error by layer, of the last pass over `tensors`.
      section: `quantization_config` of the result.
    """

    def __init__(self, folder: Path, *, lm_head: bool, tied: bool):
        """
        Args:
          lm_head: quantise the LM head too.
          tied: whether the LM head is the embedding, and becomes a separate tensor.
        """
        self._tensors = SafetensorsFolder(folder)
        shapes = self._tensors.shapes
        self._sources = _sources(self._tensors)
        linear = {name: LINEAR.fullmatch(name) for name in self._sources}
        self._layers = {n: found[1] for n, found in linear.items() if found}
        if not self._layers:
            raise ValueError(
                f"{folder} has no linear layers under Hugging Face names ('…q_proj.weight'); "
                "expected a Hugging Face checkpoint"
            )
        if lm_head:
            self._layers[LM_HEAD] = "LM head"
            places = [LM_HEAD, *filter(EMBEDDING.fullmatch, shapes if tied else ())]
            found = [name for name in places if name in shapes]
            if not found:
                raise ValueError(
                    f"{folder} has no tensor '{LM_HEAD}'; the checkpoint is incomplete"
                )
            self._sources[LM_HEAD] = found[0], None
        self._squares: dict[str, np.ndarray] = {}
        kept = [n.removesuffix(".weight") for n in self._sources if n not in self._layers]
        self.section = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(BLOCK),
            "modules_to_not_convert": sorted(kept),
        }

    @property
    def errors(self) -> dict[str, float]:
        return {
            layer: math.sqrt(change / max(whole, SMALLEST))
            for layer, (change, whole) in self._squares.items()
        }

    def tensors(self, desc: str) -> Iterator[tuple[str, np.ndarray]]:
        """Every tensor by name, each quantised one followed by its scales.

        Raises:
          ValueError: a linear layer has a value that no weight can have.
        """
        self._squares = defaultdict(lambda: np.zeros(2))
        for name, source in tqdm(self._sources.items(), desc=desc, unit="tensor"):
            weight = self._tensors.read(*source)
            if name not in self._layers:
                yield name, weight
                continue
            weight = weight.astype(np.float32)
            check_weights(weight, source[0], self._tensors.origin)
            values, scale = quantise(weight)
            change = dequantised(values, scale) - weight
            squares = [np.square(x, dtype=np.float64).sum() for x in (change, weight)]
            self._squares[self._layers[name]] += squares
            yield name, values
            yield f"{name}_scale_inv", scale


def _sources(tensors: SafetensorsFolder) -> dict[str, tuple[str, tuple[int, int] | None]]:
    """For every tensor of the result, one that is stored and the range of its rows, if not all.

    Raises:
      ValueError: a tensor of stacked experts, gate_up_proj [E, 2 F, M] or down_proj [E, M, F],
        has another shape.
    """
    found: dict[str, tuple[str, tuple[int, int] | None]] = {}
    for name, shape in tensors.shapes.items():
        stacked = STACKED.fullmatch(name)
        if stacked is None:
            found[name] = name, None
            continue
        kinds = stacked[2].split("_")
        if len(shape) != 3 or shape[1] % len(kinds):
            raise ValueError(
                f"{tensors.origin}: tensor '{name}' has shape {shape}; expected "
                f"(experts, {len(kinds)} x outputs, inputs)"
            )
        count = shape[1] // len(kinds)
        for i in range(shape[0] * len(kinds)):
            expert, kind = divmod(i, len(kinds))
            own = f"{stacked[1]}.{expert}.{kinds[kind]}_proj.weight"
            found[own] = name, (i * count, (i + 1) * count)
    return found


def quantise(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantises a weight [O, I] float32 to float8_e4m3fn values and float32 block scales.

    The largest value of a block becomes the largest of the format.
    """
    edges = (range(0, n, size) for n, size in zip(weight.shape, BLOCK, strict=True))
    rows, columns = map(list, edges)
    largest = np.maximum.reduceat(np.abs(weight), rows, axis=0)
    scale = np.maximum.reduceat(largest, columns, axis=1) / np.float32(LARGEST)
    scale = np.where(scale < SMALLEST, np.float32(1), scale)
    return (weight / Scaled(BLOCK).spread(scale, weight.shape)).astype(FP8), scale


def dequantised(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The weight [O, I] float32 of values and scales."""
    return Scaled(BLOCK).weight(values, scale)
