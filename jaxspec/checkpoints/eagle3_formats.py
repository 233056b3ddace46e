"""The formats of EAGLE-3 drafters.

===========  ==============================================
format       target layers it reads
===========  ==============================================
speculators  `eagle_aux_hidden_state_layer_ids` at the top:
             streams that enter a layer
deepspec     `target_layer_ids`: outputs of a layer
eagle3       `eagle_aux_hidden_state_layer_ids` in
             `eagle_config`: outputs; without it those of
             layers 1, n/2 - 1 and n - 4
===========  ==============================================

`eagle3` is the format of the EAGLE repository, AngelSlim, SpecForge and NeMo. The key
`norm_output` has two meanings: the fed-back output has passed the final norm, or, in
SpecForge's files (`LlamaForCausalLMEagle3`), whether the LM head reads the output after the
norm.
"""

from __future__ import annotations

from typing import Any

from jaxspec.checkpoints import speculators
from jaxspec.checkpoints.eagle_format import (
    OWN,
    TAPS,
    EagleFormat,
    layers_to_json,
    make,
    norms_to_json,
    taps_from_json,
)
from jaxspec.checkpoints.json_config import JsonConfig
from jaxspec.drafters.eagle_head import EagleConfig, ParallelEagleConfig

SPECFORGE = "LlamaForCausalLMEagle3"


class EagleSpeculators(EagleFormat):
    """vLLM's `speculators`.

    Attributes:
      type: its `speculators_model_type`.
      architecture: the class that its files name.
    """

    name = "speculators"
    type = "eagle3"
    architecture = "Eagle3DraftModel"

    def recognises(self, raw):
        return raw.get(speculators.KEY) == self.type

    def from_json(self, whole, target):
        layer, taps = whole.section("transformer_layer_config"), taps_from_json(whole, target)
        return make(self.kind, whole, layer, taps, **self.own_fields(whole))

    def own_fields(self, whole: JsonConfig) -> dict[str, Any]:
        """Fields that other formats of EAGLE-3 drafters read differently."""
        return {"steps": _steps(whole), "feedback_after_norm": whole.flag("norm_output")}

    def to_json(self, c, dtype, *, kept, verifier):
        return norms_to_json(c) | {
            speculators.KEY: self.type,
            "speculators_version": speculators.VERSION,
            "speculators_config": speculators.proposal(self.type, c.steps, verifier),
            "architectures": [self.architecture],
            "draft_vocab_size": c.vocab_size if kept is None else kept,
            "dtype": dtype,
            TAPS: [tap + 1 for tap in c.taps],
            "embed_requires_grad": False,
            "norm_before_residual": c.residual_after_norm,
            "norm_output": c.feedback_after_norm,
            "target_hidden_size": None,
            "tie_word_embeddings": False,
            "transformer_layer_config": layers_to_json(c),
        }

    def missing(self, c, kept):
        return {
            "logits before the norm": not c.logits_after_norm,
            "another width than the target's": c.hidden_size != c.target_hidden_size,
        }


class ParallelEagleSpeculators(EagleSpeculators):
    """P-EAGLE's format, which adds a mask; the file's embedding was trained too."""

    kind = ParallelEagleConfig
    type = "peagle"
    architecture = "PEagleDraftModel"

    def own_fields(self, whole):
        mask = whole.integer("mask_token_id", least=0)
        return super().own_fields(whole) | {"mask_token_id": mask}

    def to_json(self, c, dtype, *, kept, verifier):
        raw = super().to_json(c, dtype, kept=kept, verifier=verifier)
        return raw | {"mask_token_id": c.mask_token_id, "embed_requires_grad": True}


class EagleDeepSpec(EagleFormat):
    """DeepSpec's format: Qwen3 layers, no feature norms, all keys at the top."""

    name = "deepspec"

    def recognises(self, raw):
        return "ttt_length" in raw and "target_layer_ids" in raw

    def from_json(self, whole, target):
        _check_one_layer(whole)
        taps, steps = whole.items("target_layer_ids", int), whole.integer("ttt_length")
        feedback = whole.flag("norm_output")
        fields = dict(steps=steps, feedback_after_norm=feedback)
        return make(self.kind, whole, whole, taps, **fields)

    def to_json(self, c, dtype, *, kept, verifier):
        return layers_to_json(c) | {
            "architectures": ["Qwen3Eagle3Model"],
            "draft_num_hidden_layers": 1,
            "dtype": dtype,
            "num_target_layers": c.target_layers,
            "step_loss_decay": 0.8,
            "target_layer_ids": list(c.taps),
            "ttt_length": c.steps,
        }

    def missing(self, c, kept):
        return _beyond_one_layer(c) | {
            "norms of the taps": c.tap_norm is not None,
            "a residual after the norm": c.residual_after_norm,
            "feedback after the norm": c.feedback_after_norm,
            "logits before the norm": not c.logits_after_norm,
            "layers without norms of queries and keys": not c.qk_norm,
            "another width than the target's": c.hidden_size != c.target_hidden_size,
            "a draft vocabulary": kept is not None,
        }


class EagleOriginal(EagleFormat):
    """The EAGLE repository's format, as SpecForge and SGLang read it."""

    name = "eagle3"
    repeats_embedding = False

    def recognises(self, raw):
        names = raw.get("architectures")
        named = isinstance(names, list) and any("Eagle3" in str(name) for name in names)
        reduced = "draft_vocab_size" in raw and raw.get("num_hidden_layers", 1) == 1
        return named or OWN in raw or reduced

    def from_json(self, whole, target):
        _check_one_layer(whole)
        of_logits = SPECFORGE in whole.get("architectures", ())
        output = whole.flag("norm_output", of_logits)
        return make(
            self.kind,
            whole,
            whole,
            taps_from_json(whole, target),
            feedback_after_norm=output and not of_logits,
            logits_after_norm=output or not of_logits,
        )

    def to_json(self, c, dtype, *, kept, verifier):
        norms = norms_to_json(c)
        own = {TAPS: list(c.taps), "use_aux_hidden_state": True} | norms
        return (
            layers_to_json(c)
            | norms
            | {
                "architectures": [SPECFORGE],
                "draft_vocab_size": c.vocab_size if kept is None else kept,
                "dtype": dtype,
                OWN: own,
                "norm_output": c.logits_after_norm,
                "target_hidden_size": c.target_hidden_size,
            }
        )

    def missing(self, c, kept):
        return _beyond_one_layer(c) | {
            "a residual after the norm": c.residual_after_norm,
            "feedback after the norm": c.feedback_after_norm,
            "norms of queries and keys": c.qk_norm,
            f"{len(c.taps)} taps": len(c.taps) != 3,
        }

    def written_name(self, name):
        return name.replace("layers.0.", "midlayer.")


def _check_one_layer(whole: JsonConfig) -> None:
    if whole.count("num_hidden_layers", 1) > 1:
        raise whole.refusal("num_hidden_layers", "1: programs disagree about further layers")


def _beyond_one_layer(c: EagleConfig) -> dict[str, bool]:
    """Features that files of a single layer lack, and whether the drafter has each."""
    return {f"{c.num_layers} layers": c.num_layers > 1, "windows": any(c.window)}


def _steps(whole: JsonConfig) -> int:
    """Tokens drafted per round, by `speculators_config`."""
    found = whole.get("speculators_config", {})
    methods = found.get("proposal_methods") if isinstance(found, dict) else None
    if isinstance(methods, list) and methods and isinstance(methods[0], dict):
        method = JsonConfig(methods[0], f"{whole.origin}, 'proposal_methods'", whole.owner)
        return method.integer("speculative_tokens", EagleConfig.steps)
    return EagleConfig.steps
