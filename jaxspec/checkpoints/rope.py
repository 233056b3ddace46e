"""Rotary positions as a `config.json` asks for them, in transformers 4's keys or 5's.

Where settings stand: `rope_parameters` (5) or `rope_theta` and `rope_scaling` (4), flat or one
object per layer type. Inside, a value wins over the same key beside the object.
"""

from __future__ import annotations

from typing import Any

from jaxspec.checkpoints.json_config import JsonConfig

LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention", "linear_attention")

# Kinds that the decoder computes, and the keys each reads beside `rope_theta`. Another kind is
# a row here, its fields in `read`, and its formula in `models.layers`.
KINDS: dict[str, frozenset[str]] = {
    "default": frozenset({"original_max_position_embeddings"}),
    # Three position axes, all equal in text: `default`.
    "mrope": frozenset({"mrope_section", "mrope_interleaved"}),
}
PARTIAL = "partial_rotary_factor"
# Of no effect at these values, whatever the kind.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    PARTIAL: (1.0,),
    "factor": (1.0,),
    "attention_factor": (1.0,),
}
DEFAULT_THETA = 10_000.0


def rope_theta(raw: JsonConfig, *, full_rotary: bool = False) -> float:
    """Base of the rotary frequencies.

    Args:
      raw: the configuration of a decoder all of whose layers attend alike.
      full_rotary: the whole head rotates whatever `partial_rotary_factor` says: a drafter's
        configuration that was copied from its target's may hold the target's.

    Raises:
      ValueError: the kind is none of `KINDS`, a key in the object would change the positions,
        or the settings contradict each other.
    """
    rope, key = _settings(raw)
    if raw.has(key) and not rope.values and not raw.has("rope_theta"):
        raise raw.refusal(key, "'rope_theta' in it, or beside it")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in KINDS:
        raise raw.refusal(key, " or ".join(f"'rope_type': {name!r}" for name in KINDS))
    for name in rope.values:
        if name in ("rope_type", "type", "rope_theta", *KINDS[kind]) or not rope.has(name):
            continue
        if name not in NEUTRAL:
            raise rope.refusal(name, f"no such key with 'rope_type': {kind!r}")
        if not (full_rotary and name == PARTIAL):
            rope.one_of(name, NEUTRAL[name], None)
    if full_rotary:
        raw.has(PARTIAL)
    return rope.number("rope_theta", raw.number("rope_theta", DEFAULT_THETA))


def _settings(raw: JsonConfig) -> tuple[JsonConfig, str]:
    """The object of settings for layers of full attention, and its key."""
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
        if not rope.has("full_attention"):
            raise raw.refusal(key, "settings for 'full_attention'")
        for name in rope.values:
            rope.has(name)
        return rope.section("full_attention"), key
    return rope, key
