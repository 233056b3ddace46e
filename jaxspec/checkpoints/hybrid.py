"""Hybrid targets in Hugging Face's format: Qwen3.5 and its successors, Qwen3-Next.

Qwen3.5's files hold a multimodal model, of which only the text model is read, and a
multi-token-prediction layer, which is a drafter (`checkpoints.mtp`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from jaxspec.checkpoints import rope
from jaxspec.checkpoints.fuse import Tensors
from jaxspec.checkpoints.json_config import JsonConfig
from jaxspec.checkpoints.quantisation import KEYS as QUANTISATION
from jaxspec.checkpoints.quantised import Stored
from jaxspec.checkpoints.tensors import Box
from jaxspec.config import DeltaNetConfig, TargetConfig

DENSE = ("qwen3_5", "qwen3_5_text")
SPARSE = ("qwen3_5_moe", "qwen3_5_moe_text")
NEXT = "qwen3_next"
MODEL_TYPES = (*DENSE, *SPARSE, NEXT)
NESTED, PLAIN = "model.language_model.", "model."
PREDICTORS, VISION = ("mtp.", "model.mtp."), "model.visual."
ARCHITECTURES = {  # of the text models of multimodal ones, by themselves
    "qwen3_5": "Qwen3_5ForCausalLM",
    "qwen3_5_moe": "Qwen3_5MoeForCausalLM",
}

# Keys besides the text model's configuration: ids of images and videos, and their encoders.
MULTIMODAL = (
    "vision_config image_token_id video_token_id vision_start_token_id vision_end_token_id "
    "audio_token_id language_model_only"
).split()
LINEAR, FULL = "linear_attention", "full_attention"
DEFAULT_ROTARY = 0.25  # transformers' default


def text_section(raw: JsonConfig) -> JsonConfig:
    """The text model's configuration, in a multimodal configuration or by itself.

    Raises:
      ValueError: a key differs between the two levels.
    """
    if not raw.has("text_config"):
        return raw
    text = raw.section("text_config")
    kind = f"{raw.get('model_type')}_text"
    text.one_of("model_type", (kind,), kind)
    for key in MULTIMODAL:
        raw.has(key)
    for key in QUANTISATION:
        if text.has(key):
            raise text.refusal(key, "it beside 'text_config'")
    if raw.has("tie_word_embeddings"):
        tied = raw.flag("tie_word_embeddings")
        text.one_of("tie_word_embeddings", (tied,), tied)
    return text


def text_to_json(whole: Mapping[str, Any], c: TargetConfig) -> dict[str, Any]:
    """`config.json` of the text model by itself, from that of a multimodal model."""
    return whole["text_config"] | {
        "architectures": [ARCHITECTURES[whole["model_type"]]],
        "eos_token_id": list(c.eos_token_ids) or None,
        "model_type": f"{whole['model_type']}_text",
        "tie_word_embeddings": c.tie_embeddings,
    }


def fields(text: JsonConfig, model_type: str) -> dict[str, Any]:
    """Fields of `TargetConfig` that only hybrids have.

    Raises:
      ValueError: a key has a value that is not supported.
    """
    text.one_of("attn_output_gate", (True,), True)
    text.one_of("output_gate_type", ("swish", "silu"), "swish")
    text.one_of("mamba_ssm_dtype", ("float32",), "float32")
    found = dict(
        delta_net=_delta_net(text, interleaved=model_type == NEXT),
        rotary_dim=_rotary_dim(text),
        attention_gate=True,
        zero_centered_norms=True,
    )
    if model_type not in DENSE:
        found["shared_expert_size"] = text.integer("shared_expert_intermediate_size")
    return found


def _delta_net(text: JsonConfig, *, interleaved: bool) -> DeltaNetConfig:
    return text.make(
        DeltaNetConfig,
        layers=tuple(i for i, kind in enumerate(_layer_types(text)) if kind == LINEAR),
        key_heads=text.integer("linear_num_key_heads"),
        value_heads=text.integer("linear_num_value_heads"),
        key_dim=text.integer("linear_key_head_dim"),
        value_dim=text.integer("linear_value_head_dim"),
        taps=text.integer("linear_conv_kernel_dim", 4),
        interleaved=interleaved,
    )


def _layer_types(text: JsonConfig) -> tuple[str, ...]:
    """The type of every layer, `LINEAR` or `FULL`, listed or by an interval (default: 4).

    Raises:
      ValueError: a type is unknown, or there are too few.
    """
    layers = text.count("num_hidden_layers")
    interval = text.integer("full_attention_interval", 4)
    regular = tuple(LINEAR if (i + 1) % interval else FULL for i in range(layers))
    kinds = text.items("layer_types", str, regular)
    if len(kinds) != layers or set(kinds) - {LINEAR, FULL}:
        raise text.refusal("layer_types", f"{LINEAR!r} or {FULL!r} for each of {layers} layers")
    return kinds


def _rotary_dim(text: JsonConfig) -> int:
    """Rotated dimensions of a head; the share is among the rotary settings or beside them."""
    beside = text.number(rope.PARTIAL, DEFAULT_ROTARY)
    share = rope.settings(text)[0].number(rope.PARTIAL, beside)
    size = share * text.integer("head_dim")
    if size != int(size) or share > 1:
        raise text.refusal(rope.PARTIAL, "a share of whole dimensions of a head")
    return int(size)


class NamedTensors:
    """Some of a checkpoint's tensors, under other names.

    Attributes:
      origin, shapes: as in `Tensors`.
    """

    def __init__(self, tensors: Tensors, names: Mapping[str, str]):
        self.origin, self._tensors, self._names = tensors.origin, tensors, names
        self.shapes = {name: tensors.shapes[own] for name, own in names.items()}

    def pieces(
        self, name: str, shape: tuple[int, ...], box: Box, skip: int = 0
    ) -> Iterator[tuple[Box, Any]]:
        return self._tensors.pieces(self._names[name], shape, box, skip)

    def stored(self, name: str) -> Stored | None:
        return self._tensors.stored(self._names[name])


def text_tensors(tensors: Tensors) -> NamedTensors:
    """The text model's tensors among a multimodal model's, by their plain names; `left_out`
    counts the others."""
    names = {
        name.replace(NESTED, PLAIN, 1) if name.startswith(NESTED) else name: name
        for name in tensors.shapes
        if not name.startswith((*PREDICTORS, VISION))
    }
    return NamedTensors(tensors, names)


def left_out(names: Collection[str]) -> dict[str, int]:
    """Numbers of tensors that are not the text model's, by what they belong to."""
    prefixes = {"vision": VISION, "MTP": PREDICTORS}
    counts = {part: sum(name.startswith(p) for name in names) for part, p in prefixes.items()}
    return {part: count for part, count in counts.items() if count}


def predictor_tensors(tensors: Tensors) -> NamedTensors:
    """Tensors of the prediction layers, by names that begin with "mtp.".

    In files of their own the prefix may be missing.
    """
    prefixes = ("",) if "fc.weight" in tensors.shapes else PREDICTORS
    names = {
        PREDICTORS[0] + name.removeprefix(prefix): name
        for prefix in prefixes
        for name in tensors.shapes
        if name.startswith(prefix)
    }
    return NamedTensors(tensors, names)
