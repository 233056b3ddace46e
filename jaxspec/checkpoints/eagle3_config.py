"""`config.json` of EAGLE-3 drafters, to `EagleConfig` and back.

===========  ==============================  ==============================================
format       recognised by                   target layers it reads
===========  ==============================  ==============================================
speculators  `speculators_model_type`        `eagle_aux_hidden_state_layer_ids` at the top:
                                             streams that enter a layer
deepspec     `ttt_length`                    `target_layer_ids`: outputs of a layer
eagle3       `eagle_config`, "Eagle3" in     `eagle_aux_hidden_state_layer_ids` in
             `architectures`, or one layer   `eagle_config`: outputs; without it those of
             with `draft_vocab_size`         layers 1, n/2 - 1 and n - 4
===========  ==============================  ==============================================

`eagle3` are the files of the EAGLE repository, AngelSlim, SpecForge and NeMo. The key
`norm_output` means two things: that what is fed back has passed the final norm, or, in
SpecForge's files (`LlamaForCausalLMEagle3`), whether the LM head reads it after the norm.
"""

from __future__ import annotations

from typing import Any

from jaxspec.checkpoints import speculators, visibility
from jaxspec.checkpoints.json_config import JsonConfig
from jaxspec.checkpoints.known_keys import HARMLESS, NEUTRAL
from jaxspec.checkpoints.quantised import read_quantisation
from jaxspec.checkpoints.rope import read_rope, rope_to_json
from jaxspec.config import TargetConfig
from jaxspec.drafters.eagle_head import EagleConfig

FORMATS = ("eagle3", "deepspec", "speculators")
TAPS, OWN = "eagle_aux_hidden_state_layer_ids", "eagle_config"
SPECFORGE = "LlamaForCausalLMEagle3"
# Training, the target's own vocabulary, and what a drafter of one layer cannot look at.
EAGLE_HARMLESS = HARMLESS | {
    *("eos_token_id", "embed_requires_grad", "step_loss_decay", "draft_num_hidden_layers"),
    *("speculators_model_type", "speculators_config", "speculators_version"),
    "tie_word_embeddings",
}
EAGLE_NEUTRAL = NEUTRAL | {"parallel_drafting": (False,), "mask_token_id": (), "num_depths": ()}


def recognise(raw: dict[str, Any]) -> str | None:
    """The format, one of `FORMATS`; None where it is no EAGLE-3 drafter's configuration."""
    if speculators.KEY in raw:
        return "speculators" if raw[speculators.KEY] == "eagle3" else None
    names = raw.get("architectures")
    named = isinstance(names, list) and any("Eagle3" in str(name) for name in names)
    if "ttt_length" in raw and "target_layer_ids" in raw:
        return "deepspec"
    reduced = "draft_vocab_size" in raw and raw.get("num_hidden_layers", 1) == 1
    return "eagle3" if named or OWN in raw or reduced else None


def from_json(raw: dict[str, Any], origin: Any, target: TargetConfig) -> EagleConfig:
    """The drafter that a `config.json` describes.

    Args:
      target: that it drafts for, by whose depth some files mean the layers they read.

    Raises:
      ValueError: a key is missing, asks for something that is not implemented, contradicts
        another, or is of another target.
    """
    format = recognise(raw)
    whole = JsonConfig(raw, origin, "an EAGLE-3 drafter")
    read_quantisation(whole)
    layer = whole.section("transformer_layer_config") if format == "speculators" else whole
    shape, flags = _shape(layer), _flags(whole, format)
    config = whole.make(
        EagleConfig,
        target_hidden_size=whole.integer("target_hidden_size", shape["hidden_size"]),
        target_layers=target.num_layers,
        taps=_taps(whole, format, target),
        steps=_steps(whole, format),
        **shape,
        **flags,
    )
    if config.num_layers > 1 and format != "speculators":
        raise whole.refusal("num_hidden_layers", "1: programs disagree about further layers")
    if target.num_layers - 1 in config.taps:
        raise ValueError(
            f"{origin}: the drafter reads layer {target.num_layers - 1}, the last, before the "
            "target's final norm; expected layers before it"
        )
    for name, ours, theirs in (
        ("target_hidden_size", config.target_hidden_size, target.hidden_size),
        ("vocab_size", config.vocab_size, target.vocab_size),
        ("num_target_layers", whole.integer("num_target_layers", target.num_layers), None),
    ):
        theirs = target.num_layers if theirs is None else theirs
        if ours != theirs:
            raise ValueError(
                f"{origin}: the drafter's '{name}' is {ours}, the target's is {theirs}; use "
                "the target that it was trained for"
            )
    whole.integer("draft_vocab_size", config.vocab_size)  # the tensors are checked for it
    whole.flag("tie_word_embeddings")
    whole.finish(EAGLE_HARMLESS, EAGLE_NEUTRAL)
    return config


def _shape(layer: JsonConfig) -> dict[str, Any]:
    """Fields of the layers, from the keys of a Llama or a Qwen3."""
    kind = layer.one_of("model_type", ("llama", "qwen3"), "llama")
    layer.one_of("hidden_act", ("silu",), "silu")
    layer.one_of("attention_bias", (False,), False)
    layer.one_of("mlp_bias", (False,), False)
    width, heads = layer.integer("hidden_size"), layer.integer("num_attention_heads")
    layers = layer.integer("num_hidden_layers", 1)
    window = (None,) * layers
    if layer.has("layer_types") or kind == "qwen3":
        window = visibility.windows(layer, layers, switched=kind == "qwen3")
    else:
        layer.one_of("sliding_window", (None,), None)
    theta, scaling = read_rope(layer, full_rotary=True)
    return dict(
        vocab_size=layer.integer("vocab_size"),
        hidden_size=width,
        intermediate_size=layer.integer("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=layer.integer("num_key_value_heads", heads),
        head_dim=layer.integer("head_dim", width // heads),
        qk_norm=kind == "qwen3",
        window=window,
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=layer.number("rms_norm_eps", 1e-6),
        max_positions=layer.integer("max_position_embeddings", 40_960),
    )


def _flags(whole: JsonConfig, format: str) -> dict[str, Any]:
    """Fields of the norms."""
    places = [whole]
    if whole.has(OWN):
        places.append(whole.section(OWN))
        places[1].one_of("use_aux_hidden_state", (True,), True)
    joined = any([place.flag("norm_before_fc") for place in places])
    each = any([place.flag(key) for place in places for key in ("fc_norm", "use_aux_norm")])
    if joined and each:
        raise whole.refusal("fc_norm", "one of 'fc_norm' and 'norm_before_fc' alone")
    of_logits = format == "eagle3" and SPECFORGE in whole.get("architectures", ())
    output = whole.flag("norm_output", of_logits)
    return dict(
        tap_norm="joined" if joined else "each" if each else None,
        residual_after_norm=whole.flag("norm_before_residual"),
        feedback_after_norm=output and not of_logits,
        logits_after_norm=output or not of_logits,
    )


def _taps(whole: JsonConfig, format: str, target: TargetConfig) -> tuple[int, ...]:
    """Outputs of target layers, 0-based."""
    if format == "deepspec":
        return whole.items("target_layer_ids", int)
    found = {}
    if whole.has(TAPS):
        found["at the top"] = tuple(i - 1 for i in whole.items(TAPS, int))
    if whole.has(OWN) and whole.section(OWN).has(TAPS):
        found[f"in '{OWN}'"] = whole.section(OWN).items(TAPS, int)
    if len(set(found.values())) > 1:
        raise ValueError(
            f"{whole.origin}: '{TAPS}' at the top means outputs of layers "
            f"{list(found['at the top'])}, in '{OWN}' {list(found[f'in {OWN!r}'])}; expected "
            "the same, the one at the top higher by one"
        )
    layers = target.num_layers
    return next(iter(found.values()), (1, layers // 2 - 1, layers - 4))


def _steps(whole: JsonConfig, format: str) -> int:
    """Tokens drafted per round, where the file says it."""
    if format == "deepspec":
        return whole.integer("ttt_length")
    found = whole.get("speculators_config", {})
    methods = found.get("proposal_methods") if isinstance(found, dict) else None
    if isinstance(methods, list) and methods and isinstance(methods[0], dict):
        method = JsonConfig(methods[0], f"{whole.origin}, 'proposal_methods'", whole.owner)
        return method.integer("speculative_tokens", EagleConfig.steps)
    return EagleConfig.steps


def to_json(
    config: EagleConfig,
    format: str,
    dtype: str,
    *,
    kept: int | None = None,
    verifier: str | None = None,
) -> dict[str, Any]:
    """`config.json` of a drafter in one of `FORMATS`.

    Args:
      kept: tokens of the draft vocabulary, None for all.
      verifier: the target's hub name or path, which speculators' format names.

    Raises:
      ValueError: the format cannot express the configuration.
    """
    _check_expressible(config, format, kept)
    c = config
    layer = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "hidden_size": c.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": c.intermediate_size,
        "max_position_embeddings": c.max_positions,
        "model_type": "qwen3" if c.qk_norm else "llama",
        "num_attention_heads": c.num_heads,
        "num_hidden_layers": c.num_layers,
        "num_key_value_heads": c.num_kv_heads,
        "pad_token_id": None,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_parameters": rope_to_json(c.rope_theta, c.rope_scaling),
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": c.vocab_size,
    }
    windows = visibility.to_json(c)
    if c.qk_norm:
        layer |= windows | {"max_window_layers": c.num_layers}
    else:
        layer |= {"mlp_bias": False, "pretraining_tp": 1}
        if any(c.window):
            layer |= {key: windows[key] for key in ("layer_types", "sliding_window")}
    norms = {"fc_norm": c.tap_norm == "each", "norm_before_fc": c.tap_norm == "joined"}
    if format == "deepspec":
        return layer | {
            "architectures": ["Qwen3Eagle3Model"],
            "draft_num_hidden_layers": 1,
            "dtype": dtype,
            "num_target_layers": c.target_layers,
            "step_loss_decay": 0.8,
            "target_layer_ids": list(c.taps),
            "ttt_length": c.steps,
        }
    if format == "eagle3":
        return (
            layer
            | norms
            | {
                "architectures": [SPECFORGE],
                "draft_vocab_size": c.vocab_size if kept is None else kept,
                "dtype": dtype,
                OWN: {TAPS: list(c.taps), "use_aux_hidden_state": True} | norms,
                "norm_output": c.logits_after_norm,
                "target_hidden_size": c.target_hidden_size,
            }
        )
    return norms | {
        speculators.KEY: "eagle3",
        "speculators_version": speculators.VERSION,
        "speculators_config": speculators.proposal("eagle3", c.steps, verifier),
        "architectures": ["Eagle3DraftModel"],
        "draft_vocab_size": c.vocab_size if kept is None else kept,
        "dtype": dtype,
        TAPS: [tap + 1 for tap in c.taps],
        "embed_requires_grad": False,
        "norm_before_residual": c.residual_after_norm,
        "norm_output": c.feedback_after_norm,
        "target_hidden_size": None,
        "tie_word_embeddings": False,
        "transformer_layer_config": layer,
    }


def _check_expressible(c: EagleConfig, format: str, kept: int | None) -> None:
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; expected one of {FORMATS} for EAGLE-3")
    widths = c.hidden_size != c.target_hidden_size
    flags = {
        "norms of the taps": c.tap_norm is not None,
        "a residual after the norm": c.residual_after_norm,
        "feedback after the norm": c.feedback_after_norm,
        "logits before the norm": not c.logits_after_norm,
    }
    plain = {
        f"{c.num_layers} layers": c.num_layers > 1,
        "windows": any(c.window),
    }
    missing = {
        "eagle3": plain
        | {
            "a residual after the norm": c.residual_after_norm,
            "feedback after the norm": c.feedback_after_norm,
            "norms of queries and keys": c.qk_norm,
            f"{len(c.taps)} taps": len(c.taps) != 3,
        },
        "deepspec": plain
        | flags
        | {
            "layers without norms of queries and keys": not c.qk_norm,
            "another width than the target's": widths,
            "a draft vocabulary": kept is not None,
        },
        "speculators": {
            "logits before the norm": not c.logits_after_norm,
            "another width than the target's": widths,
        },
    }[format]
    for what, wanted in missing.items():
        if wanted:
            raise ValueError(
                f"format {format!r} has no key for {what} in an EAGLE-3 drafter, so that other "
                "programs would run it differently; choose another format"
            )
