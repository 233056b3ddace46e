"""Quantised checkpoints: their weights as values, dequantised tensor by tensor on loading.

==================  =========================================================================
`quant_method`      what is read
==================  =========================================================================
fp8                 float8_e4m3fn with a scale per block (Qwen3-*-FP8), row or tensor
modelopt            FP8 with a scale per tensor, also told by `hf_quant_config.json`
compressed-tensors  float-quantized (8 bits), int-quantized (8 bits), pack-quantized (4, 8)
gptq                4 or 8 bits, `checkpoint_format` gptq and gptq_v2
awq                 4 bits, version gemm
==================  =========================================================================

Only weights are dequantised. An engine that also rounds activations or cached keys and values
computes something else; here they keep the dtype of the weights.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxspec.checkpoints.dequantise import Awq, Gptq, Packed, Scaled
from jaxspec.checkpoints.json_config import REQUIRED, JsonConfig
from jaxspec.checkpoints.tensors import DTYPES, SafetensorsFolder, read_json

# Where programs say that the weights are stored in another way than by value.
KEYS = ("quantization_config", "compression_config", "quantization", "sparsity_config")
MODELOPT = "hf_quant_config.json"  # beside config.json
FP8, INT8 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(np.int8)
# Of activations and cached keys and values, which are not rounded here.
ACTIVATIONS = ("input_scale", "output_scale", "k_scale", "v_scale", "q_scale", "kv_scale")
# Which layers were left out follows from the tensors; the others steer calibration or kernels.
HARMLESS = {
    *("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules", "producer"),
    *(
        "activation_scheme",
        "kv_cache_scheme",
        "kv_cache_quant_algo",
        "global_compression_ratio",
    ),
    *("quantization_status", "version", "observer", "observer_kwargs", "dynamic", "targets"),
    *("input_activations", "output_activations", "dequantize", "format", "config_groups"),
    *("damp_percent", "static_groups", "true_sequential", "model_name_or_path", "desc_act"),
    *("model_file_base_name", "quantizer", "meta", "sym", "lm_head", "dataset", "tokenizer"),
    *("batch_size", "model_seqlen", "max_input_length", "use_cuda_fp16", "use_exllama"),
    *("exllama_config", "backend", "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "scale"),
    *("block_name_to_quantize", "module_name_preceding_first_block", "disable_exllama"),
    *(
        "cache_block_outputs",
        "pad_token_id",
        "quant_algo",
        "kv_cache",
        "actorder",
        "zero_point",
    ),
}
NEUTRAL = {"transform_config": ({},), "sparsity_config": ({},), "scale_fmt": ("float", "ue8m0")}

Box = tuple[tuple[int, int], ...]  # first and one past the last, per axis
Form = Scaled | Packed | Gptq | Awq


@dataclasses.dataclass(frozen=True)
class Quantisation:
    """How the weights of a checkpoint are stored.

    Attributes:
      name: for people: "fp8 in blocks of 128 x 128".
      form: what turns stored arrays into weights.
    """

    name: str
    form: Form

    @property
    def fp8(self) -> bool:
        """Whether weights are float8_e4m3fn."""
        return self.name.startswith("fp8")


def read_quantisation(raw: JsonConfig, folder: Path | None = None) -> Quantisation | None:
    """The quantisation that a configuration tells; None where weights are stored by value.

    Args:
      folder: where to look for ModelOpt's own file too.

    Raises:
      ValueError: a method or a setting of it is not supported.
    """
    for key in KEYS:
        if not raw.has(key):
            continue
        value = raw.get(key)
        method = value.get("quant_method") if isinstance(value, dict) else None
        if key != "quantization_config" or method not in METHODS:
            raise ValueError(
                f"{raw.origin}: '{key}' asks for {method or value!r}, which is not supported; "
                f"expected 'quantization_config' with one of {', '.join(METHODS)}, or the "
                "unquantised checkpoint in bfloat16"
            )
        own = JsonConfig(value, f"{raw.origin}, '{key}'", raw.owner)
        return _finished(own, METHODS[method])
    path = folder / MODELOPT if folder is not None else None
    if path is None or not path.exists():
        return None
    file = JsonConfig(read_json(path), path, "ModelOpt")
    return _finished(file.section("quantization"), _modelopt)


def quantisation_of(folder: Path) -> Quantisation | None:
    """That of a folder, by its config.json or ModelOpt's file; None where it has none."""
    path = folder / "config.json"
    return read_quantisation(JsonConfig(read_json(path), path, "a checkpoint"), folder)


def open_weights(
    folder: Path, *, integers: Collection[str] = (), dequantise: bool = True
) -> SafetensorsFolder | QuantisedFolder:
    """The tensors of a folder, by value: as stored, or dequantised as its config.json says.

    Args:
      integers: tensors that are integers or booleans.
      dequantise: all of them, with a warning; else the caller keeps some as they are stored.
    """
    quantisation = quantisation_of(folder)
    if quantisation is None:
        return SafetensorsFolder(folder, integers=tuple(integers))
    if not dequantise:
        return QuantisedFolder(folder, quantisation.form, integers=integers)
    warnings.warn(
        f"{folder} is stored as {quantisation.name}; its weights are dequantised while they "
        "load, and take as much memory as those of the unquantised model",
        stacklevel=2,
    )
    return QuantisedFolder(folder, quantisation.form, integers=integers)


class QuantisedFolder:
    """A folder's tensors as `SafetensorsFolder` gives them, but with quantised ones by value.

    Attributes:
      origin, shapes: as there; tensors that scale others are not listed.

    Raises:
      ValueError: as there; or a tensor that a quantised weight needs is missing, or has a
        shape or dtype that it cannot have.
    """

    def __init__(self, folder: Path, form: Form, *, integers: Collection[str] = ()):
        self._folder = SafetensorsFolder(folder, integers=tuple(integers), quantised=True)
        self._form = form
        self.origin = self._folder.origin
        self._weights = FINDERS[type(form)](form, self._folder)
        used = {part for weight in self._weights.values() for part in weight.parts}
        shapes = {name: weight.shape for name, weight in self._weights.items()}
        for name, dtype in self._folder.dtypes.items():
            if name in used or name.rpartition(".")[2] in ACTIVATIONS:
                continue
            if name not in integers and dtype not in DTYPES.values():
                raise ValueError(
                    f"{self.origin}: tensor '{name}' is stored as {dtype}, and nothing says "
                    "how to read it; the checkpoint is incomplete or of another method"
                )
            shapes[name] = self._folder.shapes[name]
        self.shapes: Mapping[str, tuple[int, ...]] = shapes

    def read(self, name: str) -> np.ndarray:
        """A whole tensor, float32 where it was quantised."""
        if name not in self._weights:
            return self._folder.read(name)
        weight = self._weights[name]
        return weight.values([self._folder.read(part) for part in weight.parts])

    def pieces(
        self, name: str, shape: tuple[int, ...], box: Box, skip: int = 0
    ) -> Iterator[tuple[Box, np.ndarray]]:
        """As `SafetensorsFolder.pieces`; of a quantised tensor the whole box at once."""
        if name not in self._weights:
            yield from self._folder.pieces(name, shape, box, skip)
            return
        seen = self.read(name).reshape(-1)[skip : skip + math.prod(shape)].reshape(shape)
        yield box, seen[tuple(slice(*ends) for ends in box)]

    def stored(self, name: str) -> Stored | None:
        """A weight as it is stored, where that is float8_e4m3fn [O, I] with scales."""
        weight = self._weights.get(name)
        form, shape = self._form, self.shapes[name]
        if weight is None or len(shape) != 2 or self._folder.dtypes.get(name) != FP8:
            return None
        scale = weight.parts[1]
        values = _Finder(self._folder).scale(scale, self._folder.read(scale))
        values = values.reshape((-1, 1) if form.block is None else values.shape)
        block = form.block or (shape[0] // len(values), shape[1])
        return Stored(name, scale, block, values, self._folder)


@dataclasses.dataclass(frozen=True)
class Stored:
    """A weight [O, I] in 8 bits, and its scales.

    Attributes:
      name, scale_name: of the tensors of values and of scales.
      block: outputs and inputs that share a scale, the last ones perhaps fewer.
      scale: float32 [ceil(O / block[0]), ceil(I / block[1])].
      folder: gives the values.
    """

    name: str
    scale_name: str
    block: tuple[int, int]
    scale: np.ndarray
    folder: SafetensorsFolder


@dataclasses.dataclass(frozen=True)
class _Weight:
    """A weight of the model, and how to make it from stored tensors."""

    shape: tuple[int, ...]
    parts: tuple[str, ...]
    values: Callable[[list[np.ndarray]], np.ndarray]


class _Finder:
    """Looks up the stored tensors of a folder's quantised weights."""

    def __init__(self, folder: SafetensorsFolder):
        self.folder = folder

    def part(self, name: str, *shapes: tuple[int, ...]) -> str:
        """The name, of a tensor that must be there in one of the shapes."""
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
        """The shape of a tensor that must be there and have two axes."""
        shape = self.folder.shapes[self.part(name)]
        if len(shape) != 2:
            raise ValueError(
                f"{self.folder.origin}: tensor '{name}' has shape {shape}; expected two axes"
            )
        return shape

    def even_groups(self, name: str, count: int, columns: int) -> None:
        """Raises ValueError unless so many scales share the inputs evenly."""
        if not 1 <= count <= columns or columns % count:
            raise ValueError(
                f"{self.folder.origin}: tensor '{name}' has {count} scales a row; expected a "
                f"divisor of {columns}, its inputs"
            )

    def scale(self, name: str, values: np.ndarray) -> np.ndarray:
        """Scales, which must be positive numbers."""
        values = values.astype(np.float32)
        if not (np.isfinite(values) & (values > 0)).all():
            raise ValueError(
                f"{self.folder.origin}: tensor '{name}' holds {_worst(values)}; a scale is "
                "positive: the checkpoint is damaged, download it again"
            )
        return values

    def groups(self, name: str, values: np.ndarray, count: int) -> np.ndarray:
        """The group of every input, of so many groups."""
        if values.min(initial=0) < 0 or values.max(initial=0) >= count:
            raise ValueError(
                f"{self.folder.origin}: tensor '{name}' names groups {values.min()} … "
                f"{values.max()}; there are {count}: the checkpoint is damaged"
            )
        return values


def _worst(values: np.ndarray) -> float:
    return float(values[~(np.isfinite(values) & (values > 0))].flat[0])


def _find_scaled(form: Scaled, folder: SafetensorsFolder) -> dict[str, _Weight]:
    find, found = _Finder(folder), {}
    for name, dtype in folder.dtypes.items():
        if dtype not in (FP8, INT8):
            continue
        shape = folder.shapes[name]
        if len(shape) < 2:
            find.matrix(name)  # refuses it
        inverse = f"{name}_scale_inv"
        scale = inverse if inverse in folder.shapes else f"{name}_scale"
        find.part(scale, *form.scale_shapes(shape))

        def values(arrays, scale=scale):
            return form.weight(arrays[0], find.scale(scale, arrays[1]))

        found[name] = _Weight(shape, (name, scale), values)
    return found


def _find_packed(form: Packed, folder: SafetensorsFolder) -> dict[str, _Weight]:
    find, found, per_word = _Finder(folder), {}, 32 // form.bits
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
        found[f"{base}.weight"] = _Weight(shape, parts, values)
    return found


def _find_gptq(form: Gptq, folder: SafetensorsFolder) -> dict[str, _Weight]:
    find, found, per_word = _Finder(folder), {}, 32 // form.bits
    for name in folder.shapes:
        base, _, kind = name.rpartition(".")
        if kind != "qweight":
            continue
        words, rows = find.matrix(name)
        columns = words * per_word
        scales = f"{base}.scales"
        count = find.matrix(scales)[0]
        find.part(scales, (count, rows))
        zeros = find.part(f"{base}.qzeros", (count, -(-rows // per_word)))
        groups = find.part(f"{base}.g_idx", (columns,))

        def values(arrays, scales=scales, groups=groups):
            qweight, qzeros, scale, chosen = arrays
            scale = find.scale(scales, scale)
            chosen = find.groups(groups, chosen, len(scale))
            return form.weight(qweight, qzeros, scale, chosen)

        parts = (name, zeros, scales, groups)
        found[f"{base}.weight"] = _Weight((rows, columns), parts, values)
    return found


def _find_awq(form: Awq, folder: SafetensorsFolder) -> dict[str, _Weight]:
    find, found = _Finder(folder), {}
    for name in folder.shapes:
        base, _, kind = name.rpartition(".")
        if kind != "qweight":
            continue
        columns, words = find.matrix(name)
        rows = words * 8
        scales = f"{base}.scales"
        count = find.matrix(scales)[0]
        find.part(scales, (count, rows))
        find.even_groups(scales, count, columns)
        zeros = find.part(f"{base}.qzeros", (count, words))

        def values(arrays, scales=scales):
            return form.weight(arrays[0], arrays[1], find.scale(scales, arrays[2]))

        found[f"{base}.weight"] = _Weight((rows, columns), (name, zeros, scales), values)
    return found


FINDERS: Mapping[type, Callable[[Any, SafetensorsFolder], dict[str, _Weight]]] = {
    Scaled: _find_scaled,
    Packed: _find_packed,
    Gptq: _find_gptq,
    Awq: _find_awq,
}


def _finished(own: JsonConfig, method: Callable[[JsonConfig], Quantisation]) -> Quantisation:
    own.get("quant_method", None)
    found = method(own)
    own.finish(HARMLESS, NEUTRAL)
    return found


def _fp8(own: JsonConfig) -> Quantisation:
    own.one_of("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
    if not own.has("weight_block_size"):
        return Quantisation("fp8", Scaled())
    block = own.items("weight_block_size", int)
    if len(block) != 2 or min(block) < 1:
        raise own.refusal("weight_block_size", "two positive integers")
    return Quantisation(f"fp8 in blocks of {block[0]} x {block[1]}", Scaled(block))


def _modelopt(own: JsonConfig) -> Quantisation:
    own.one_of("quant_algo", ("FP8",), None)
    return Quantisation("fp8 (ModelOpt)", Scaled())


def _compressed(own: JsonConfig) -> Quantisation:
    groups = own.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise own.refusal("config_groups", "groups of layers and how their weights are stored")
    found = {_group(own, name, group) for name, group in groups.items()}
    if len(found) > 1:
        raise own.refusal("config_groups", "one way of storing weights for all groups")
    return found.pop()


def _group(own: JsonConfig, name: str, group: Any) -> Quantisation:
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        raise own.refusal("config_groups", f"in '{name}' how the weights are stored")
    format = group.get("format") or own.get("format")
    weights = JsonConfig(weights, f"{own.origin}, '{name}'", own.owner)
    packed = format == "pack-quantized"
    kind = "float" if format in ("float-quantized", "naive-quantized") else "int"
    if kind == "int" and format not in ("int-quantized", "pack-quantized"):
        raise own.refusal("format", "float-quantized, int-quantized or pack-quantized")
    weights.one_of("type", (kind,), kind)
    bits = weights.one_of("num_bits", (4, 8) if packed else (8,), REQUIRED)
    if packed:
        weights.one_of("strategy", ("tensor", "channel", "group"), "tensor")
        return Quantisation(f"int{bits}, packed (compressed-tensors)", Packed(bits))
    strategy = weights.one_of("strategy", ("tensor", "channel", "block"), "tensor")
    block = weights.items("block_structure", int) if strategy == "block" else None
    if block is not None and (len(block) != 2 or min(block) < 1):
        raise weights.refusal("block_structure", "two positive integers")
    name = {"float": "fp8", "int": "int8"}[kind]
    return Quantisation(f"{name} (compressed-tensors)", Scaled(block))


def _gptq(own: JsonConfig) -> Quantisation:
    bits = own.one_of("bits", (4, 8), REQUIRED)
    own.one_of("pack_dtype", ("int32",), "int32")
    own.integer("group_size", -1, least=-1)
    form = own.one_of("checkpoint_format", ("gptq", "gptq_v2"), "gptq")
    return Quantisation(f"int{bits} ({form})", Gptq(bits, form == "gptq"))


def _awq(own: JsonConfig) -> Quantisation:
    for key in ("bits", "w_bit"):  # of transformers and of AutoAWQ
        own.one_of(key, (4,), 4)
    for key in ("version", "format"):
        own.one_of(key, ("gemm", "GEMM"), "gemm")
    for key in ("group_size", "q_group_size"):
        own.integer(key, 128, least=-1)
    return Quantisation("int4 (awq)", Awq())


METHODS: Mapping[str, Callable[[JsonConfig], Quantisation]] = {
    "fp8": _fp8,
    "modelopt": _modelopt,
    "compressed-tensors": _compressed,
    "gptq": _gptq,
    "awq": _awq,
}
