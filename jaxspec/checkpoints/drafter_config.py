"""`config.json` of published draft heads, to `DrafterConfig` and back."""

from __future__ import annotations

from typing import Any

from jaxspec.checkpoints import dflash2, speculators, visibility
from jaxspec.checkpoints.json_config import JsonConfig
from jaxspec.checkpoints.known_keys import HARMLESS, NEUTRAL
from jaxspec.checkpoints.quantised import read_quantisation
from jaxspec.checkpoints.rope import read_rope, rope_to_json
from jaxspec.config import DrafterConfig

TEMPERATURES = "sts_temperatures"  # key of config.json; one per slot
# Beside those of any model: training, the target's own vocabulary, growth of trees by default.
DRAFTER_HARMLESS = HARMLESS | {
    *("num_anchors", "candidate_tokens", "eos_token_id", "tie_word_embeddings"),
    TEMPERATURES,
}
FORMATS = ("dflash", "treeflash", "deepspec", "speculators")
PREDICT_NEXT = ("sample_from_anchor", "query_zero_predicts_next")
HEAD_TYPES = {"vanilla": "markov", "gated": "gated", "rnn": "rnn"}  # theirs to ours


def recognise(raw: dict[str, Any], origin: Any) -> str:
    """The format, one of `FORMATS`, by the keys that only it has.

    Raises:
      ValueError: no known drafter has such a configuration.
    """
    if speculators.KEY in raw:
        return "speculators"
    if "treeflash_config" in raw:
        return "treeflash"
    if "dflash_config" in raw:
        return "dflash"
    if "markov_rank" in raw and "target_layer_ids" in raw:
        return "deepspec"
    found = raw.get("architectures") or raw.get("model_type")
    raise ValueError(
        f"{origin}: the configuration, of {found}, is not a drafter's; expected "
        "'dflash_config', 'treeflash_config', 'speculators_model_type', 'eagle_config', or "
        "'markov_rank' or 'ttt_length' with 'target_layer_ids'"
    )


def from_json(raw: dict[str, Any], origin: Any) -> DrafterConfig:
    """The drafter a `config.json` describes; accepts the keys of transformers 4 and 5.

    Warns of keys that are not known (`JsonConfig.finish`).

    Raises:
      ValueError: a key is missing, asks for something that is not implemented, or contradicts
        another.
    """
    format = recognise(raw, origin)
    whole = JsonConfig(raw, origin, "a drafter")
    # DeepSpec keeps its own keys beside the model's, the others in an object.
    read_quantisation(whole)
    if format == "speculators":
        layer = speculators.layer_section(whole)
        own_fields = speculators.fields(whole, layer)
        heads = _heads(whole, whole, format) if "sequential" not in own_fields else {}
        shape = _shape(layer, own_fields["window"])
        config = whole.make(DrafterConfig, target_layers=None, **shape, **own_fields, **heads)
        speculators.finish(whole)
        return config
    own = whole if format == "deepspec" else whole.section("dflash_config")
    own.one_of("projector_type", ("dspark",), "dspark")
    own.one_of("draft_shift", (False,), False)
    window, hidden = visibility.windows(whole), whole.integer("hidden_size")
    own.one_of("target_hidden_size", (hidden,), hidden)
    config = whole.make(
        DrafterConfig,
        **_shape(whole, window),
        target_layers=whole.integer("num_target_layers"),
        taps=own.items("target_layer_ids", int),
        block_size=_block_size(whole, own),
        mask_token_id=own.integer("mask_token_id", least=0),
        causal=visibility.causality(_agreed(whole, own, visibility.CAUSAL, None), window),
        predict_next=_agreed(whole, own, PREDICT_NEXT, format == "deepspec"),
        window=window,
        **_heads(whole, own, format),
    )
    if format == "deepspec" and config.target_layers - 1 in config.taps:
        raise ValueError(
            f"{origin}: 'target_layer_ids' names the last layer, {config.taps[-1]}, which this "
            "format means before the target's final norm; expected layers before it"
        )
    whole.finish(DRAFTER_HARMLESS, NEUTRAL)
    return config


def to_json(
    config: DrafterConfig,
    format: str,
    dtype: str,
    *,
    kept: int | None = None,
    verifier: str | None = None,
) -> dict[str, Any]:
    """`config.json` of a drafter in a published format.

    Args:
      kept: tokens of the draft vocabulary, None for all; of speculators' format alone.
      verifier: the target's hub name or path, likewise.

    Raises:
      ValueError: the format cannot express the configuration.
    """
    if format != "speculators":  # checks when it knows the vocabulary
        _check_expressible(config, format)
    c = config
    raw = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "block_size": c.block_size,
        "dtype": dtype,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "hidden_size": c.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": c.intermediate_size,
        "max_position_embeddings": c.max_positions,
        "max_window_layers": c.num_layers,
        "model_type": "qwen3",
        "num_attention_heads": c.num_heads,
        "num_hidden_layers": c.num_layers,
        "num_key_value_heads": c.num_kv_heads,
        "num_target_layers": c.target_layers,
        "rms_norm_eps": c.rms_norm_eps,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": c.vocab_size,
    } | visibility.to_json(c)
    rope = rope_to_json(c.rope_theta, c.rope_scaling)
    causal = visibility.switch(c)
    if c.causal != visibility.causality(None, c.window):
        raw["is_causal"] = causal
    newer = {
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "rope_parameters": rope,
    }
    own: dict[str, Any] = {
        "mask_token_id": c.mask_token_id,
        "target_layer_ids": list(c.taps),
    }
    if format == "speculators":
        for key in ("block_size", "num_target_layers", "is_causal"):
            raw.pop(key, None)
        raw = speculators.to_json(c, raw | newer, kept)
        raw["speculators_config"] = speculators.proposal(
            raw[speculators.KEY], c.depth, verifier
        )
        return raw | (_heads_to_json(c) if raw[speculators.KEY] == "dspark" else {})
    if format == "dflash":
        if causal:
            own["causal"] = True  # as vLLM reads it; the next key is JetSpec's
        if causal is not None:
            own["causal_head"] = causal
        if c.predict_next:
            own["sample_from_anchor"] = True
        if c.confidence or c.sequential not in (None, "bilinear"):
            own |= {"projector_type": "dspark"} | _heads_to_json(c)
        raw["dflash_config"] = own | dflash2.to_json(c)
        if c.candidates or c.conv_taps:
            return raw | {"architectures": ["DFlash2DraftModel"]} | newer
        return raw | {"architectures": ["DFlashDraftModel"]} | _older(rope)
    raw |= newer
    if format == "treeflash":
        correction = "swiglu" if c.sequential else None
        return raw | {
            "architectures": ["TreeFlashDraftModel"],
            "dflash_config": own,
            "treeflash_config": {"ar_approximation": correction, "candidate_tokens": 16},
        }
    # `num_anchors` matters to training alone; 512 is what every published drafter has.
    extra = {"architectures": ["Qwen3DSparkModel"], "num_anchors": 512}
    return raw | own | _heads_to_json(c) | extra


def _shape(raw: JsonConfig, window: tuple[int | None, ...]) -> dict[str, Any]:
    """What the drafter's layers are, from the keys of a Qwen3."""
    raw.one_of("model_type", ("qwen3",), "qwen3")
    raw.one_of("hidden_act", ("silu",), "silu")
    raw.one_of("attention_bias", (False,), False)
    heads = raw.integer("num_attention_heads")
    return dict(
        vocab_size=raw.integer("vocab_size"),
        hidden_size=raw.integer("hidden_size"),
        intermediate_size=raw.integer("intermediate_size"),
        num_layers=raw.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=raw.integer("num_key_value_heads", heads),
        head_dim=raw.integer("head_dim"),
        **_rope(raw, window),
        rms_norm_eps=raw.number("rms_norm_eps", 1e-6),
        max_positions=raw.integer("max_position_embeddings", 40_960),
    )


def _rope(whole: JsonConfig, window: tuple[int | None, ...]) -> dict[str, Any]:
    kinds = {"full_attention" if w is None else "sliding_attention" for w in window}
    found = {read_rope(whole, kind, full_rotary=True) for kind in kinds}
    if len(found) > 1:
        raise whole.refusal("rope_parameters", "one rule for all layers of a drafter")
    ((theta, scaling),) = found
    return {"rope_theta": theta, "rope_scaling": scaling}


def _older(rope: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters` in the keys of transformers 4."""
    scaling = {name: x for name, x in rope.items() if name != "rope_theta"}
    plain = scaling == {"rope_type": "default"}
    return {"rope_theta": rope["rope_theta"], "rope_scaling": None if plain else scaling}


def _block_size(whole: JsonConfig, own: JsonConfig) -> int:
    """Some formats give it at the top, some inside; without either z-lab's programs take 16."""
    places = [section for section in (own, whole) if section.has("block_size")]
    sizes = sorted({section.integer("block_size") for section in places})
    if not sizes and own is not whole:
        return 16
    if len(sizes) != 1:
        raise ValueError(
            f"{whole.origin}: the drafter's configuration gives "
            f"{'two values of' if sizes else 'no'} 'block_size': {sizes}"
        )
    return sizes[0]


def _agreed(whole: JsonConfig, own: JsonConfig, keys: tuple[str, ...], default: bool) -> bool:
    """One switch under the names that programs give it, at the top or inside."""
    found = {
        f"'{key}' of {section.origin}": section.flag(key)
        for section in (whole, own)
        for key in keys
        if section.has(key)
    }
    if len(set(found.values())) > 1:
        said = " but ".join(f"{name} is {value}" for name, value in found.items())
        raise ValueError(
            f"{whole.origin}: {said}; they name one switch: keep the one that training used"
        )
    return next(iter(found.values()), default)


def _heads(whole: JsonConfig, own: JsonConfig, format: str) -> dict[str, Any]:
    if format == "treeflash":
        return _mlp(whole)
    nested = format in ("dflash", "treeflash")
    fields = dflash2.from_json(whole, own) if nested else {}
    rank = own.integer("markov_rank", 0, least=0)
    head = own.one_of("markov_head_type", tuple(HEAD_TYPES), "vanilla")
    confidence = None
    if own.flag("enable_confidence_head"):
        with_previous = own.flag("confidence_head_with_markov", rank > 0)
        confidence = "hidden_and_previous" if with_previous else "hidden"
    if "candidates" not in fields:
        fields |= {"sequential": HEAD_TYPES[head] if rank else None, "rank": rank}
    elif rank or confidence:
        raise ValueError(
            f"{own.origin}: 'selector_rank' asks for DFlash2's selector, and "
            f"{'markov_rank' if rank else 'enable_confidence_head'!r} for a head of DSpark's; "
            "no drafter has both"
        )
    return fields | {"confidence": confidence}


def _heads_to_json(c: DrafterConfig) -> dict[str, Any]:
    own: dict[str, Any] = {
        "markov_rank": c.rank,
        "enable_confidence_head": c.confidence is not None,
    }
    if c.sequential:
        theirs = {ours: theirs for theirs, ours in HEAD_TYPES.items()}
        own["markov_head_type"] = theirs[c.sequential]
    if c.confidence:
        own["confidence_head_with_markov"] = c.confidence == "hidden_and_previous"
    return own


def _mlp(whole: JsonConfig) -> dict[str, Any]:
    section = whole.section("treeflash_config")
    corrects = section.one_of("ar_approximation", ("swiglu", None), None)
    return {"sequential": "mlp" if corrects else None}


def _check_expressible(c: DrafterConfig, format: str) -> None:
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; expected one of {FORMATS}")
    later = {
        "convolutions": c.conv_taps > 0,
        "scaled logits": c.logit_scale != 1 or c.logit_softcap is not None,
        "scaled embeddings": c.embedding_scale != 1,
    }
    missing = {
        "dflash": {
            "sequential 'mlp'": c.sequential == "mlp",
            "a selector with a confidence head": c.candidates and c.confidence,
        },
        "treeflash": {
            "causal blocks": any(c.causal),
            **later,
            "predict_next": c.predict_next,
            f"sequential {c.sequential!r}": c.sequential not in ("mlp", None),
            "a confidence head": c.confidence is not None,
        },
        "deepspec": {
            "causal blocks": any(c.causal),
            **later,
            "a selector": c.sequential == "bilinear",
            "predict_own": not c.predict_next,
            "sequential 'mlp'": c.sequential == "mlp",
            "a tap of the last layer": c.target_layers - 1 in c.taps,
        },
    }[format]
    for what, wanted in missing.items():
        if wanted:
            raise ValueError(
                f"format {format!r} has no key for {what}, so that other programs would run "
                "the drafter differently; choose another format"
            )
