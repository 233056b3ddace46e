"""Rotary positions in a `config.json`, with the keys of transformers 4 or 5.

Settings are in `rope_parameters` (5) or `rope_theta` and `rope_scaling` (4), flat or one object
per layer type. A value inside the object wins over the same key beside it.
"""

from __future__ import annotations

from typing import Any

from jaxspec.checkpoints.json_config import REQUIRED, JsonConfig
from jaxspec.config import RopeScaling

LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention", "linear_attention")

ORIGINAL = "original_max_position_embeddings"
# Supported kinds, and the keys each reads besides `rope_theta`. A new kind needs a row here and
# a formula in `models.rope`.
KINDS: dict[str, frozenset[str]] = {
    # Three position axes are all equal in text.
    "default": frozenset({ORIGINAL, "mrope_section", "mrope_interleaved"}),
    "mrope": frozenset({"mrope_section", "mrope_interleaved"}),
    "linear": frozenset({"factor", ORIGINAL}),
    "yarn": frozenset(
        f"factor {ORIGINAL} beta_fast beta_slow truncate attention_factor mscale "
        "mscale_all_dim".split()
    ),
    "llama3": frozenset(f"factor {ORIGINAL} low_freq_factor high_freq_factor".split()),
}
PARTIAL = "partial_rotary_factor"
# Values without effect, for every kind.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    PARTIAL: (1.0,),
    "factor": (1.0,),
    "attention_factor": (1.0,),
    "attn_factor": (1.0,),
    "extrapolation_factor": (1.0,),
}
DEFAULT_THETA = 10_000.0


def read_rope(
    raw: JsonConfig,
    layer_type: str = "full_attention",
    *,
    full_rotary: bool = False,
    partial: bool = False,
) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary frequencies, for layers of one type.

    Args:
      full_rotary: ignore `partial_rotary_factor`, which a drafter's configuration may have
        copied from its target's: the whole head rotates.
      partial: allow `partial_rotary_factor`, which the caller reads.

    Raises:
      ValueError: the kind is not one of `KINDS`, an unknown key would change the positions, or
        the settings contradict each other.
    """
    rope, key = settings(raw, layer_type)
    if raw.has(key) and not rope.values and not raw.has("rope_theta"):
        raise raw.refusal(key, "'rope_theta' in it, or beside it")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in KINDS:
        raise raw.refusal(key, " or ".join(f"'rope_type': {name!r}" for name in KINDS))
    plain = kind in ("default", "mrope")
    for name in rope.values:
        if not rope.has(name) or name in ("rope_type", "type", "rope_theta", *KINDS[kind]):
            continue
        if name not in NEUTRAL:
            raise rope.refusal(name, f"no such key with 'rope_type': {kind!r}")
        if not (name == PARTIAL and (partial or full_rotary and plain)):
            rope.one_of(name, NEUTRAL[name], None)
    if full_rotary and plain:
        raw.has(PARTIAL)
    if not plain and not rope.has("rope_theta") and not raw.has("rope_theta"):
        raise raw.refusal(key, "'rope_theta' in it, or beside it")
    theta = rope.number("rope_theta", raw.number("rope_theta", DEFAULT_THETA))
    return theta, None if plain else _scaling(raw, rope, kind)


def rope_to_json(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """`rope_parameters`, with the keys of the kind that are not at their defaults."""
    if scaling is None:
        return {"rope_theta": theta, "rope_type": "default"}
    keys = {"rope_theta": theta, "rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "linear":
        return keys
    keys[ORIGINAL] = scaling.original_positions
    if scaling.kind == "llama3":
        names = ("low_freq_factor", "high_freq_factor")
        return keys | {name: getattr(scaling, name) for name in names}
    default = RopeScaling("yarn", 1.0, 1)
    names = sorted(KINDS["yarn"] - {"factor", ORIGINAL})
    own = {name: getattr(scaling, name) for name in names}
    return keys | {name: x for name, x in own.items() if x != getattr(default, name)}


def _scaling(raw: JsonConfig, rope: JsonConfig, kind: str) -> RopeScaling:
    if kind == "linear":
        return rope.make(RopeScaling, kind=kind, factor=rope.number("factor"))
    # As in transformers, this key beside the object wins over the one inside.
    place = raw if raw.has(ORIGINAL) else rope
    most = raw.get("max_position_embeddings", None)
    original = place.integer(ORIGINAL, REQUIRED if most is None else most)
    if kind == "llama3":
        return rope.make(
            RopeScaling,
            kind=kind,
            factor=rope.number("factor"),
            original_positions=original,
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
        )
    # Without a factor it follows from the positions, if both are given.
    given = place.has(ORIGINAL) and isinstance(most, int)
    stretch = most / original if given else REQUIRED

    def number(name, default=None):  # 0 stands for the default, as in transformers
        return rope.number(name) if rope.get(name, 0) != 0 else default

    return rope.make(
        RopeScaling,
        kind=kind,
        factor=rope.number("factor", stretch),
        original_positions=original,
        beta_fast=number("beta_fast", 32.0),
        beta_slow=number("beta_slow", 1.0),
        truncate=rope.flag("truncate", True),
        attention_factor=number("attention_factor"),
        mscale=number("mscale"),
        mscale_all_dim=number("mscale_all_dim"),
    )


def settings(raw: JsonConfig, layer_type: str = "full_attention") -> tuple[JsonConfig, str]:
    """The object of settings for layers of one type, and its key."""
    given = [key for key in ("rope_scaling", "rope_parameters") if raw.has(key)]
    if len(given) == 2 and raw.get(given[0]) != raw.get(given[1]):
        raise ValueError(
            f"{raw.origin}: 'rope_scaling' is {raw.get('rope_scaling')!r} and "
            f"'rope_parameters' is {raw.get('rope_parameters')!r}; programs differ in which "
            "they follow: keep one, with 'rope_theta' in it"
        )
    key = given[0] if given else "rope_parameters"
    rope = raw.section(key, {})
    if rope.values and set(rope.values) <= set(LAYER_TYPES):
        if not rope.has(layer_type):
            raise raw.refusal(key, f"settings for {layer_type!r}")
        for name in rope.values:
            rope.has(name)
        return rope.section(layer_type), key
    return rope, key
