"""Reads from a configuration how a checkpoint's weights are quantised.

==================  =========================================================================
`quant_method`      supported
==================  =========================================================================
fp8                 float8_e4m3fn with a scale per block (Qwen3-*-FP8), row or tensor
modelopt            FP8 with a scale per tensor, also told by `hf_quant_config.json`
compressed-tensors  float-quantized (8 bits), int-quantized (8 bits), pack-quantized (4, 8)
gptq                4 or 8 bits, `checkpoint_format` gptq and gptq_v2
awq                 4 bits, version gemm
==================  =========================================================================
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxspec.checkpoints.dequantise import Awq, Gptq, Packed, Scaled
from jaxspec.checkpoints.json_config import REQUIRED, JsonConfig
from jaxspec.checkpoints.tensors import read_json

# Keys by which programs say that weights are quantised or sparse.
KEYS = ("quantization_config", "compression_config", "quantization", "sparsity_config")
MODELOPT = "hf_quant_config.json"  # beside config.json
# The tensors themselves tell which layers were left out; other keys are for calibration or
# kernels.
HARMLESS = frozenset(
    "modules_to_not_convert ignored_layers ignore exclude_modules producer "
    "activation_scheme kv_cache_scheme kv_cache_quant_algo global_compression_ratio "
    "quantization_status version observer observer_kwargs dynamic targets input_activations "
    "output_activations dequantize format config_groups damp_percent static_groups "
    "true_sequential model_name_or_path desc_act model_file_base_name quantizer meta sym "
    "lm_head dataset tokenizer batch_size model_seqlen max_input_length use_cuda_fp16 "
    "use_exllama exllama_config backend do_fuse fuse_max_seq_len modules_to_fuse scale "
    "block_name_to_quantize module_name_preceding_first_block disable_exllama "
    "cache_block_outputs pad_token_id quant_algo kv_cache actorder zero_point".split()
)
NEUTRAL = {"transform_config": ({},), "sparsity_config": ({},), "scale_fmt": ("float", "ue8m0")}

Form = Scaled | Packed | Gptq | Awq


@dataclasses.dataclass(frozen=True)
class Quantisation:
    """How the weights of a checkpoint are stored.

    Attributes:
      name: description, as "fp8 in blocks of 128 x 128".
      form: turns stored arrays into weights.
    """

    name: str
    form: Form

    @property
    def fp8(self) -> bool:
        """Whether weights are float8_e4m3fn."""
        return self.name.startswith("fp8")


def read_quantisation(raw: JsonConfig, folder: Path | None = None) -> Quantisation | None:
    """The quantisation of a configuration; None if weights are not quantised.

    Args:
      folder: folder to look for ModelOpt's own file in.

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
    """The quantisation of a folder, by config.json or ModelOpt's file; None without one."""
    path = folder / "config.json"
    return read_quantisation(JsonConfig(read_json(path), path, "a checkpoint"), folder)


def _finished(own: JsonConfig, method: Callable[[JsonConfig], Quantisation]) -> Quantisation:
    own.get("quant_method", None)
    found = method(own)
    own.finish(HARMLESS, NEUTRAL)
    return found


def _fp8(own: JsonConfig) -> Quantisation:
    own.one_of("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
    if not own.has("weight_block_size"):
        return Quantisation("fp8", Scaled())
    block = _block(own, "weight_block_size")
    return Quantisation(f"fp8 in blocks of {block[0]} x {block[1]}", Scaled(block))


def _block(own: JsonConfig, key: str) -> tuple[int, int]:
    block = own.items(key, int)
    if len(block) != 2 or min(block) < 1:
        raise own.refusal(key, "two positive integers")
    return block


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
    block = _block(weights, "block_structure") if strategy == "block" else None
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
