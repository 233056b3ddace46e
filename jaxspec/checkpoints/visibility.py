"""Attention windows and, for draft heads, causality, from the keys of a `config.json`.

In a draft head sliding layers are causal and others bidirectional, unless a key sets all
layers. A window W means that a token attends to positions less than W away.
"""

from __future__ import annotations

from typing import Any

from jaxspec.checkpoints.json_config import JsonConfig
from jaxspec.config import DrafterConfig

CAUSAL = ("causal_head", "causal", "is_causal")  # JetSpec's, vLLM's, z-lab's


def windows(
    whole: JsonConfig, layers: int | None = None, *, switched: bool = True
) -> tuple[int | None, ...]:
    """Every layer's window, None without one.

    Args:
      layers: number of layers; "num_hidden_layers" by default.
      switched: sliding layers need "use_sliding_window", as in Qwen.

    Raises:
      ValueError: `layer_types` has an unknown type or too few, or programs would disagree about
        a sliding layer's window.
    """
    layers = whole.count("num_hidden_layers") if layers is None else layers
    kinds, slides = whole.items("layer_types", str, ()), whole.flag("use_sliding_window")
    if not kinds and slides:  # as in Qwen's configuration
        full = whole.integer("max_window_layers", 28, least=0)
        kinds = tuple(
            "full_attention" if i < full else "sliding_attention" for i in range(layers)
        )
    kinds = kinds or ("full_attention",) * layers
    if len(kinds) != layers or set(kinds) - {"full_attention", "sliding_attention"}:
        raise whole.refusal(
            "layer_types",
            f"'full_attention' or 'sliding_attention' for each of the {layers} layers",
        )
    if "sliding_attention" not in kinds:
        whole.has("sliding_window")  # read, and without effect on full attention
        return (None,) * layers
    width = whole.integer("sliding_window")
    if switched and not slides:
        raise whole.refusal(
            "use_sliding_window",
            "true with sliding layers: without it transformers ignores the window of "
            f"{width} that other programs apply",
        )
    return tuple(width if kind == "sliding_attention" else None for kind in kinds)


def causality(switch: bool | None, window: tuple[int | None, ...]) -> tuple[bool, ...]:
    """Every layer's causality: the switch for all, or else whether it has a window."""
    return tuple((w is not None) if switch is None else switch for w in window)


def to_json(window: tuple[int | None, ...]) -> dict[str, Any]:
    """The keys of transformers' Qwen3 for every layer's window.

    Raises:
      ValueError: the windows have several widths, for which there is no key.
    """
    widths = sorted(set(window) - {None})
    if len(widths) > 1:
        raise ValueError(
            f"'sliding_window' is one width, but the model's layers have {widths}; expected "
            "one width"
        )
    return {
        "layer_types": [f"{'sliding' if w else 'full'}_attention" for w in window],
        "sliding_window": widths[0] if widths else None,
        "use_sliding_window": bool(widths),
    }


def switch(c: DrafterConfig) -> bool | None:
    """The causality of all layers; None if it follows from their windows.

    Raises:
      ValueError: it differs by layer and does not follow from the windows.
    """
    if len(set(c.causal)) == 1:
        return c.causal[0]
    if c.causal == causality(None, c.window):
        return None
    raise ValueError(
        f"no format has a key for causality by layer, {c.causal}; expected one value, or "
        "causal exactly where layers have windows"
    )
